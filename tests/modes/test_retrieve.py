import numpy as np
import pytest

from hf_crouter.errors import InputError
from hf_crouter.modes.retrieve import ScoredRetriever
from hf_crouter.ngram.scorers import OverlapScorer


def drawn(seed, count, vocab=40, longest=30):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab, rng.integers(1, longest)) for _ in range(count)]


def retriever(chunks, scorer=None):
    return ScoredRetriever(chunks, 128, scorer or OverlapScorer())


def test_a_chunk_that_is_quoted_comes_back():
    rng = np.random.default_rng(0)
    chunks = [rng.integers(0, 5000, 64) for _ in range(50)]
    for quoted in (0, 17, 49):
        recent = np.concatenate([rng.integers(0, 5000, 100), chunks[quoted][20:40]])
        index, chosen, scores = retriever(1)(None, chunks, recent)
        assert chosen == (quoted,) and set(scores[0]) == {"words", "phrases", "recency"} and len(index) == 50


def test_an_older_index_is_extended():
    chunks, recent = drawn(0, 12), drawn(1, 1)[0]
    index = retriever(3)(None, chunks[:7], recent)[0]
    whole, steps = retriever(3)(None, chunks, recent), retriever(3)(index, chunks[7:], recent)
    assert whole[1] == steps[1]
    for part in ("words", "phrases", "recency"):
        assert [parts[part] for parts in whole[2]] == pytest.approx([parts[part] for parts in steps[2]])


@pytest.mark.parametrize("wrong", [np.zeros(2), np.full(3, np.nan)])
def test_scores_that_do_not_fit(wrong):
    class Wrong:
        def scores(self, index, recent_ids):
            return wrong

    with pytest.raises(InputError, match="3 finite scores"):
        retriever(1, Wrong())(None, drawn(0, 3), np.array([1]))
