"""What occurs in which chunk: posting lists of words and phrases, and BM25 over them.

Axes: `N` chunks, `Q` things asked for.

Source: BM25 as in Robertson and Zaragoza, "The Probabilistic Relevance Framework" (2009), idf with one added inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

K1, B = 1.5, 0.75  # saturation of a token's count, weight of a chunk's length
BLOCK = 1024  # chunks a block of posting lists at most: bounds what one merge costs
PHRASE = 3  # tokens


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
        tokens, which = np.unique(query, return_inverse=True)
        if weights is None:
            asked = np.bincount(which).astype(np.float64)
        else:
            asked = np.zeros(len(tokens))
            np.maximum.at(asked, which, weights)
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
            # the postings of all tokens as one array
            ends = sizes.cumsum()
            entries = np.arange(ends[-1]) + np.repeat(block.starts[at] - (ends - sizes), sizes)
            where, counts = block.where[entries], block.counts[entries]
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
