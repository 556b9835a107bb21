"""Scores of retrieval: which compressed chunks matter enough now to be read raw again.

They are cheap and depend on a row's tokens alone: lexical overlap with the last tokens (BM25 over token ids and over
phrases of three of them, from posting lists) and recency. Axes: `N` chunks.
"""

from __future__ import annotations

import zlib
from typing import Protocol, runtime_checkable

import numpy as np

from ..errors import InputError
from .postings import ChunkIndex, phrases_of

QUERY = 512  # last tokens of a row that a scorer is given
DECAY = 16.0  # tokens back at which a token of the query counts 1/e
RECENCY = 0.25  # of the best overlap, that the latest chunk gets on top


@runtime_checkable
class Scorer(Protocol):
    """Says how much each chunk matters now.

    A pure function of what it is given: equal tokens give equal choices, in prefill, step by step and in beams. One
    that also has `parts` (the same arguments; arrays by name that sum to the scores) has its reasons reported.
    """

    def scores(self, index: ChunkIndex, recent_ids: np.ndarray) -> np.ndarray:
        """Higher matters more, `[N]`.

        Args:
            index: of the row's compressed chunks.
            recent_ids: last tokens of the row, int64, at most `QUERY`.
        """
        ...


class _Parts:
    def parts(self, index: ChunkIndex, recent_ids: np.ndarray) -> dict[str, np.ndarray]:
        """What the scores are the sum of, by name."""
        raise NotImplementedError

    def scores(self, index: ChunkIndex, recent_ids: np.ndarray) -> np.ndarray:
        """See `Scorer.scores`."""
        return sum(self.parts(index, recent_ids).values(), np.zeros(len(index)))


class Bm25Scorer(_Parts):
    """Lexical overlap with the last tokens.

    Args:
        last: tokens of the query, at most `QUERY`.
        recency: share of the best overlap that the latest chunk gets on top; the one before gets half of that, then a
            third, and so on.

    Raises:
        InputError: no tokens in the query.
    """

    def __init__(self, last: int = 128, recency: float = 0.0):
        if not 1 <= last <= QUERY:
            raise InputError(f"last: expected 1 to {QUERY} tokens, got {last}")
        self.last, self.recency = last, recency

    def parts(self, index: ChunkIndex, recent_ids: np.ndarray) -> dict[str, np.ndarray]:
        """See `Scorer`."""
        overlap = index.bm25(recent_ids[-self.last :])
        if not self.recency or not len(index):
            return {"bm25": overlap}
        return {"bm25": overlap, "recency": self.recency * overlap.max() * recency(len(index))}


class OverlapScorer(_Parts):
    """Words and phrases shared with the last tokens, the later the more, and recency: the default.

    A question at the end thus decides before what stands ahead of it, and a phrase that few chunks hold before single
    words; where nothing is shared, the latest chunks come. The best overlap counts 1, however small it is.

    Args:
        decay: tokens back at which a token of the query counts 1/e.
        recency: what the latest chunk gets on top; the one before gets half of that, then a third, and so on.

    Raises:
        InputError: no positive decay.
    """

    def __init__(self, decay: float = DECAY, recency: float = RECENCY):
        if not decay > 0:
            raise InputError(f"decay: expected more than 0 tokens, got {decay}")
        self.decay, self.recency = decay, recency

    def parts(self, index: ChunkIndex, recent_ids: np.ndarray) -> dict[str, np.ndarray]:
        """See `Scorer`."""
        ids = np.asarray(recent_ids, np.int64)[-QUERY:]
        found = {}
        for name, postings, query in (("words", index.words, ids), ("phrases", index.phrases, phrases_of(ids))):
            found[name] = postings.bm25(query, np.exp(np.arange(1 - len(query), 1) / self.decay))
        best = max((found["words"] + found["phrases"]).max(initial=0), 1e-9)
        return {
            **{name: overlap / best for name, overlap in found.items()},
            "recency": self.recency * recency(len(index)),
        }


class RecencyScorer(_Parts):
    """The latest chunks."""

    def parts(self, index: ChunkIndex, recent_ids: np.ndarray) -> dict[str, np.ndarray]:
        """See `Scorer`."""
        return {"recency": recency(len(index))}


class RandomScorer(_Parts):
    """Any chunks, the same ones for the same tokens; to compare with."""

    def __init__(self, seed: int = 0):
        self.seed = seed

    def parts(self, index: ChunkIndex, recent_ids: np.ndarray) -> dict[str, np.ndarray]:
        """See `Scorer`."""
        seeds = [self.seed, len(index), zlib.crc32(np.asarray(recent_ids, np.int64).tobytes())]
        return {"random": np.random.default_rng(seeds).random(len(index))}


def recency(chunks: int) -> np.ndarray:
    """1 for the latest chunk, a half for the one before, then a third and so on, `[N]`."""
    return 1 / np.arange(chunks, 0, -1)


def top_k(scores: np.ndarray, k: int) -> np.ndarray:
    """Indices of the `k` highest scores (or of all), ascending, int64; of equal ones the later."""
    order = np.asarray(scores).argsort(kind="stable")
    return np.sort(order[max(0, len(order) - k) :])
