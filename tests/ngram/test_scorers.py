import numpy as np
import pytest

from hf_crouter.errors import InputError
from hf_crouter.ngram import postings
from hf_crouter.ngram.postings import ChunkIndex
from hf_crouter.ngram.scorers import (
    Bm25Scorer,
    OverlapScorer,
    RandomScorer,
    RecencyScorer,
    Scorer,
    top_k,
)
from tests.reference import bm25, overlap


def drawn(seed, count, vocab=40, longest=30):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab, rng.integers(1, longest)) for _ in range(count)]


def lists(chunks):
    return [chunk.tolist() for chunk in chunks]


class TestIndex:
    @pytest.mark.parametrize("count", [1, 2, 3, 7, 20, 33])
    @pytest.mark.parametrize("at_once", [1, 3, 100])
    def test_bm25_is_the_formulas(self, count, at_once):
        chunks, index = drawn(count, count), ChunkIndex()
        for start in range(0, count, at_once):
            index = index.extended(*chunks[start : start + at_once])
        assert len(index) == count
        for seed in range(3):
            query = np.random.default_rng(seed).integers(0, 50, 12)
            np.testing.assert_allclose(index.bm25(query), bm25(lists(chunks), query.tolist()))

    def test_blocks_of_a_bounded_size(self, monkeypatch):
        monkeypatch.setattr(postings, "BLOCK", 4)
        chunks, index = drawn(0, 23), ChunkIndex()
        for start, end in ((0, 1), (1, 6), (6, 7), (7, 8), (8, 9), (9, 23)):
            index = index.extended(*chunks[start:end])
            assert max(block.chunks for block in index.words.blocks) <= 4
            np.testing.assert_allclose(index.bm25(chunks[3]), bm25(lists(chunks[:end]), chunks[3].tolist()))

    def test_an_older_value_stays_as_it_was_and_its_memory_is_shared(self):
        chunks = drawn(0, 9)
        old = ChunkIndex().extended(*chunks[:8])
        before = old.bm25(chunks[0])
        one, other = old.extended(chunks[8]), old.extended(chunks[0])
        assert one.words.blocks[0] is other.words.blocks[0] is old.words.blocks[0]
        assert one.phrases.blocks[0] is other.phrases.blocks[0] is old.phrases.blocks[0]
        np.testing.assert_array_equal(old.bm25(chunks[0]), before)
        np.testing.assert_allclose(one.bm25(chunks[0]), bm25(lists(chunks), chunks[0].tolist()))

    def test_nothing_to_find(self):
        assert not len(ChunkIndex().bm25(np.array([1, 2])))
        assert ChunkIndex().extended().bm25(np.array([], np.int64)).shape == (0,)
        index = ChunkIndex().extended(np.array([1, 2]), np.array([3]))
        assert not index.bm25(np.array([9])).any() and not index.bm25(np.array([], np.int64)).any()

    def test_narrow_ids(self):
        wide, narrow = np.array([65535, 3, 3]), np.array([65535, 3, 3], np.uint16)
        np.testing.assert_array_equal(
            ChunkIndex().extended(narrow, wide[1:]).bm25(narrow), ChunkIndex().extended(wide, narrow[1:]).bm25(wide)
        )


class TestChoice:
    @pytest.mark.parametrize("k", [0, 1, 3, 10, 99])
    def test_the_best_ascending_and_of_equals_the_later(self, k):
        for seed in range(20):
            scores = np.random.default_rng(seed).integers(0, 4, 10).astype(float)
            expected = sorted(sorted(range(10), key=lambda i: (scores[i], i))[max(0, 10 - k) :])
            assert top_k(scores, k).tolist() == expected

    @pytest.mark.parametrize("decay", [2.0, 16.0])
    @pytest.mark.parametrize("alphabet", [3, 40])
    def test_overlap_is_its_formula(self, decay, alphabet):
        rng = np.random.default_rng(0)
        for _ in range(20):
            chunks = [rng.integers(0, alphabet, rng.integers(1, 30)) for _ in range(rng.integers(1, 9))]
            recent = rng.integers(0, alphabet, rng.integers(1, 60))
            found = OverlapScorer(decay, 0.25).scores(ChunkIndex().extended(*chunks), recent)
            np.testing.assert_allclose(found, overlap(lists(chunks), recent.tolist(), decay, 0.25), atol=1e-9)

    def test_a_question_decides_before_what_stands_ahead_of_it(self):
        rng = np.random.default_rng(1)
        chunks = [rng.integers(0, 5000, 64) for _ in range(50)]
        question = np.concatenate([chunks[20][10:14], rng.integers(0, 5000, 4)])
        ahead = rng.integers(0, 5000, 60)
        ahead[::3] = chunks[40][:20]  # many of its words, no phrase
        recent = np.concatenate([ahead, question])
        index = ChunkIndex().extended(*chunks)
        assert top_k(OverlapScorer().scores(index, recent), 1).tolist() == [20]
        assert top_k(Bm25Scorer().scores(index, recent), 1).tolist() == [40]

    def test_nothing_shared_brings_the_latest(self):
        index = ChunkIndex().extended(*[np.arange(10 * i, 10 * i + 10) for i in range(6)])
        assert top_k(OverlapScorer().scores(index, np.array([999])), 2).tolist() == [4, 5]
        assert OverlapScorer().scores(ChunkIndex(), np.array([1])).shape == (0,)
        with pytest.raises(InputError, match="decay: expected more than 0 tokens, got 0"):
            OverlapScorer(0)

    def test_equal_hashes_are_equal_phrases(self):
        ids = np.random.default_rng(0).integers(0, 49152, 200_000)
        hashes = postings.phrases_of(ids)
        triples = np.stack([ids[i : i + len(hashes)] for i in range(postings.PHRASE)], 1)
        assert len(np.unique(hashes)) > 0.9999 * len(np.unique(triples, axis=0))
        assert len(postings.phrases_of(ids[:2])) == 0 and hashes.max() < 2**32

    def test_only_the_last_tokens_ask(self):
        index, query = ChunkIndex().extended(*drawn(0, 9)), drawn(1, 1, longest=20)[0]
        longer = np.concatenate([drawn(2, 1)[0], query])
        np.testing.assert_array_equal(
            Bm25Scorer(len(query)).scores(index, query), Bm25Scorer(len(query)).scores(index, longer)
        )

    def test_recency(self):
        index, recent = ChunkIndex().extended(*drawn(0, 5)), drawn(1, 1)[0]
        assert top_k(RecencyScorer().scores(index, recent), 2).tolist() == [3, 4]
        overlap = Bm25Scorer().scores(index, recent)
        np.testing.assert_allclose(
            Bm25Scorer(recency=0.5).scores(index, recent), overlap + overlap.max() * 0.5 / np.array([5, 4, 3, 2, 1])
        )

    def test_random_is_a_function_of_tokens_and_seed(self):
        index, recent = ChunkIndex().extended(*drawn(0, 50)), drawn(1, 1)[0]
        same = RandomScorer(3).scores(index, recent)
        np.testing.assert_array_equal(same, RandomScorer(3).scores(index, recent.astype(np.uint16)))
        assert (same != RandomScorer(4).scores(index, recent)).any()
        assert (same != RandomScorer(3).scores(index, recent[1:])).any()

    def test_all_of_them_are_scorers(self):
        for scorer in (OverlapScorer(), Bm25Scorer(), RecencyScorer(), RandomScorer()):
            assert isinstance(scorer, Scorer)
        assert not isinstance(object(), Scorer)
