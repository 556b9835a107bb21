"""Recall: which compressed chunks matter enough now to be read raw again.

Scores are cheap and depend on a row's tokens alone: lexical overlap with the last tokens (BM25 over token ids and over
phrases of three of them, from posting lists) and recency. Axes: `N` chunks, `F` features.

Source: BM25 as in Robertson and Zaragoza, "The Probabilistic Relevance Framework" (2009), idf with one added inside.
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

from ..described import load_weights, read_description, save_described
from ..errors import InputError

K1, B = 1.5, 0.75  # saturation of a token's count, weight of a chunk's length
QUERY = 512  # last tokens of a row that a scorer is given
BLOCK = 1024  # chunks a block of posting lists at most: bounds what one merge costs
PHRASE = 3  # tokens
DECAY = 16.0  # tokens back at which a token of the query counts 1/e
RECENCY = 0.25  # of the best overlap, that the latest chunk gets on top
NAME = "scorer"
FEATURES = (
    "bm25_128", "bm25_512", "rank_128", "rank_512", "log_bm25_128", "log_bm25_512", "recency", "place", "log_chunks",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Block:
    """Posting lists of a run of chunks.

    Attributes:
        chunks: number of chunks.
        tokens: ids (or hashes of phrases) that occur, ascending, uint32.
        starts: first posting of each token, and the end of the last one's, int32, one longer.
        where: chunk of each posting, counted from the block's first, ascending within a token, uint16.
        counts: how often the token stands in the chunk, uint16.
    """

    chunks: int
    tokens: np.ndarray
    starts: np.ndarray
    where: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, chunks: Sequence[np.ndarray]) -> _Block:
        sizes = [len(chunk) for chunk in chunks]
        keys = np.concatenate(chunks) * len(chunks) + np.repeat(np.arange(len(chunks)), sizes)
        keys, counts = np.unique(keys, return_counts=True)
        return cls._sorted(len(chunks), keys // len(chunks), keys % len(chunks), counts)

    @classmethod
    def merged(cls, a: _Block, b: _Block) -> _Block:
        tokens = np.concatenate([np.repeat(block.tokens, np.diff(block.starts)) for block in (a, b)])
        where = np.concatenate([a.where, b.where + np.uint16(a.chunks)])
        order = tokens.argsort(kind="stable")  # chunks of a token stay in order
        counts = np.concatenate([a.counts, b.counts])
        return cls._sorted(a.chunks + b.chunks, tokens[order], where[order], counts[order])

    @classmethod
    def _sorted(cls, chunks: int, tokens: np.ndarray, where: np.ndarray, counts: np.ndarray) -> _Block:
        starts = np.concatenate([[0], (tokens[1:] != tokens[:-1]).nonzero()[0] + 1]) if len(tokens) else np.zeros(0)
        starts = starts.astype(np.int32)
        counts = counts.clip(max=np.iinfo(np.uint16).max).astype(np.uint16)
        ends = np.append(starts, np.int32(len(tokens)))
        return cls(chunks, tokens[starts].astype(np.uint32), ends, where.astype(np.uint16), counts)

    @property
    def nbytes(self) -> int:
        return self.tokens.nbytes + self.starts.nbytes + self.where.nbytes + self.counts.nbytes


@dataclass(frozen=True, eq=False)
class Postings:
    """Posting lists of chunks; a value: extending it gives another one that shares its memory.

    Attributes:
        blocks: of consecutive chunks, the sizes as in a binary counter, up to `BLOCK`.
        lengths: tokens (or phrases) of each chunk, int32 `[N]`.
    """

    blocks: tuple[_Block, ...] = ()
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))

    def __len__(self) -> int:
        """Number of chunks N."""
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of the lists; what they share with others is counted in full."""
        return self.lengths.nbytes + sum(block.nbytes for block in self.blocks)

    def extended(self, pieces: Sequence[np.ndarray]) -> Postings:
        """With more chunks behind the others; what occurs in each, int64 below 2^32."""
        if not pieces:
            return self
        blocks, done = list(self.blocks), 0
        while done < len(pieces):  # many at once: whole blocks, not one merge after the other
            taken = 1 << min(BLOCK.bit_length() - 1, (len(pieces) - done).bit_length() - 1)
            blocks.append(_Block.of(pieces[done : done + taken]))
            done += taken
            while len(blocks) > 1 and blocks[-2].chunks <= blocks[-1].chunks:
                if blocks[-2].chunks + blocks[-1].chunks > BLOCK:
                    break
                last = blocks.pop()
                blocks.append(_Block.merged(blocks.pop(), last))
        lengths = np.array([len(piece) for piece in pieces], np.int32)
        return Postings(tuple(blocks), np.concatenate([self.lengths, lengths]))

    def bm25(self, query: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        """BM25 of every chunk, float64 `[N]`.

        Args:
            query: what is asked for, int64 `[Q]`.
            weights: how much each counts, `[Q]`; of what stands twice the higher one. None: once for each time.
        """
        scores, total = np.zeros(len(self)), len(self)
        if not total or not len(query):
            return scores
        tokens, places = np.unique(query, return_inverse=True)
        asked = np.bincount(places).astype(np.float64)
        if weights is not None:
            asked[:] = 0
            np.maximum.at(asked, places, weights)
        tokens = tokens.astype(np.uint32)
        found, occurs = [], np.zeros(len(tokens), np.int64)
        for block in self.blocks:
            at = block.tokens.searchsorted(tokens)
            at[at == len(block.tokens)] = 0  # some other token than the one asked for
            at = np.where(block.tokens[at] == tokens, at, -1) if len(block.tokens) else np.full(len(tokens), -1)
            sizes = np.where(at >= 0, block.starts[at + 1] - block.starts[at], 0)
            occurs += sizes
            found.append((block, at, sizes))
        asked = asked * np.log1p((total - occurs + 0.5) / (occurs + 0.5)) * (K1 + 1)
        mean = max(float(self.lengths.mean()), 1.0)
        norms, first = K1 * (1 - B + B * self.lengths / mean), 0
        for block, at, sizes in found:
            # the postings of all tokens as one array of places
            ends = sizes.cumsum()
            places = np.arange(ends[-1]) + np.repeat(block.starts[at] - (ends - sizes), sizes)
            where, counts = block.where[places], block.counts[places]
            last = first + block.chunks
            parts = np.repeat(asked, sizes) * (counts / (counts + norms[first:last][where]))
            scores[first:last] = np.bincount(where, parts, minlength=block.chunks)
            first = last
        return scores


@dataclass(frozen=True, eq=False)
class ChunkIndex:
    """What occurs in one row's chunks; a value: extending it gives another one that shares its memory.

    Attributes:
        words: posting lists of token ids.
        phrases: of hashes of `PHRASE` tokens in a row.
    """

    words: Postings = Postings()
    phrases: Postings = Postings()

    def __len__(self) -> int:
        """Number of chunks N."""
        return len(self.words)

    @property
    def nbytes(self) -> int:
        """Bytes of the index; what it shares with others is counted in full."""
        return self.words.nbytes + self.phrases.nbytes

    def extended(self, *chunks: np.ndarray) -> ChunkIndex:
        """With more chunks behind the others; token ids, integers `[tokens]` each."""
        pieces = [np.asarray(chunk, np.int64) for chunk in chunks]
        return ChunkIndex(self.words.extended(pieces), self.phrases.extended([phrases_of(p) for p in pieces]))

    def bm25(self, query: np.ndarray) -> np.ndarray:
        """BM25 of every chunk over its tokens, float64 `[N]`; a token that the query repeats counts as often.

        Args:
            query: token ids, integers `[tokens]`.
        """
        return self.words.bm25(np.asarray(query, np.int64))


def phrases_of(ids: np.ndarray) -> np.ndarray:
    """Hashes of every `PHRASE` tokens in a row, int64 below 2^32, `[max(tokens - PHRASE + 1, 0)]`."""
    ids = np.asarray(ids, np.int64).astype(np.uint64)
    hashes = np.zeros(max(len(ids) - PHRASE + 1, 0), np.uint64)
    for start in range(PHRASE):
        hashes = (hashes + ids[start : start + len(hashes)] + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    return (hashes >> np.uint64(32)).astype(np.int64)


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
        save_described(folder, NAME, self, self.config, torch.float32)

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
