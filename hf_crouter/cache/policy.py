"""What a row's tokens call for: which stay raw, where chunks are cut, which come back raw, which adapters serve."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from ..chunking import Chunker
from ..types import Adapters, Chunk, ChunkRouter, Compressor, Retrieval, Retriever, Row, WindowRoute


@dataclass(frozen=True, eq=False)
class ContextPolicy:
    """The rule that turns a row's tokens into prefix, chunks, retrieved chunks and raw window.

    All that it decides is a function of the row's tokens and of where its prompt ends, so prefill, stepwise
    generation, beams and one-pass scores agree.

    Attributes:
        window: fewest raw tokens after the last compressed chunk.
        chunker: cuts the chunks.
        prefix: tokens of a row to keep raw at its start, from its first ids.
        compressor: makes entries of the chunks; None where they are dropped.
        retriever: chooses the chunks that stand raw again; None where none do.
        router: finds the expert of every chunk and of the raw window; None without experts.
        adapters: the experts' adapters of the host, in the router's order.
        adapters_key: what tells these experts from others.
        positions: that the host has for keys; a longer row with pairs is compact. None: every row stays at true ones.
        budget: bytes that a call may take beyond the host's weights; None: any number.
    """

    window: int
    chunker: Chunker
    prefix: Callable[[list[int]], int]
    compressor: Compressor | None = None
    retriever: Retriever | None = None
    router: ChunkRouter | None = None
    adapters: Adapters | None = None
    adapters_key: tuple[str, ...] = ()
    positions: int | None = None
    budget: int | None = None

    @property
    def most_entries(self) -> int:
        """Most slots that a compressed chunk takes; 0 where chunks are dropped."""
        return self.compressor.most if self.compressor is not None else 0

    @property
    def true_positions(self) -> bool:
        """Whether tokens keep their positions while these fit the host, see `Compressor.reads`."""
        return self.compressor is not None and self.compressor.reads

    @property
    def beside_raw(self) -> bool:
        """Whether a chunk's entries are read while it also stands raw."""
        return getattr(self.compressor, "beside_raw", False)

    @property
    def key(self) -> object:
        """What a cache's slots depend on: what makes entries, cuts and experts."""
        made = self.compressor.key if self.compressor is not None else None
        return made, self.chunker.chunk_length, self.chunker.same_tokenizer, self.adapters_key

    @property
    def fewest(self) -> int:
        """Fewest tokens of a row, its prefix not counted, at which a chunk can be compressed."""
        return self.window + (self.chunker.chunk_length if self.chunker.same_tokenizer else 1)

    def raw_prefix(self, ids: torch.Tensor, prompt: int) -> int:
        """Tokens that stay raw at a row's start: its prompt tells, or the first tokens that could be compressed.

        Args:
            ids: the row's tokens without padding, `[T]`.
            prompt: how many of them are the prompt.
        """
        return self.prefix(ids[: max(prompt, self.fewest)].tolist())

    def changes_at(self, row: Row) -> int:
        """Tokens of a row, in its call, below which it neither compresses another chunk nor chooses others to be raw.

        It may stay as it is beyond that.
        """
        if row.prefix is None:
            return self.fewest
        choices: list[Retrieval | WindowRoute] = [*row.retrievals[-1:], *row.routes[-1:]]
        if any(choice.at < row.prompt for choice in choices):  # its prompt is still being read
            return 0
        if row.pending is not None:
            at = row.pending.end + self.window
        else:
            at = row.raw_start + (row.probed // self.chunker.step + 1) * self.chunker.step
        if self.retriever is not None and row.chunks:
            every = self.retriever.every
            at = min(at, _anchor(row, row.retrievals[-1].at, every) + every if row.retrievals else 0)
        return min(at, self._compact_at(row))

    def extend(self, row: Row, ids: torch.Tensor) -> Row:
        """The row with every chunk that its tokens call for, entries not made yet, and whether it is compact.

        A chunk is compressed as soon as `window` tokens follow it.

        Args:
            row: its state before.
            ids: the row's tokens without padding, drafts excluded, `[T]`.
        """
        if row.end is not None:
            ids = ids[: row.end]
        row = self._chunked(row, ids)
        return replace(row, compact=True) if len(ids) >= self._compact_at(row) else row

    def _compact_at(self, row: Row) -> int:
        """Tokens of a row from which on it is compact; no number where it is, has no chunks, or stays as it is."""
        if self.positions is None or not self.true_positions or row.compact or not row.chunks:
            return sys.maxsize
        return self.positions + 1

    def _chunked(self, row: Row, ids: torch.Tensor) -> Row:
        if row.prefix is None:
            if len(ids) < self.fewest:
                return row
            row = replace(row, prefix=self.raw_prefix(ids, row.prompt))
        while True:
            start = row.raw_start
            if row.pending is None and (len(ids) - start) // self.chunker.step > row.probed // self.chunker.step:
                # one copy to the host a call, and none in most steps
                chunks = list(row.chunks)
                for found in self._cut(ids, start):
                    if len(ids) - found.end < self.window:
                        row = replace(row, pending=found)
                        break
                    chunks.append(found)
                row = replace(row, chunks=tuple(chunks))
                row = replace(row, probed=len(ids) - row.raw_start)
            if row.pending is None or len(ids) - row.pending.end < self.window:
                return row
            row = replace(row, chunks=(*row.chunks, row.pending), pending=None, probed=0)

    def _cut(self, ids: torch.Tensor, start: int):
        known = ids[start:].tolist()
        chunks = self.chunker.chunk(known)
        for (first, end), piece, mask in zip(chunks.spans, chunks.input_ids, chunks.attention_mask, strict=True):
            own = piece[mask.bool()]
            host_ids = own if self.chunker.same_tokenizer else torch.tensor(known[first:end])
            lookahead = 0 if self.chunker.same_tokenizer else self.chunker.chunk_length  # may have decided its end
            yield Chunk(start + first, start + end, own, host_ids, decided_at=start + end + lookahead)

    def retrieve(self, row: Row, ids: torch.Tensor) -> Row:
        """The row with the chunks that its tokens up to the last anchor call back.

        Anchors are the row's lengths at which a choice is made: counted from its prompt's end, so that rows of a batch
        choose in the same step and are read anew in one forward.

        Args:
            row: its chunks, as `extend` gives them.
            ids: the row's tokens without padding, drafts excluded, `[T]`.

        Raises:
            InputError: scores that do not fit the chunks.
        """
        retriever = self.retriever
        if retriever is None or not row.chunks:
            return row
        at = _anchor(row, len(ids), retriever.every)
        last = row.retrievals[-1] if row.retrievals else None
        if last is not None and last.count == len(row.chunks) and last.at >= min(row.prompt, len(ids)):
            at = max(at, last.at)
            if at == last.at:
                return row
        else:
            at = max(at, self._settled_at(row, ids))
        indexed = 0 if row.index is None else len(row.index)
        new = [ids[chunk.start : chunk.end].cpu().numpy() for chunk in row.chunks[indexed:]]
        recent = ids[max(0, at - retriever.query) : at].cpu().numpy()
        index, chosen, scores = retriever(row.index, new, recent)
        made = Retrieval(at, len(row.chunks), chosen, scores)
        return replace(row, index=index, retrievals=(*row.retrievals, made))

    def route(self, rows: Sequence[Row], ids: Sequence[torch.Tensor]) -> list[Row]:
        """The rows with the expert of every chunk, and of the raw window.

        A chunk's is decided once, when it is compressed. The window's is decided on its last tokens, at the prompt's
        end and whenever a chunk is compressed.

        Args:
            rows: their chunks, as `extend` gives them.
            ids: each row's tokens without padding, drafts excluded, `[T]`.
        """
        if self.router is None:
            return list(rows)
        wanted: dict[bytes, torch.Tensor] = {}
        anchors: list[tuple[int, torch.Tensor] | None] = []
        for row, tokens in zip(rows, ids, strict=True):
            for chunk in row.chunks:
                if chunk.route is None:
                    wanted.setdefault(ids_key(chunk.ids), chunk.ids)  # beams share theirs
            anchors.append(None)
            last = row.routes[-1] if row.routes else None
            if last is None or last.count != len(row.chunks) or last.at < min(row.prompt, len(tokens)):
                at = self._settled_at(row, tokens)
                start = row.chunks[-1].end if row.chunks else 0
                piece = self._evidence(tokens[max(start, at - 2 * self.chunker.chunk_length) : at])
                anchors[-1] = at, piece
                wanted.setdefault(ids_key(piece), piece)
        found = {key: torch.full((len(self.router.names) + 1, 2), torch.nan) for key in wanted}
        judged = {key: piece for key, piece in wanted.items() if len(piece) >= max(self.router.fewest, 1)}
        if judged:
            found |= dict(zip(judged, self.router.reconstruction_nlls(list(judged.values())), strict=True))
        return [self._routed(row, anchor, found) for row, anchor in zip(rows, anchors, strict=True)]

    def _routed(self, row: Row, anchor: tuple[int, torch.Tensor] | None, nlls: dict[bytes, torch.Tensor]) -> Row:
        decide, previous, chunks = self.router.decide, None, []  # pyright: ignore[reportOptionalMemberAccess]
        for chunk in row.chunks:
            if chunk.route is None:
                chunk = replace(chunk, route=decide(nlls[ids_key(chunk.ids)], len(chunk.ids), previous))
            previous = chunk.route.number  # pyright: ignore[reportOptionalMemberAccess]
            chunks.append(chunk)
        row = replace(row, chunks=tuple(chunks))
        if anchor is not None:
            at, piece = anchor
            found = WindowRoute(at, len(chunks), decide(nlls[ids_key(piece)], len(piece), previous))
            row = replace(row, routes=(*row.routes, found))
        return row

    def _evidence(self, ids: torch.Tensor) -> torch.Tensor:
        """At most the last chunk's worth of a row's tokens, as crouter ids on the CPU."""
        if self.chunker.same_tokenizer:
            return ids[-self.chunker.chunk_length :].cpu()
        chunks = self.chunker.chunk(ids.tolist(), final=True)
        pieces = [piece[mask.bool()] for piece, mask in zip(chunks.input_ids, chunks.attention_mask, strict=True)]
        return max(pieces[-2:], key=len, default=torch.empty(0, dtype=torch.long))  # the last one may be a short rest

    def serving(self, experts: torch.Tensor | None) -> contextlib.AbstractContextManager[None]:
        """A block in which the host's forward reads slots under these adapters, `[B, slots]`; None: the plain host."""
        return self.adapters.using(experts) if self.adapters is not None else contextlib.nullcontext()

    def serve(self, experts: torch.Tensor | None) -> None:
        """The same from now on, until None."""
        if self.adapters is not None:
            self.adapters.activate(experts)

    def slots(self, row: Row, length: int) -> int:
        """Slots of a row of so many tokens; chunks without entries yet count with the most that they can have."""
        # pairs of a chunk that stands raw are not read, but stay where they are
        aside = set(row.retrieved) if not self.true_positions and not self.beside_raw else set()
        entries = sum(len(chunk.entries) if chunk.entries is not None else self.most_entries
                      for n, chunk in enumerate(row.chunks) if n not in aside)  # fmt: skip
        retrieved = sum(row.chunks[n].end - row.chunks[n].start for n in row.retrieved)
        return (row.prefix or 0) + entries + retrieved + length - row.raw_start

    def next_retrieval(self, row: Row, length: int) -> int:
        """Tokens of the row, more than `length`, at which chunks are retrieved anew if none is compressed before.

        Or at which it becomes compact, if that is before.
        """
        if not row.chunks:
            return sys.maxsize
        compact = self._compact_at(row)
        if self.retriever is None:
            return compact
        return min(compact, _anchor(row, length, self.retriever.every) + self.retriever.every)

    def _settled_at(self, row: Row, ids: torch.Tensor) -> int:
        """Tokens of the row at which its chunks were what they are: the prompt's end, or the last compaction."""
        at = min(row.prompt, len(ids))
        return max(at, self.compressed_at(row.chunks[-1], ids)) if row.chunks else at

    def compressed_at(self, chunk: Chunk, ids: torch.Tensor) -> int:
        """Tokens of the row at which a chunk was compressed."""
        length = chunk.end + self.window
        if self.chunker.same_tokenizer:
            return length
        # after a short window it may not have been known yet where the chunk ends
        step, known = self.chunker.step, ids.tolist()
        while length < len(ids) and self.chunker.next_chunk(known[:length], chunk.start) is None:
            length += step - (length - chunk.start) % step
        return min(length, len(ids))


def _anchor(row: Row, length: int, every: int) -> int:
    """The last anchor of a row of so many tokens."""
    begin = row.prompt if length >= row.prompt else 0
    return length - (length - begin) % every


def ids_key(ids: torch.Tensor) -> bytes:
    """Equal for equal ids `[tokens]` on the CPU."""
    return ids.numpy().tobytes()
