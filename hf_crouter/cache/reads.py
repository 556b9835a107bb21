"""Entries made from the host's own reading: chunks that leave the window are read once more, with what follows them.

A row's new chunks are cut into blocks of at most `Compressor.block` tokens. The reads of a row are: the raw prefix;
behind it stand the entries of earlier chunks; then block after block, and last the `window` tokens that follow the
last chunk, each read over the entries and the raw block before it. As soon as a read is done, the block before it is
compressed from its keys, its values and the queries of that read, and its raw slots make room for the entries. So
what is raw at any time is two blocks, and all of it is a function of the row's tokens: never of beams, drafts or of
how decoding was cut. The same happens at a prompt's end (many blocks) and while decoding (one chunk).

Everything keeps its true position. Rows whose reads have equal shapes are read together; equal rows (beams) once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import DynamicCache

from ..hosts.attention import Caught, caught_queries
from ..hosts.devices import input_device
from ..types import Chunk, ChunkRead, Compressor, Entries, LayerRead, Row
from .layout import entry_codes, row_experts
from .masks import layer_masks, sliding_layers, slot_positions
from .policy import ContextPolicy, ids_key

ROWS = 8  # read together

Layer = tuple[torch.Tensor, torch.Tensor]


@dataclass
class _Reading:
    """One row's reads, under way.

    Attributes:
        row: with every chunk; those of earlier calls have entries.
        ids: the row's tokens, `[T]`.
        pieces: spans of tokens still to be read, in order; the first one is the prefix.
        blocks: the chunks of each piece by number; none in the prefix and in what follows the last chunk.
        codes: of the slots that stand there now.
        layers: keys and values of these slots, `[heads, S, D]` each.
        waiting: the block that was read last and is not compressed yet.
    """

    row: Row
    ids: torch.Tensor
    pieces: list[tuple[int, int]]
    blocks: list[tuple[int, ...]]
    codes: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    layers: list[Layer] = field(default_factory=list)
    waiting: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, int, bool]:
        """Slots there are, tokens that come next, and whether a block waits for them."""
        first, end = self.pieces[0]
        return len(self.codes), end - first, bool(self.waiting)


@torch.no_grad()
def entries_by_reading(
    host: Any, policy: ContextPolicy, rows: Sequence[Row], tokens: Sequence[torch.Tensor]
) -> list[Row]:
    """The rows with entries for every chunk.

    Args:
        host: the plain host.
        policy: its rule; its compressor has a `block`.
        rows: with every chunk that their tokens call for, routed.
        tokens: each row's decided tokens without padding, `[T]`.

    Raises:
        InputError: a host whose attention hides its queries.
    """
    readings: dict[Any, _Reading] = {}
    keys = []
    for row, ids in zip(rows, tokens, strict=True):
        missing = [n for n, chunk in enumerate(row.chunks) if chunk.entries is None]
        if not missing:
            keys.append(None)
            continue
        end = policy.compressed_at(row.chunks[-1], ids)
        made = tuple(id(chunk.entries) for chunk in row.chunks[: missing[0]])  # with them, all of the row before
        keys.append((made, row.prefix, tuple(row.chunks[n].end for n in missing), ids_key(ids[:end].cpu())))
        if keys[-1] not in readings:
            blocks = _blocks(row, missing, policy.compressor.block)  # pyright: ignore[reportOptionalMemberAccess]
            pieces = [(row.chunks[block[0]].start, row.chunks[block[-1]].end) for block in blocks]
            pieces = [(0, row.prefix or 0), *pieces, (row.chunks[-1].end, end)]
            readings[keys[-1]] = _Reading(row, ids, pieces, [(), *blocks, ()])
    open_readings = list(readings.values())
    while open_readings:
        groups: dict[tuple[int, int, bool], list[_Reading]] = {}
        for reading in open_readings:
            groups.setdefault(reading.shape, []).append(reading)
        for group in groups.values():
            for first in range(0, len(group), ROWS):
                _read(host, policy, group[first : first + ROWS])
        open_readings = [reading for reading in open_readings if reading.pieces]
    found = []
    for key, row in zip(keys, rows, strict=True):
        if key is not None:
            done = readings[key].row.chunks
            chunks = (chunk if chunk.entries is not None
                      else replace(chunk, entries=done[n].entries, decided_at=done[n].decided_at)
                      for n, chunk in enumerate(row.chunks))  # fmt: skip
            row = replace(row, chunks=tuple(chunks))
        found.append(row)
    return found


def _blocks(row: Row, missing: Sequence[int], most: int) -> list[tuple[int, ...]]:
    """The missing chunks in runs of at most `most` tokens, one chunk at least."""
    blocks: list[tuple[int, ...]] = []
    for number in missing:
        if blocks and row.chunks[number].end - row.chunks[blocks[-1][0]].start <= most:
            blocks[-1] = (*blocks[-1], number)
        else:
            blocks.append((number,))
    return blocks


def _read(host: Any, policy: ContextPolicy, group: Sequence[_Reading]) -> None:
    """One forward of the next piece of each reading, and what can be compressed after it."""
    first, new, wanted = group[0].shape
    if new:
        spans = [reading.pieces[0] for reading in group]
        ids = torch.stack([r.ids[a:b] for r, (a, b) in zip(group, spans, strict=True)])
        codes = torch.stack([torch.cat([r.codes, torch.arange(a, b)]) for r, (a, b) in zip(group, spans, strict=True)])
        past = _stacked(group)
        caught = _forward(host, policy, group, ids, codes, past, wanted)
        for i, reading in enumerate(group):
            reading.codes = codes[i]
            reading.layers = [(layer.keys[i], layer.values[i]) for layer in past.layers]  # pyright: ignore
        if caught is not None:
            _compress(host, policy, group, caught, first)
    for reading in group:
        end = reading.pieces.pop(0)[1]
        reading.waiting = reading.blocks.pop(0)
        if end == (reading.row.prefix or 0) and reading.pieces and not reading.waiting:
            _put_known(host, reading)


def _stacked(group: Sequence[_Reading]) -> Any:
    """A cache that keeps all it is given, with what stands there of each reading."""
    past: Any = DynamicCache()
    if group[0].layers:
        for number in range(len(group[0].layers)):
            keys, values = (torch.stack([r.layers[number][k] for r in group]) for k in (0, 1))
            past.update(keys, values, number)
    return past


def _forward(
    host: Any,
    policy: ContextPolicy,
    group: Sequence[_Reading],
    ids: torch.Tensor,
    codes: torch.Tensor,
    past: Any,
    wanted: bool,
) -> Caught | None:
    device, new = input_device(host), ids.shape[1]
    positions = slot_positions(codes, True)[:, -new:].to(device)
    mask: Any = torch.ones_like(codes).to(device)
    if any(sliding_layers(host)):
        mask = layer_masks(host, past, codes, new, device, positions)
    served = torch.stack([row_experts(r.row, row)[-new:] for r, row in zip(group, codes, strict=True)])
    inputs = {"input_ids": ids.to(device), "past_key_values": past, "attention_mask": mask, "position_ids": positions}
    with policy.serving(served):
        if not wanted:
            host.base_model(**inputs, use_cache=True)
            return None
        with caught_queries(host) as caught:
            host.base_model(**inputs, use_cache=True)
    return caught


def _compress(host: Any, policy: ContextPolicy, group: Sequence[_Reading], caught: Caught, read: int) -> None:
    """Gives the waiting blocks their entries, which take the place of their raw slots.

    Args:
        host: the plain host.
        policy: its rule.
        group: readings that have just read a piece over their waiting block.
        caught: the queries of that piece.
        read: slots before the piece.
    """
    compressor: Compressor = policy.compressor  # pyright: ignore[reportAssignmentType]
    slides = sliding_layers(host)
    reads: list[ChunkRead] = []
    for i, reading in enumerate(group):
        layers = tuple(
            None if slides[n] else LayerRead(keys, values, caught.queries[n][i], caught.scaling[n])
            for n, (keys, values) in enumerate(reading.layers)
        )
        block = reading.row.chunks[reading.waiting[0]].start
        size = reading.row.chunks[reading.waiting[-1]].end - block
        for number in reading.waiting:
            chunk = reading.row.chunks[number]
            at = read - size + chunk.start - block
            reads.append(ChunkRead(chunk, (at, at + chunk.end - chunk.start), layers))
    entries = iter(compressor.compress(reads))
    for reading in group:
        chunks = list(reading.row.chunks)
        size = chunks[reading.waiting[-1]].end - chunks[reading.waiting[0]].start
        end = reading.pieces[0][1]
        for number in reading.waiting:
            chunks[number] = replace(chunks[number], entries=next(entries), decided_at=end)
        reading.row = replace(reading.row, chunks=tuple(chunks))
        _replace(reading, read - size, read, [chunks[number] for number in reading.waiting], reading.waiting)


def _put_known(host: Any, reading: _Reading) -> None:
    """Behind the prefix, the entries of earlier chunks."""
    known = [n for n, chunk in enumerate(reading.row.chunks) if chunk.entries is not None]
    if not known:
        return
    if not reading.layers:  # no prefix
        reading.layers = [_empty(host, known_keys) for known_keys in _keys_by_layer(reading.row.chunks[known[0]])]
    _replace(reading, len(reading.codes), len(reading.codes), [reading.row.chunks[n] for n in known], tuple(known))


def _keys_by_layer(chunk: Chunk) -> list[torch.Tensor | None]:
    return list(chunk.entries.keys or ()) if chunk.entries is not None else []


def _empty(host: Any, like: torch.Tensor | None) -> Layer:
    if like is None:  # a sliding layer: any shape would do if the host's other layers did not say it
        config = host.config.get_text_config(decoder=True)
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        like = torch.empty(heads, 0, size, device=input_device(host), dtype=host.dtype)
    return like[:, :0], like[:, :0]


def _replace(reading: _Reading, first: int, end: int, chunks: Sequence[Chunk], numbers: Sequence[int]) -> None:
    """Entries of chunks in place of the slots from `first` to `end`."""
    some: list[Entries] = [chunk.entries for chunk in chunks if chunk.entries is not None]
    counts = [len(entries) for entries in some]
    reading.codes = torch.cat([reading.codes[:first], entry_codes(numbers, counts), reading.codes[end:]])
    count = sum(counts)
    for number, (old_keys, old_values) in enumerate(reading.layers):
        keys = _joined([e.keys[number] for e in some if e.keys is not None], old_keys, count)
        values = _joined([e.values[number] for e in some if e.values is not None], old_values, count)
        reading.layers[number] = (
            torch.cat([old_keys[:, :first], keys, old_keys[:, end:]], 1),
            torch.cat([old_values[:, :first], values, old_values[:, end:]], 1),
        )


def _joined(parts: Sequence[torch.Tensor | None], like: torch.Tensor, count: int) -> torch.Tensor:
    """Keys or values of entries one after the other, `[heads, count, D]`; zeros of a layer that keeps none."""
    known = [part.to(like.device, like.dtype) for part in parts if part is not None]
    return torch.cat(known, 1) if known else like.new_zeros(like.shape[0], count, like.shape[2])
