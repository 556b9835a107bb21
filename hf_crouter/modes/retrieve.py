"""Retrieve: the chunks that matter now stand raw again between the compressed past and the window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..errors import InputError
from ..ngram.postings import ChunkIndex
from ..ngram.scorers import QUERY, OverlapScorer, Scorer, top_k
from ..types import Contribution, Parts, Setting


@dataclass(frozen=True)
class Retrieve:
    """Chunks that stand raw again, in order, before the window; nothing is trained and no crouter is needed.

    Attributes:
        chunks: how many; each takes as many slots as it has tokens.
        every: they are chosen at the prompt's end, every so many tokens behind it, and whenever a chunk is compressed.
        scorer: says which ones matter; None: `OverlapScorer`, words and phrases shared with the last tokens.

    Raises:
        InputError: options that do not make a retrieval.

    Example:
        >>> history = CompressedHistory(host, modes=[Retrieve(chunks=4)])
    """

    name: ClassVar[str] = "retrieve"
    gives: ClassVar[tuple[Contribution, ...]] = ("chunks",)

    chunks: int = 2
    every: int = 128
    scorer: Scorer | None = None

    def __post_init__(self):
        if not isinstance(self.chunks, int) or self.chunks < 1:
            raise InputError(f"Retrieve(chunks=): expected a number of chunks, 1 or more, got {self.chunks!r}")
        if not isinstance(self.every, int) or self.every < 1:
            raise InputError(f"Retrieve(every=): expected a number of tokens, 1 or more, got {self.every!r}")
        if self.scorer is not None and not isinstance(self.scorer, Scorer):
            raise InputError(f"Retrieve(scorer=): expected an object with scores(), got {type(self.scorer).__name__}")

    @property
    def needs_crouter(self) -> bool:
        """Whether it can do nothing without a crouter."""
        return False

    @classmethod
    def ready(cls, setting: Setting) -> Retrieve:
        """See `Mode`: always."""
        return cls()

    def bind(self, setting: Setting) -> Parts:
        """See `Mode.bind`."""
        return Parts(retriever=ScoredRetriever(self.chunks, self.every, self.scorer or OverlapScorer()))


@dataclass(frozen=True)
class ScoredRetriever:
    """Chooses the chunks of a row with the highest scores, with the reasons; see `Retriever`.

    Attributes:
        chunks: how many.
        every: see `Retriever`.
        scorer: says how much each one matters.
        query: last tokens of a row that it is given.
    """

    chunks: int
    every: int
    scorer: Scorer
    query: int = QUERY

    def __call__(
        self, index: ChunkIndex | None, new: Sequence[np.ndarray], recent: np.ndarray
    ) -> tuple[ChunkIndex, tuple[int, ...], tuple[dict[str, float], ...]]:
        """See `Retriever`.

        Raises:
            InputError: a scorer that does not give one finite score a chunk.
        """
        index = (index or ChunkIndex()).extended(*new)
        scorer: Any = self.scorer
        parts = scorer.parts(index, recent) if hasattr(scorer, "parts") else {"score": scorer.scores(index, recent)}
        for name, values in parts.items():
            if np.shape(values) != (len(index),) or not np.isfinite(values).all():
                raise InputError(
                    f"scorer: expected {len(index)} finite scores, got {name} of shape {np.shape(values)}"
                )
        chosen = top_k(sum(parts.values(), np.zeros(len(index))), self.chunks).tolist()
        return index, tuple(chosen), tuple({n: float(v[i]) for n, v in parts.items()} for i in chosen)
