"""The archives of a call's rows: what a compressed past still says word for word, for copying."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from ..types import Chunk, Row
from .archive import Archive

Rebuild = Callable[[Sequence[Chunk]], list[tuple[np.ndarray, np.ndarray]]]


@dataclass(frozen=True, eq=False)
class RowArchive:
    """The archive of one row's compressed tokens.

    Attributes:
        last: the latest chunk in it; None for an empty one.
        archive: their ids.
        ends: archived tokens up to the end of each chunk.
    """

    last: Chunk | None
    archive: Archive
    ends: tuple[int, ...] = ()

    def chunk_of(self, position: int) -> int:
        """Number of the chunk in which an archived token stands."""
        return bisect.bisect_right(self.ends, position)

    def place_in_chunk(self, position: int) -> int:
        """Archived tokens of its chunk before an archived token."""
        chunk = self.chunk_of(position)
        return position - (self.ends[chunk - 1] if chunk else 0)


class Archives:
    """Archives of the rows of one call, extended as their chunks are compressed.

    A row's chunks are shared by the beams that come from it, and so is its archive.

    Args:
        vocab_size: of the host.
        stop_ids: special tokens; never proposed, and no match reaches over one.
        exclude: spans `(start, end)` of a row's tokens that may be read but not repeated.
        rebuild: ids and confidences that stand for chunks; None archives the row's own ids.
    """

    def __init__(
        self,
        vocab_size: int,
        stop_ids: Iterable[int] = (),
        exclude: Sequence[tuple[int, int]] = (),
        rebuild: Rebuild | None = None,
    ):
        self.empty = RowArchive(None, Archive.empty(vocab_size, stop_ids))
        self.exclude, self.rebuild = tuple(exclude), rebuild
        self.aligned = rebuild is None or getattr(rebuild, "aligned", False)
        self._known: dict[int, RowArchive] = {}

    def rows(self, rows: Sequence[Row], input_ids: torch.Tensor, limits: Sequence[int]) -> list[RowArchive]:
        """The archive of each row.

        Args:
            rows: state of the cache.
            input_ids: `[B, T]`.
            limits: tokens of each row that may be archived, the first ones; later ones were generated.
        """
        made: dict[tuple[int, bytes], RowArchive] = {}
        found = [self._row(row, input_ids[i], limits[i], made) for i, row in enumerate(rows)]
        self._known = {id(before.last): before for before in found if before.last is not None}
        return found

    def _row(self, row: Row, ids: torch.Tensor, limit: int, made: dict[tuple[int, bytes], RowArchive]) -> RowArchive:
        # a chunk belongs to one history alone: where its object is known, so is all before it
        done = next((n for n in range(len(row.chunks), 0, -1) if id(row.chunks[n - 1]) in self._known), 0)
        before = self._known[id(row.chunks[done - 1])] if done else self.empty
        chunks = row.chunks[done:]
        if not chunks:
            return before
        text = ids[row.pad + chunks[0].start : row.pad + chunks[-1].end].cpu().numpy()
        key = (id(before), np.array([limit, chunks[0].start, *(c.end for c in chunks)]).tobytes() + text.tobytes())
        if key not in made:  # beams start as equal rows
            made[key] = self._extended(before, chunks, text, limit)
        self._known[id(chunks[-1])] = replace(made[key], last=chunks[-1])
        return self._known[id(chunks[-1])]

    def _extended(self, before: RowArchive, chunks: Sequence[Chunk], text: np.ndarray, limit: int) -> RowArchive:
        """All new chunks at once: each extension of a long archive may sort it anew."""
        first, ends = chunks[0].start, []
        pieces, weights, flags = [], [], []
        archived = [c for c in chunks if c.start < limit and (self.aligned or c.end <= limit)]
        rebuilt = self.rebuild(archived) if self.rebuild else []
        for n, chunk in enumerate(chunks):
            if n < len(archived):
                if self.rebuild:
                    piece, weight = rebuilt[n]
                else:
                    piece = text[chunk.start - first : chunk.end - first]
                    weight = np.ones(len(piece))
                if self.aligned:
                    piece, weight = piece[: limit - chunk.start], weight[: limit - chunk.start]
                pieces.append(piece)
                weights.append(weight)
                flags.append(self._copyable(chunk, len(piece)))
            ends.append(len(before.archive) + sum(map(len, pieces)))
        archive = before.archive
        if pieces:
            flag = np.concatenate(flags)
            archive = archive.extended(
                np.concatenate(pieces),
                np.concatenate(weights) if self.rebuild else None,
                None if flag.all() else flag,
            )
        return RowArchive(chunks[-1], archive, (*before.ends, *ends))

    def _copyable(self, chunk: Chunk, length: int) -> np.ndarray:
        flags = np.ones(length, bool)
        for start, end in self.exclude:
            if start < chunk.end and end > chunk.start:
                if not self.aligned:  # places are not known: nothing of the chunk is repeated
                    return np.zeros(length, bool)
                flags[max(0, start - chunk.start) : max(0, end - chunk.start)] = False
        return flags
