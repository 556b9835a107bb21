"""Recall: which compressed chunks matter enough now to be read raw again.

Scores are cheap and depend on a row's tokens alone: lexical overlap with the last tokens (BM25 over token ids and over
phrases of three of them, from posting lists) and recency. Axes: `N` chunks, `F` features.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..errors import InputError
from ..utils.module_io import load_weights, read_description, save_module
from .postings import ChunkIndex, phrases_of

QUERY = 512  # last tokens of a row that a scorer is given
DECAY = 16.0  # tokens back at which a token of the query counts 1/e
RECENCY = 0.25  # of the best overlap, that the latest chunk gets on top
NAME = "scorer"
FEATURES = (
    "bm25_128", "bm25_512", "rank_128", "rank_512", "log_bm25_128", "log_bm25_512", "recency", "place", "log_chunks",
)  # fmt: skip


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


def features(index: ChunkIndex, recent_ids: np.ndarray) -> np.ndarray:
    """What a learned scorer sees of each chunk, float32 `[N, F]`, in the order of `FEATURES`; see `Scorer.scores`."""
    chunks = len(index)
    columns, logs, ranks = [], [], []
    for last in (128, 512):
        overlap = index.bm25(recent_ids[-last:])
        columns.append(overlap / max(overlap.max(initial=0), 1e-9))
        order = overlap.argsort(kind="stable").argsort()
        ranks.append(order / max(chunks - 1, 1))
        logs.append(np.log1p(overlap) / 5)
    columns += [*ranks, *logs, recency(chunks), np.arange(1, chunks + 1) / max(chunks, 1)]
    return np.stack([*columns, np.full(chunks, math.log1p(chunks) / 8)], axis=1).astype(np.float32)


@dataclass(frozen=True)
class ScorerConfig:
    """What a learned scorer reads and where it comes from.

    Attributes:
        hidden_size: width of its one hidden layer.
        features: names of what it sees of a chunk.
        training: record of the fit.
    """

    hidden_size: int = 16
    features: tuple[str, ...] = FEATURES
    training: dict[str, Any] = field(default_factory=dict)


class LearnedScorer(nn.Module):
    """A small network over `features`, fitted on what recalling a chunk gained (`hf_crouter.training.scorer`)."""

    def __init__(self, config: ScorerConfig | None = None):
        super().__init__()
        self.config = config or ScorerConfig()
        self.up = nn.Linear(len(self.config.features), self.config.hidden_size)
        self.down = nn.Linear(self.config.hidden_size, 1)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Features `[N, F]` to scores `[N]`."""
        return self.down(F.gelu(self.up(inputs), approximate="tanh"))[:, 0]

    @torch.no_grad()
    def parts(self, index: ChunkIndex, recent_ids: np.ndarray) -> dict[str, np.ndarray]:
        """See `Scorer`; in NumPy, as a product so small costs torch mostly the waking of its threads."""
        up, bias, down, shift = (value.float().cpu().numpy() for value in self.parameters())
        hidden = features(index, recent_ids) @ up.T + bias
        hidden *= 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * hidden * (1 + 0.044715 * hidden * hidden)))
        return {"learned": (hidden @ down.T + shift)[:, 0].astype(np.float64)}

    def scores(self, index: ChunkIndex, recent_ids: np.ndarray) -> np.ndarray:
        """See `Scorer.scores`."""
        return self.parts(index, recent_ids)["learned"]

    def save(self, folder: str | Path) -> None:
        """Writes `scorer.safetensors` and `scorer.json`, the JSON, with a checksum, last."""
        save_module(folder, NAME, self, self.config, torch.float32)

    @classmethod
    def load(cls, folder: str | Path) -> LearnedScorer:
        """Reads what `save` wrote.

        Raises:
            InputError: missing, truncated or altered files, or a scorer of another version's features.
        """
        config, checksum = read_description(
            folder, NAME, lambda record: ScorerConfig(**{**record, "features": tuple(record["features"])})
        )
        if config.features != FEATURES:
            raise InputError(
                f"{Path(folder) / NAME}.json: expected a scorer of this version's {len(FEATURES)} features, "
                f"got one of {', '.join(config.features)}"
            )
        scorer = cls(config)
        load_weights(folder, NAME, scorer, checksum)
        return scorer.eval()


def make_scorer(scorer: Scorer | str | os.PathLike | None) -> Scorer:
    """The scorer itself, the learned one in a folder, or `OverlapScorer` for None.

    Raises:
        InputError: something that gives no scores, or a folder that holds no scorer of this version.
    """
    if scorer is None:
        return OverlapScorer()
    if isinstance(scorer, str | os.PathLike):
        return LearnedScorer.load(os.fspath(scorer))
    if not isinstance(scorer, Scorer):
        raise InputError(f"scorer: expected a folder or an object with scores(), got {type(scorer).__name__}")
    return scorer


def choose(scores: np.ndarray, k: int) -> np.ndarray:
    """Indices of the `k` highest scores (or of all), ascending, int64; of equal ones the later."""
    order = np.asarray(scores).argsort(kind="stable")
    return np.sort(order[max(0, len(order) - k) :])


class Recall:
    """Chooses the `k` chunks of a row that come back raw, with the reasons.

    Args:
        k: chunks.
        scorer: says how much each one matters.
    """

    query = QUERY

    def __init__(self, k: int, scorer: Scorer | None = None):
        self.k, self.scorer = k, scorer or OverlapScorer()

    def __call__(
        self, index: ChunkIndex | None, new: Sequence[np.ndarray], recent: np.ndarray
    ) -> tuple[ChunkIndex, tuple[int, ...], tuple[dict[str, float], ...]]:
        """The index with the new chunks in it, the numbers of those chosen, ascending, and the parts of their scores.

        Args:
            index: of the chunks before; None at first.
            new: token ids of the chunks since then, integers `[tokens]` each.
            recent: last tokens of the row, int64, at most `QUERY`.

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
        chosen = choose(sum(parts.values(), np.zeros(len(index))), self.k).tolist()
        return index, tuple(chosen), tuple({n: float(v[i]) for n, v in parts.items()} for i in chosen)
