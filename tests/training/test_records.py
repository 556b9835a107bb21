import numpy as np
import pytest

from eval.reading import near_matches, updates
from hf_crouter.errors import InputError
from hf_crouter.training.records import FORMS, REMARKS, record_row

OTHER = np.full(3000, 1)  # the letter \x01 stands nowhere in records


def encode(text):
    return [ord(letter) for letter in text]


def decode(ids):
    return "".join(map(chr, ids))


@pytest.mark.parametrize("seed", range(40))
def test_every_listed_value_is_the_latest_of_its_key(seed):
    ids, listed = record_row(encode, OTHER, 2600, (4, 2000), np.random.default_rng(seed))
    assert ids.shape == (2600,) and 0 < listed <= 420
    assert (ids[:4] == 1).all() and (ids != 1).sum() > listed
    before, end = decode(ids[:-listed]), decode(ids[-listed:])
    said = [line for line in before.replace("\x01", "\n").splitlines() if line.strip()]
    # whichever form it is: values that are listed stand in what was said before, the last of their key's
    for form in FORMS:
        _, line, head = form
        if not end.startswith("\n" + head.format()):
            continue
        stem, _, rest = line.partition("{key}")
        if "{value}" in stem or "\n" in rest.rstrip("\n"):
            continue  # the key stands behind its value, or on a line of its own
        between, _, tail = rest.partition("{value}")
        for one in end.splitlines()[2:]:
            if not (one.startswith(stem) and between in one):
                continue  # listed in the words of another form
            key, _, value = one[len(stem) :].partition(between)
            value = value[: len(value) - len(tail.rstrip("\n"))] if tail.rstrip("\n") else value
            mentions = [text for text in said if key in text]
            assert mentions and value in mentions[-1]


def test_the_same_seed_gives_the_same_text():
    first, second = (record_row(encode, OTHER, 2600, (4, 2000), np.random.default_rng(5)) for _ in range(2))
    assert (first[0] == second[0]).all() and first[1] == second[1]


def test_no_wording_is_one_that_is_measured():
    lines = [line for _, line, _ in FORMS] + list(REMARKS)
    for measured, question in updates.FORMS.values():
        assert measured not in lines and all(question.strip() != head.strip() for _, _, head in FORMS)
    records = [near_matches._record(form, "{key}", 7, "{value}") for form in near_matches.FORMS]
    assert not set(records) & set(lines) and not any("has moved to" in line for line in lines)


def test_a_text_without_room_is_refused():
    with pytest.raises(InputError, match="expected room for one"):
        record_row(encode, OTHER, 40, (4, 12), np.random.default_rng(0))


@pytest.mark.parametrize("seed", range(60))
def test_a_short_window_holds_what_it_can(seed):
    ids, listed = record_row(encode, OTHER, 900, (4, 700), np.random.default_rng(seed))
    assert ids.shape == (900,) and 0 < listed < 200
