import re

import numpy as np
import pytest

from hf_crouter.data import parallel
from hf_crouter.data.dedup import deduplicate, ngram_overlap, training_grams
from hf_crouter.data.documents import Document
from hf_crouter.data.shingles import gram_hashes, sorted_unique, token_hashes

from .samples import library_documents, sentences


def test_tokens_are_words_and_single_signs():
    text = "def f(naïve_x1):\n\treturn  'a' + 10"
    expected = re.findall(r"\w+|[^\w\s]", text)
    hashes = token_hashes(text)
    assert len(hashes) == len(expected)
    assert [token_hashes(token)[0] for token in expected] == hashes.tolist()  # wherever a token stands
    assert len(token_hashes("")) == len(token_hashes(" \n")) == 0


def slow_hash(token):
    value = sum((byte + 1) * 0x9E3779B97F4A7C15**position for position, byte in enumerate(token.encode())) % 2**64
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
    return value ^ value >> 31


def test_hashes_are_those_of_plain_arithmetic():
    assert token_hashes("abc\n äöü").tolist() == [slow_hash("abc"), slow_hash("äöü")]
    assert slow_hash("abc") == 7656036035725422873  # the same on every machine


def test_grams_are_windows_over_tokens():
    tokens = token_hashes(sentences(0, 30))
    grams = gram_hashes(tokens, 13)
    assert len(grams) == 18
    assert all(gram_hashes(tokens[i : i + 13], 13)[0] == gram for i, gram in enumerate(grams))
    assert len(gram_hashes(tokens[:12], 13)) == 0


def test_sorted_unique_matches_numpy():
    values = np.random.default_rng(0).integers(0, 50, 200).astype(np.uint64)
    assert (sorted_unique(values) == np.unique(values)).all()


def documents(**texts):
    return [Document(name, "g", text) for name, text in texts.items()]


def test_exact_and_near_duplicates_go_and_the_first_id_stays():
    text = sentences(1)
    words = text.split()
    near = " ".join([*words[:100], "other", *words[101:]])  # 5 of 196 shingles differ
    half = " ".join([*words[:100], *sentences(2, 100).split()])
    found = deduplicate(documents(b=text, a=text.replace(" ", "\n  "), c=near, d=half, e=sentences(3)))
    assert [d.id for d in found.documents] == ["a", "d", "e"]
    assert (found.exact, found.near) == (1, 1)


def jaccard(left, right):
    sets = [set(gram_hashes(token_hashes(text), 5).tolist()) for text in (left, right)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


@pytest.mark.parametrize("seed", range(5))
def test_the_threshold_is_that_of_the_exact_jaccard_similarity(seed):
    drawn = np.random.default_rng(seed)
    kept = dropped = 0
    for number in range(40):
        words = sentences(1000 * seed + number, 400).split()
        other = list(words)
        for position in drawn.choice(400, drawn.integers(1, 16), replace=False):
            other[position] = "changed"
        left, right = " ".join(words), " ".join(other)
        near = deduplicate(documents(a=left, b=right)).near
        similarity = jaccard(left, right)
        assert not (near and similarity < 0.8)  # candidates are verified, so none goes by chance
        dropped += near
        kept += not near and similarity >= 0.8
    assert dropped > 5 and kept <= 1  # hardly any is missed


def test_order_and_processes_change_nothing(monkeypatch):
    texts = [Document(f"{n:03d}", "g", sentences(n % 60, 50)) for n in range(80)]
    alone = deduplicate(texts, workers=1)
    monkeypatch.setattr(parallel, "_FLOOR", 0)
    monkeypatch.setattr(parallel, "_BATCH", 2_000)
    assert deduplicate(texts[::-1], workers=2) == alone
    assert alone.exact == 20
    grams = training_grams(texts, workers=1)
    assert (training_grams(texts, workers=2) == grams).all()


def test_overlap_is_the_share_of_known_grams():
    text = sentences(5, 100)
    fresh = sentences(6, 100)
    grams = training_grams(documents(a=text))
    mixed = " ".join(text.split()[:50] + fresh.split()[:50])  # 38 of 88 grams lie in the known half
    shares = ngram_overlap(documents(a=text, b=fresh, c=mixed, d="too short"), grams)
    assert shares.tolist() == pytest.approx([1.0, 0.0, 38 / 88, 0.0])
    assert ngram_overlap([], grams).shape == (0,)
    assert ngram_overlap(documents(a=text), training_grams([])).tolist() == [0.0]


def test_nothing_in_nothing_out():
    assert deduplicate([]).documents == []
    assert [d.id for d in deduplicate(library_documents()).documents] == sorted(d.id for d in library_documents())
