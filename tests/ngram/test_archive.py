import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import FrozenInstanceError

import numpy as np
import pytest

from hf_crouter.errors import InputError
from hf_crouter.ngram import archive as store
from hf_crouter.ngram.archive import ORDERS, TAIL, Archive

from .reference import SlowArchive, assert_same


@pytest.mark.parametrize("small", [1, 4, 128])
@pytest.mark.parametrize("base", [0, 65_530, 70_000])
@pytest.mark.parametrize("seed", range(12))
def test_matches_are_those_of_the_reference(monkeypatch, small, base, seed):
    monkeypatch.setattr(store, "SMALL", small)
    rng = np.random.default_rng([seed, base, small])
    kinds = int(rng.choice([1, 2, 3, 6]))
    stop_ids = frozenset([base]) if rng.random() < 0.5 else frozenset()
    archive = Archive.empty(base + kinds + 1, stop_ids, tail_limit=int(rng.choice([0, 5, 40, 1000])))
    slow = SlowArchive(stop_ids)
    for _ in range(int(rng.integers(1, 8))):
        count = int(rng.integers(0, 40))
        ids = base + rng.integers(0, kinds + 1, count)
        weights = rng.random(count) if rng.random() < 0.3 else None
        copyable = rng.random(count) < 0.7 if rng.random() < 0.3 else None
        archive, slow = archive.extended(ids, weights, copyable), slow.extended(ids, weights, copyable)
        assert archive.ids.tolist() == slow.ids and len(archive) == len(slow.ids)
        for _ in range(4):
            at = int(rng.integers(0, len(slow.ids) + 1))
            suffix = slow.ids[max(0, at - 70) : at]
            if rng.random() < 0.3 or not suffix:
                suffix = (base + rng.integers(0, kinds + 1, int(rng.integers(0, 70)))).tolist()
            longest = int(rng.choice([1, 5, 64]))
            assert_same(archive.match(suffix, ORDERS, longest), slow.match(suffix, ORDERS, longest), slow)


def test_the_usual_sizes_against_the_reference():
    rng = np.random.default_rng(0)
    ids = np.minimum(rng.zipf(1.5, 9000), 300)
    ids[6000:6200] = ids[100:300]  # a long match
    archive, slow = Archive.empty(301), SlowArchive()
    for part in np.split(ids, [5000, 7000]):
        archive, slow = archive.extended(part), slow.extended(part)
    for at in (200, 290, 5003, 7002, 8999):
        assert_same(archive.match(ids[:at], (1, 2, 4, 24)), slow.match(ids[:at][-100:], (1, 2, 4, 24), 64))


def test_a_match_over_the_border():
    archive = Archive.empty(100, tail_limit=4).extended(range(10, 20)).extended([20, 21, 22])
    matches = archive.match(range(15, 22), orders=(1, 4, 7, 8))
    assert (matches.length, matches.positions.tolist(), matches.occurrences) == (7, [12], (1, 1, 1, 0))
    assert [tokens.tolist() for tokens in matches.tokens] == [[22], [22], [22], []]
    assert archive.match(range(15, 20)).tokens[0].tolist() == [20]
    assert archive.match([22]).length == 0  # nothing followed it


def test_a_match_ends_at_a_stop_id_and_proposes_none():
    archive = Archive.empty(10, {0}).extended([1, 2, 0, 3, 4, 5])
    assert archive.match([2]).length == 0
    assert archive.match([1, 2, 0]).length == 0
    assert archive.match([2, 0, 3]).length == 1
    assert archive.match([0, 3, 4]).tokens[1].tolist() == [5]


@pytest.mark.parametrize("tail_limit", [0, 100])
def test_what_is_excluded_is_read_but_not_proposed(tail_limit):
    archive = Archive.empty(10, tail_limit=tail_limit).extended([1, 2, 3, 4], copyable=[True, True, False, True])
    assert archive.match([1, 2]).length == 0
    assert archive.match([1, 2, 3]).tokens[2].tolist() == [4]


def test_weights_are_summed():
    archive = Archive.empty(10).extended([1, 2, 1, 3]).extended([1, 2, 1], [1, 0.2, 0])
    matches = archive.match([1], orders=(1,))
    assert dict(zip(matches.tokens[0].tolist(), matches.weights[0].tolist(), strict=True)) == pytest.approx(
        {2: 1.2, 3: 1.0}
    )
    assert archive.match([2], orders=(1,)).weights[0].tolist() == pytest.approx([1.0])


@pytest.mark.parametrize("tail_limit", [0, 100])
def test_versions_do_not_see_each_other(tail_limit):
    ids = np.array([1, 2, 3])
    base = Archive.empty(10, tail_limit=tail_limit).extended(ids)
    ids[:] = 9
    one, two = base.extended([1, 4]), base.extended([1, 5, 1])
    assert [archive.ids.tolist() for archive in (base, one, two)] == [[1, 2, 3], [1, 2, 3, 1, 4], [1, 2, 3, 1, 5, 1]]
    assert [sorted(archive.match([1]).tokens[0].tolist()) for archive in (base, one, two)] == [[2], [2, 4], [2, 5]]
    assert base.extended([]) is base
    with pytest.raises(FrozenInstanceError):
        base.vocab_size = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_versions_share_what_is_sorted():
    base = Archive.empty(10, tail_limit=3).extended([1, 2, 3, 4])
    one, two = base.extended([1]), base.extended([2])
    assert one._static is two._static is base._static is not None
    assert copy.deepcopy(one) is one
    other = pickle.loads(pickle.dumps(one))
    assert other.match([1]).tokens[0].tolist() == [2]


def test_what_is_remembered_cannot_be_written_to(monkeypatch):
    monkeypatch.setattr(store, "SMALL", 1)
    archive = Archive.empty(10, tail_limit=0).extended([1, 2] * 5)
    archive.match([1], orders=(1,)).weights[0][:] = 100
    assert archive.match([1], orders=(1,)).weights[0].tolist() == [5.0]


def test_threads_may_share_an_archive(monkeypatch):
    monkeypatch.setattr(store, "SMALL", 1)
    ids = np.random.default_rng(0).integers(0, 4, 2000)
    archive = Archive.empty(4, tail_limit=0).extended(ids)
    archive._static.memory.limit = 2000  # pyright: ignore[reportOptionalMemberAccess]
    alone = [archive.match(ids[:at]).occurrences for at in range(64, 264)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda at: archive.match(ids[:at]).occurrences, range(64, 264))) == alone


def test_only_the_latest_positions():
    matches = Archive.empty(10).extended([1, 2] * 100).match([1], orders=(1,), longest=1)
    assert matches.positions.tolist() == list(range(73, 200, 2))
    assert matches.occurrences == (100,)


def test_bytes():
    ids = np.random.default_rng(0).integers(1, 1000, TAIL)
    archive = Archive.empty(1000).extended(ids)
    assert (archive.nbytes, archive.index_bytes) == (2 * (TAIL + 64), 0)
    assert archive.bytes_per_token == pytest.approx(2, abs=0.1)
    assert archive.extended([1]).index_bytes > 4 * TAIL
    assert archive.extended([1]).nbytes == 2 * (TAIL + 1 + 2 * 64)
    assert Archive.empty(70_000).extended(ids).nbytes == 4 * (TAIL + 64)
    assert Archive.empty(1000).extended(ids, np.ones(TAIL)).nbytes == 3 * TAIL + 128
    assert Archive.empty(1000, {0}).extended(ids).nbytes == 2 * (TAIL + 64)
    assert Archive.empty(1000, {int(ids[5])}).extended(ids).nbytes == 3 * TAIL + 128
    assert Archive.empty(1000).bytes_per_token == 0


def test_little_is_sorted_anew():
    archive = Archive.empty(1000).extended(np.arange(64 * TAIL * 2) % 997)
    first = archive._static
    archive = archive.extended(np.zeros(2 * TAIL, int))
    assert archive._static is first
    assert archive.extended([0])._static is not first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 10],), "ids of 0 to 9, got 1 to 10"),
        (([-1, 2],), "ids of 0 to 9, got -1 to 2"),
        (([1.5],), "token ids, got float64"),
        (([[1, 2]],), r"token ids, got int64 of shape \[1, 2\]"),
        (([1, 2], [1.0]), r"weights of 2 tokens, got the shape \[1\]"),
        (([1, 2], [0.5, 1.5]), "weights of 0 to 1, got 0.5 to 1.5"),
        (([1, 2], [0.5, float("nan")]), "weights of 0 to 1, got nan"),
        (([1, 2], None, [True]), r"copyable of 2 tokens, got the shape \[1\]"),
    ],
)
def test_wrong_tokens(arguments, message):
    with pytest.raises(InputError, match=message):
        Archive.empty(10).extended(*arguments)


def test_wrong_queries():
    archive = Archive.empty(10).extended([1, 2, 3])
    with pytest.raises(InputError, match="ids of 0 to 9, got 10 to 10"):
        archive.match([10])
    for orders, longest in [((), 5), ((2, 1), 5), ((0,), 5), ((65,), 5), ((1,), 0), ((1,), 65)]:
        with pytest.raises(InputError, match="ascending orders and a length of 1 to 64"):
            archive.match([1], orders, longest)
    with pytest.raises(InputError, match="vocabulary of 1 to 2\\^32 ids, got 0"):
        Archive.empty(0)


@pytest.mark.parametrize("suffix", [[], [1]])
def test_an_empty_archive_matches_nothing(suffix):
    for archive in (Archive.empty(10), Archive.empty(10).extended([1]), Archive.empty(10, tail_limit=0).extended([1])):
        matches = archive.match(suffix)
        assert (matches.length, len(matches.positions), matches.occurrences) == (0, 0, (0,) * len(ORDERS))
        assert [len(tokens) for tokens in matches.tokens] == [0] * len(ORDERS)


def slow_source(slow, suffix, token, tokens, after):
    """Latest of the positions of a token before which most of a text's last ids stand; where it goes on, that one."""
    found = {}
    for k in range(1, 65):
        if k > len(suffix) or suffix[-k] in slow.stop_ids:
            break
        same = [i for i in range(k, tokens) if slow.ids[i - k : i] == suffix[-k:] and slow.ids[i] == token
                and slow.copyable[i] and token not in slow.stop_ids]  # fmt: skip
        found = {k: same} if same else found
    best = next(iter(found.values()), [])
    if not best:
        return None
    return after + 1 if after is not None and after + 1 in best else max(best)


@pytest.mark.parametrize("base", [0, 70_000])
@pytest.mark.parametrize("seed", range(12))
def test_the_source_of_a_token_is_the_longest_latest_one(base, seed):
    rng = np.random.default_rng([seed, base])
    stop_ids = frozenset([base]) if rng.random() < 0.5 else frozenset()
    archive, slow = Archive.empty(base + 5, stop_ids, tail_limit=int(rng.choice([0, 5, 40]))), SlowArchive(stop_ids)
    for _ in range(int(rng.integers(1, 6))):
        count = int(rng.integers(1, 40))
        ids, copyable = base + rng.integers(0, 4, count), rng.random(count) < 0.8 if rng.random() < 0.5 else None
        archive, slow = archive.extended(ids, None, copyable), slow.extended(ids, None, copyable)
    known = 0
    for _ in range(40):
        at, tokens = int(rng.integers(0, len(slow.ids) + 1)), int(rng.integers(0, len(slow.ids) + 1))
        suffix, token = slow.ids[max(0, at - 70) : at], base + int(rng.integers(0, 4))
        after = int(rng.integers(0, len(slow.ids))) if rng.random() < 0.7 else None
        if not suffix:
            continue
        found = archive.source(suffix, token, tokens, after)
        assert found == slow_source(slow, suffix, token, tokens, after)
        known += found is not None
    assert known or len(slow.ids) < 10
