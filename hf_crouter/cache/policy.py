"""How a host reads its past: which tokens stay raw, where chunks are cut, what stands for them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..chunking import Chunker
from ..compressors.projector import Projector
from ..crouter import CRouterModel
from ..errors import InputError, MismatchError
from ..routing.adapters import AdapterStack
from ..types import Choice, Chooser, Chunk, ChunkRouter, Row, WindowRoute

ENCODE_BATCH = 8


@dataclass(frozen=True, eq=False)
class ContextPolicy:
    """The rule that turns a row's tokens into `[raw prefix | chunks | recalled chunks, raw | raw window]`.

    Attributes:
        window: fewest raw tokens after the last compressed chunk.
        chunker: cuts the chunks.
        prefix: tokens of a row to keep raw at its start, from its ids so far; None where that cannot be told yet.
        crouter: encodes the chunks; None where they are dropped.
        projector: makes soft prompts of the latents; None where chunks are dropped.
        retrieve: compressed chunks that also stand raw before the window.
        every: they are chosen anew at every multiple of so many tokens of the row, at the prompt's end and whenever
            a chunk is compressed.
        chooser: chooses them; needed where `retrieve` is not 0.
        router: finds the expert of every chunk and of the raw window; None without experts.
        adapters: the experts' adapters of the host, in the router's order.
        experts: what tells the experts from others.
    """

    window: int
    chunker: Chunker
    prefix: Callable[[list[int]], int | None]
    crouter: CRouterModel | None = None
    projector: Projector | None = None
    retrieve: int = 0
    every: int = 128
    chooser: Chooser | None = None
    router: ChunkRouter | None = None
    adapters: AdapterStack | None = None
    experts: tuple[str, ...] = ()

    @property
    def num_latents(self) -> int:
        """Slots a compressed chunk takes, M; 0 where chunks are dropped."""
        return self.projector.config.num_latents if self.projector is not None else 0

    @property
    def origin(self) -> tuple[Any, ...]:
        """What a cache's slots depend on: the projector's description (it names the crouter), cuts and experts."""
        made = self.projector.config if self.projector is not None else None
        return made, self.chunker.chunk_length, self.chunker.same_tokenizer, self.experts

    @property
    def fewest(self) -> int:
        """Fewest tokens of a row, its prefix not counted, at which a chunk can be compressed."""
        return self.window + (self.chunker.chunk_length if self.chunker.same_tokenizer else 1)

    @property
    def lookahead(self) -> int:
        """Tokens after a chunk that may have decided where it ends."""
        return 0 if self.chunker.same_tokenizer else self.chunker.chunk_length

    def extend(self, row: Row, ids: torch.Tensor) -> Row:
        """The row with every chunk that its tokens call for, soft prompts not made yet.

        A chunk is compressed as soon as `window` tokens follow it: a function of the tokens alone, so prefill and
        stepwise generation agree.

        Args:
            row: its state before.
            ids: the row's tokens without padding, drafts excluded, `[T]`.
        """
        if len(ids) < self.fewest and row.prefix is None:
            return row
        if row.prefix is None:
            prefix = self.prefix(ids.tolist())
            if prefix is None:
                return row
            row = replace(row, prefix=prefix)
        while True:
            start = row.raw_start
            if row.pending is None and (len(ids) - start) // self.chunker.step > row.probed // self.chunker.step:
                # one copy to the host a call, and none in most steps
                chunks, base = list(row.chunks), start
                for (first, end), piece, mask in self._cut(ids[base:]):
                    found = Chunk(base + first, base + end, piece[mask.bool()])
                    if len(ids) - found.end < self.window:
                        row = replace(row, pending=found)
                        break
                    chunks.append(found)
                row = replace(row, chunks=tuple(chunks))
                row = replace(row, probed=len(ids) - row.raw_start)
            if row.pending is None or len(ids) - row.pending.end < self.window:
                return row
            row = replace(row, chunks=(*row.chunks, row.pending), pending=None, probed=0)

    def _cut(self, ids: torch.Tensor):
        chunks = self.chunker.chunk(ids.tolist())
        return zip(chunks.spans, chunks.input_ids, chunks.attention_mask, strict=True)

    def choose(self, row: Row, ids: torch.Tensor) -> Row:
        """The row with the chunks that its tokens up to the last anchor recall.

        Anchors are the row's lengths at which a choice is made: a function of the tokens and of where the prompt ends,
        so prefill, stepwise generation, beams and one-pass scores agree.

        Args:
            row: its chunks, as `extend` gives them.
            ids: the row's tokens without padding, drafts excluded, `[T]`.

        Raises:
            InputError: scores that do not fit the chunks.
        """
        if not self.retrieve or self.chooser is None or not row.chunks:
            return row
        at = len(ids) - len(ids) % self.every
        last = row.choices[-1] if row.choices else None
        if last is not None and last.count == len(row.chunks) and last.at >= min(row.prompt, len(ids)):
            at = max(at, last.at)
            if at == last.at:
                return row
        else:
            at = max(at, self._settled_at(row, ids))
        indexed = 0 if row.index is None else len(row.index)
        new = [ids[chunk.start : chunk.end].cpu().numpy() for chunk in row.chunks[indexed:]]
        recent = ids[max(0, at - self.chooser.query) : at].cpu().numpy()
        index, chosen, scores = self.chooser(row.index, new, recent)
        return replace(row, index=index, choices=(*row.choices, Choice(at, len(row.chunks), chosen, scores)))

    def route(self, rows: Sequence[Row], ids: Sequence[torch.Tensor]) -> list[Row]:
        """The rows with the expert of every chunk, and of the raw window.

        A chunk's is decided once, when it is compressed. The window's is decided on its last tokens, at the prompt's
        end and whenever a chunk is compressed: a function of the tokens alone, like all that a row holds.

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
                    wanted.setdefault(_key(chunk.ids), chunk.ids)  # beams share theirs
            anchors.append(None)
            last = row.routes[-1] if row.routes else None
            if last is None or last.count != len(row.chunks) or last.at < min(row.prompt, len(tokens)):
                at = self._settled_at(row, tokens)
                start = row.chunks[-1].end if row.chunks else 0
                piece = self._evidence(tokens[max(start, at - 2 * self.chunker.chunk_length) : at])
                anchors[-1] = at, piece
                wanted.setdefault(_key(piece), piece)
        found = {key: torch.full((len(self.router.names) + 1, 2), torch.nan) for key in wanted}
        judged = {key: piece for key, piece in wanted.items() if len(piece) >= max(self.router.fewest, 1)}
        if judged:
            self._check_ids(list(judged.values()))
            found |= dict(zip(judged, self.router.reconstruction_nlls(list(judged.values())), strict=True))
        return [self._routed(row, anchor, found) for row, anchor in zip(rows, anchors, strict=True)]

    def _routed(
        self, row: Row, anchor: tuple[int, torch.Tensor] | None, reconstruction_nlls: dict[bytes, torch.Tensor]
    ) -> Row:
        decide, previous, chunks = self.router.decide, None, []  # pyright: ignore[reportOptionalMemberAccess]
        for chunk in row.chunks:
            if chunk.route is None:
                chunk = replace(chunk, route=decide(reconstruction_nlls[_key(chunk.ids)], len(chunk.ids), previous))
            previous = chunk.route.number  # pyright: ignore[reportOptionalMemberAccess]
            chunks.append(chunk)
        row = replace(row, chunks=tuple(chunks))
        if anchor is not None:
            at, piece = anchor
            found = WindowRoute(at, len(chunks), decide(reconstruction_nlls[_key(piece)], len(piece), previous))
            row = replace(row, routes=(*row.routes, found))
        return row

    def _evidence(self, ids: torch.Tensor) -> torch.Tensor:
        """At most the last chunk's worth of a row's tokens, as crouter ids on the CPU."""
        if self.chunker.same_tokenizer:
            return ids[-self.chunker.chunk_length :].cpu()
        chunks = self.chunker.chunk(ids.tolist(), final=True)
        pieces = [piece[mask.bool()] for piece, mask in zip(chunks.input_ids, chunks.attention_mask, strict=True)]
        return max(pieces[-2:], key=len, default=torch.empty(0, dtype=torch.long))  # the last one may be a short rest

    def serving(self, experts: torch.Tensor) -> contextlib.AbstractContextManager[None]:
        """A block in which the host's forward reads slots under these adapters, `[B, slots]`."""
        return self.adapters.using(experts) if self.adapters is not None else contextlib.nullcontext()

    def serve(self, experts: torch.Tensor | None) -> None:
        """The same from now on, until None."""
        if self.adapters is not None:
            self.adapters.choose(experts)

    def _settled_at(self, row: Row, ids: torch.Tensor) -> int:
        """Tokens of the row at which its chunks were what they are: the prompt's end, or the last compaction."""
        at = min(row.prompt, len(ids))
        return max(at, self._compressed_at(row.chunks[-1], ids)) if row.chunks else at

    def next_choice(self, row: Row, length: int) -> int:
        """Tokens of the row, more than `length`, at which recall is chosen anew if no chunk is compressed before."""
        return (length // self.every + 1) * self.every if self.retrieve and row.chunks else sys.maxsize

    def _compressed_at(self, chunk: Chunk, ids: torch.Tensor) -> int:
        """Tokens of the row at which a chunk was compressed."""
        length = chunk.end + self.window
        if self.chunker.same_tokenizer:
            return length
        # after a short window it may not have been known yet where the chunk ends
        step, known = self.chunker.step, ids.tolist()
        while length < len(ids) and self.chunker.next_chunk(known[:length], chunk.start) is None:
            length += step - (length - chunk.start) % step
        return min(length, len(ids))

    def fill(self, rows: Sequence[Row], device: torch.device, dtype: torch.dtype) -> tuple[Row, ...]:
        """The rows with soft prompts for every chunk; equal chunks (of beams) are encoded once.

        Raises:
            InputError: latents that are not finite.
            MismatchError: ids outside the crouter's vocabulary.
        """
        if self.num_latents == 0:
            return tuple(rows)
        wanted: dict[bytes, tuple[Chunk, str]] = {}
        for r, row in enumerate(rows):
            for c, chunk in enumerate(row.chunks):
                if chunk.soft is None:
                    wanted.setdefault(_key(chunk.ids), (chunk, f"chunk {c} of row {r}"))
        if not wanted:
            return tuple(rows)
        made, items = {}, list(wanted.items())
        for first in range(0, len(items), ENCODE_BATCH):
            batch = items[first : first + ENCODE_BATCH]
            soft = self._soft_prompts([value for _, value in batch]).to(device, dtype)
            made.update({key: prompts for (key, _), prompts in zip(batch, soft, strict=True)})
        filled = []
        for row in rows:
            chunks = (c if c.soft is not None else replace(c, soft=made[_key(c.ids)]) for c in row.chunks)
            filled.append(replace(row, chunks=tuple(chunks)))
        return tuple(filled)

    def _soft_prompts(self, items: list[tuple[Chunk, str]]) -> torch.Tensor:
        crouter: Any = self.crouter
        projector: Any = self.projector
        ids = torch.nn.utils.rnn.pad_sequence([chunk.ids for chunk, _ in items], batch_first=True)
        self._check_ids([ids])
        mask = torch.arange(ids.shape[1]) < torch.tensor([len(chunk.ids) for chunk, _ in items])[:, None]
        latents = crouter.encode(ids.to(crouter.device), None if mask.all() else mask.to(crouter.device))
        finite = latents.isfinite().flatten(1).all(1).tolist()
        if not all(finite):
            chunk, name = items[finite.index(False)]
            raise InputError(
                f"latents: expected finite numbers, got others in {name} (tokens {chunk.start} to {chunk.end})"
            )
        return projector(latents.to(projector.scale.device))

    def _check_ids(self, pieces: Sequence[torch.Tensor]) -> None:
        most, size = max((int(ids.max()) for ids in pieces if ids.numel()), default=0), self.crouter.config.vocab_size  # pyright: ignore
        if most >= size:
            raise MismatchError(f"tokenizer: expected ids below {size} (the crouter's), got {most}")


def _key(ids: torch.Tensor) -> bytes:
    return ids.numpy().tobytes()
