"""A KV cache that knows what stands in each of its slots.

`layout [B, S]` (int64, on the CPU) holds one code a slot (`layout.py`), `experts [B, S]` the adapter under which its
keys and values were made. What `generate` does to the cache (reorder beams, repeat, select, roll back drafts) is
mirrored on that state, so the cache carries all of it.

Key-value pairs of compressed chunks stand before these slots, in each layer so many as it keeps; nowhere else is there
a copy. `pairs.py` knows which stand where.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from transformers import Cache, DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from ..errors import InputError
from ..hosts.rotation import KeyRotation
from ..types import BASE, Row
from .layout import PAD, STALE, entry_chunk
from .pairs import MadePairs, PairPlaces
from .positions import pair_moves

ROOM = 64  # columns for which there is room behind a table that grows


def is_recording(cache: Cache) -> bool:
    """Whether assisted decoding has armed the cache to take drafts back."""
    return any(getattr(layer, "record_past", False) for layer in cache.layers)


class CompressedCache(Cache):
    """State and its mirror; mixed in front of a cache class of transformers.

    Attributes:
        rows: one `Row` for each row of the batch.
        layout: what stands in each slot, `[B, S]`.
        experts: number of the adapter under which each slot was made, `[B, S]`; `BASE` for none.
        ids: the `input_ids [B, width]` that the slots were made from; the last column may not be forwarded yet.
        peak: most slots that ever stood in the cache.
        made_by: key of what made its entries; None where nothing is known yet.
        places: of key-value pairs, before the slots; None where entries are no pairs, or there are none yet.
        room: slots of each layer of a static cache that are kept for pairs.
        quiet: columns of ids below which the rows stay as they are, with one slot more a column.
        step_masks: what was made for the latest forward of one column.
    """

    rows: tuple[Row, ...] = ()
    layout: torch.Tensor = torch.empty(0, 0, dtype=torch.long)
    experts: torch.Tensor = torch.empty(0, 0, dtype=torch.long)
    ids: torch.Tensor = torch.empty(0, 0, dtype=torch.long)
    peak: int = 0
    made_by: object = None
    places: PairPlaces | None = None
    room: tuple[int, ...] = ()
    quiet: int = 0
    step_masks: object = None

    @property
    def width(self) -> int:
        """Columns of `input_ids` that the slots stand for."""
        return self.ids.shape[1]

    @property
    def compressed(self) -> bool:
        """Whether any row holds a compressed chunk."""
        return any(row.chunks for row in self.rows)

    @property
    def has_private_state(self) -> bool:
        """Whether it holds what only its own history can read on: compressed chunks, or slots made under adapters."""
        return self.compressed or bool((self.experts != BASE).any())

    @property
    def is_recurrent(self) -> bool:
        """Whether some layers keep a state beside, or instead of, slots."""
        return any(hasattr(layer, "conv_states") for layer in self.layers)

    @property
    def pair_slots(self) -> int:
        """Slots of pairs, the mean over the layers that keep some, rounded up."""
        return len(self.places) if self.places is not None else 0

    def pairs_before(self, layer: int) -> int:
        """Slots of a layer's pairs."""
        return self.places.width(layer) if self.places is not None else 0

    def add_pairs(self, made: MadePairs, move: Callable[[torch.Tensor, int], torch.Tensor] | None = None) -> None:
        """Puts pairs of new chunks behind those that stand there; all slots go.

        Layer after layer, so that no more than one layer's pairs are held twice.

        Args:
            made: emptied meanwhile.
            move: gives the keys that stand there, `[B, heads, columns, D]`, at other positions, by layer.
        """
        recording = is_recording(self)
        before = self.places or PairPlaces.empty(len(self.rows), made.layers)
        old = [*self._start_anew(), *[None] * made.layers]
        self.places = before.extended(made.counts, self.room)
        for layer in range(made.layers):
            standing, old[layer] = old[layer], None
            if move is not None and standing is not None:
                standing = move(standing[0], layer), standing[1]
            keys, values = self.places.joined(layer, before, standing, made.take(layer))
            standing = None
            if keys is not None and values is not None:
                Cache.update(self, keys, values, layer)
        if recording:
            self.activate_past_recording()
        self._cut(0)

    def move_pairs(self, rotation: KeyRotation, rows: Mapping[int, Row]) -> None:
        """Moves the pairs of rows from true positions to compact ones, once; all slots go.

        Args:
            rotation: of the host.
            rows: by their numbers, with what made their pairs; such as stand at compact positions are left out.
        """
        rows = {n: row for n, row in rows.items() if not self.rows[n].compact}

        def move(keys: torch.Tensor, layer: int) -> torch.Tensor:
            moved = keys.clone()
            for n, row in standing.items():
                by = pair_moves(row, layer)
                some = keys[n, :, : by.shape[-1]]
                moved[n, :, : by.shape[-1]] = rotation.moved(some, by, layer).to(keys.dtype)
            return moved

        standing = {n: row for n, row in rows.items() if self.rows[n].chunks}
        if standing and self.places is not None and self.pair_slots:
            self.add_pairs(MadePairs.none(self.places.layers), move)
        self.rows = tuple(replace(row, compact=True) if n in rows else row for n, row in enumerate(self.rows))

    def drop_slots(self) -> None:
        """Empties all slots; pairs stay."""
        if self.places is None:
            self.clear()
        else:
            self.add_pairs(MadePairs.none(self.places.layers))
        self._cut(0)

    def _start_anew(self) -> list[Layer | None]:
        """Empties the layers; gives the keys and values of pairs that stood there, None where there were none."""
        raise NotImplementedError

    def _pairs_of(self, layer: Any, number: int) -> Layer | None:
        """Keys and values of pairs in a layer, as views."""
        count = self.pairs_before(number)
        if not count or not layer.is_initialized:
            return None
        return layer.keys[:, :, :count], layer.values[:, :, :count]

    def pairs_of_row(self, row: int, layer: int) -> Layer | None:
        """Keys and values `[1, heads, n, D]` of a row's pairs in a layer, as views; None where there are none."""
        if self.places is None or layer >= len(self.layers):
            return None
        count, held = self.places.count(row, layer), cast(list[Any], self.layers)[layer]
        return (held.keys[row : row + 1, :, :count], held.values[row : row + 1, :, :count]) if count else None

    def keep_columns(self, columns: int) -> int:
        """Drops the slots after the first `columns`, or all where that cannot be done; returns how many stay.

        Pairs stay where some chunk is compressed.
        """
        if self.places is not None and not self.compressed:
            self.places, columns = None, 0
            self.clear()
        elif columns == self.layout.shape[1]:
            return columns
        elif (columns or self.places) and all(type(layer) is DynamicLayer for layer in self.layers):
            super().crop(columns - self.layout.shape[1])
        else:
            self.drop_slots()
            columns = 0
        self._cut(columns)
        return columns

    @property
    def in_rows(self) -> bool:
        """Whether its rows can be read in parts."""
        return False

    def part(self, first: int, end: int) -> CompressedCache:
        """Some rows with what stands there; a copy."""
        raise NotImplementedError

    def shed(self, columns: int) -> None:
        """Of a part: leaves nothing but the slots behind the first `columns`."""
        raise NotImplementedError

    def take(self, parts: Sequence[CompressedCache]) -> None:
        """Takes the slots that parts with all rows hold, which are given up."""
        raise NotImplementedError

    def append(self, input_ids: torch.Tensor) -> None:
        """Takes the tokens behind those that the slots stand for, each row's in the window, as `input_ids [B, T]`."""
        codes = self.layout[:, -1:] + torch.arange(1, input_ids.shape[1] - self.width + 1)
        self.layout = _appended(self.layout, codes)
        self.experts = _appended(self.experts, self.experts[:, -1:].expand_as(codes))
        self.ids, self.peak = input_ids, max(self.peak, self.layout.shape[1] + self.pair_slots)

    def _cut(self, columns: int) -> None:
        self.layout, self.experts = self.layout[:, :columns], self.experts[:, :columns]

    def start(self, rows: Sequence[Row], input_ids: torch.Tensor, made_by: object = None) -> None:
        """Sets the state of an empty cache.

        Args:
            rows: what is known of each row.
            input_ids: `[B, T]`, of which nothing stands in the cache yet.
            made_by: key of what makes its entries.
        """
        self.rows, self.made_by, self.ids, self.quiet = tuple(rows), made_by, input_ids[:, :0], 0
        self.layout = self.experts = torch.empty(len(self.rows), 0, dtype=torch.long)

    def mark_ends(self, columns: Sequence[int]) -> None:
        """Notes the columns at which rows ended, 0 where one goes on; nothing where that is not known."""
        if len(columns) == len(self.rows):
            self.rows = tuple(replace(row, end=column - row.pad) if column and row.end is None else row
                              for row, column in zip(self.rows, columns, strict=True))  # fmt: skip

    def clear(self) -> None:
        """Empties every slot."""
        raise NotImplementedError

    def discard_partial(self) -> None:
        """Empties the cache if an earlier call broke off in the middle: its layers do not hold what `layout` says."""
        if any(length != self.layout.shape[1] for length in self._filled()):
            self.clear()
            self._cut(0)
            if self.places is not None:
                self.places = None
                self.rows = tuple(Row(row.pad, prompt=row.prompt) for row in self.rows)

    def _filled(self) -> list[int]:
        """Slots of each layer, its pairs not counted."""
        layers = enumerate(cast(list[Any], self.layers))
        return [int(layer.get_seq_length()) - self.pairs_before(number)
                for number, layer in layers if hasattr(layer, "get_seq_length")]  # fmt: skip

    def follow(self, input_ids: torch.Tensor, pads: Sequence[int], lengths: Sequence[int]) -> None:
        """Fits the state to the ids of a new call: what was cached of tokens that have changed becomes stale.

        Args:
            input_ids: `[B, T]`.
            pads: padding columns of each row.
            lengths: host tokens of each row in which chunks may stay compressed; later chunks are given up.
        """
        rows, layout = [], self.layout.clone()
        for i, (row, pad) in enumerate(zip(self.rows, pads, strict=True)):
            old, new = self.ids[i, row.pad :], input_ids[i, pad:].to(self.ids.device)
            shared = min(len(old), len(new))
            shared = int((old[:shared] == new[:shared]).cumprod(0).sum())
            kept = 0
            for chunk in row.chunks:
                if max(chunk.end, chunk.decided_at) > shared or chunk.end > lengths[i]:
                    break
                kept += 1
            chunks = row.chunks[:kept]
            layout[i, layout[i] >= shared] = STALE
            layout[i, (layout[i] < PAD) & (entry_chunk(layout[i]) >= kept)] = STALE
            if row.compact and kept < len(row.chunks):  # all behind the prefix saw what is given up
                layout[i, layout[i] >= (row.prefix or 0)] = STALE
            index = row.index if row.index is not None and kept >= len(row.index) else None
            prefix, compact = (row.prefix, row.compact) if chunks else (None, False)
            rows.append(Row(pad, prefix, chunks, index=index, compact=compact))
        self.rows, self.layout, self.quiet = tuple(rows), layout, 0
        if self.places is not None:
            self.places = self.places.cut([len(row.chunks) for row in rows])

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Reorders the rows, as beam search asks."""
        super().reorder_cache(beam_idx)  # pyright: ignore[reportArgumentType]
        self._select(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps only some rows."""
        super().batch_select_indices(indices)
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row."""
        super().batch_repeat_interleave(repeats)
        self._select(torch.arange(len(self.rows)).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Drops the last `-tokens_to_remove` slots, which are drafted tokens."""
        super().crop(tokens_to_remove)
        if tokens_to_remove:
            self._cut(tokens_to_remove)
            self.ids = self.ids[:, :tokens_to_remove]

    def _select(self, indices: torch.Tensor) -> None:
        picked = torch.arange(len(self.rows))[indices.cpu()]
        self.rows = tuple(self.rows[i] for i in picked.tolist())
        self.layout, self.experts = self.layout[picked], self.experts[picked]
        self.places = self.places.selected(picked) if self.places is not None else None
        self.ids = self.ids[picked.to(self.ids.device)]

    def slot_bytes(self, slots: int) -> int:
        """Bytes of keys and values that `slots` slots of one row take in this cache's layers and dtype."""
        total, layers = 0, cast(list[Any], self.layers)
        for layer in layers:
            keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)  # recurrent layers have none
            if keys is not None and values is not None and keys.numel():
                widths = sum(kv.shape[1] * kv.shape[3] * kv.element_size() for kv in (keys, values))
                total += widths * min(slots, getattr(layer, "sliding_window", None) or slots)
        return total

    def check_filled(self) -> None:
        """Counts the slots of the layers against the layout, after a forward.

        Raises:
            InputError: the host has not stored what it read here: something would be skipped, or kept in full.
        """
        filled = self._filled()
        if not filled or max(filled) != self.layout.shape[1]:
            slots, most = self.layout.shape[1], max(filled, default=0)
            raise InputError(f"host: expected {slots} slots in the cache that it was given, got {most}")


def _appended(table: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """A table `[B, S]` with columns `[B, n]` behind it, in a buffer that has room for more."""
    size, more = table.shape[1], new.shape[1]
    buffer = getattr(table, "_in_buffer", None)
    if buffer is None or size + more > buffer.shape[1]:
        buffer = table.new_empty(len(table), size + more + ROOM)
        buffer[:, :size] = table
    buffer[:, size : size + more] = new
    view = buffer[:, : size + more]
    view._in_buffer = buffer  # pyright: ignore[reportAttributeAccessIssue]
    return view


Layer = tuple[torch.Tensor, torch.Tensor]
"""Keys and values `[B, heads, n, D]`."""


class CompressedDynamicCache(CompressedCache, DynamicCache):
    """Grows with its slots; the usual cache."""

    _config: Any = None

    def __init__(self, *args, config=None, **kwargs):
        super().__init__(*args, config=config, **kwargs)
        self._config = config

    @classmethod
    def adopt(cls, cache: DynamicCache, config: Any) -> CompressedDynamicCache:
        """An empty dynamic cache, made a compressed one in place; `config` is its host's."""
        cache.__class__ = cls
        cache._config = config if cache.layer_class_to_replicate is None else None  # pyright: ignore
        return cache  # pyright: ignore[reportReturnType]

    def clear(self) -> None:
        """Empties every slot (the layers' own `reset` kept zeroed slots before transformers 5.2x)."""
        recording = is_recording(self)
        self.layers = DynamicCache(config=self._config).layers
        if recording:
            self.activate_past_recording()

    @property
    def in_rows(self) -> bool:
        """See `CompressedCache.in_rows`: where layers keep nothing but keys and values, of every token."""
        plain = bool(self.layers) and all(type(layer) is DynamicLayer for layer in self.layers)
        return plain and not self.offloading and not is_recording(self)

    def part(self, first: int, end: int) -> CompressedDynamicCache:
        """See `CompressedCache.part`."""
        some, span = CompressedDynamicCache(config=self._config), slice(first, end)
        some.rows, some.layout, some.experts = self.rows[span], self.layout[span], self.experts[span]
        if self.places is not None:
            some.places = self.places.selected(torch.arange(len(self.rows))[span])
        for number, layer in enumerate(cast(list[Any], self.layers)):
            if layer.is_initialized and layer.keys.numel():
                Cache.update(some, layer.keys[span], layer.values[span], number)
        return some

    def shed(self, columns: int) -> None:
        """See `CompressedCache.shed`."""
        for number, layer in enumerate(cast(list[Any], self.layers)):
            before = self.pairs_before(number) + columns
            layer.keys, layer.values = (kind[:, :, before:].clone() for kind in (layer.keys, layer.values))

    def take(self, parts: Sequence[CompressedCache]) -> None:
        """See `CompressedCache.take`; layer after layer, so that no more than one layer's slots are held twice."""
        for number in range(len(self.layers)):
            layers = [cast(list[Any], part.layers)[number] for part in parts]
            keys, values = (torch.cat([getattr(layer, kind) for layer in layers]) for kind in ("keys", "values"))
            for layer in layers:
                layer.keys = layer.values = None
            Cache.update(self, keys, values, number)

    def _start_anew(self) -> list[Layer | None]:
        """See `CompressedCache._start_anew`; what goes on being referred to is dropped layer by layer."""
        layers = cast(list[Any], self.layers)
        old = [self._pairs_of(layer, number) for number, layer in enumerate(layers)]
        self.layers = DynamicCache(config=self._config).layers
        return old


class CompressedStaticCache(CompressedCache, StaticCache):
    """Buffers of a fixed size, whose addresses stay: for compiled decoding."""

    @classmethod
    def adopt(cls, cache: StaticCache) -> CompressedStaticCache:
        """An empty static cache, made a compressed one in place."""
        cache.__class__ = cls
        return cache  # pyright: ignore[reportReturnType]

    def clear(self) -> None:
        """Empties every slot, in place."""
        self.reset()

    def _start_anew(self) -> list[Layer | None]:
        """See `CompressedCache._start_anew`; copies, since the buffers are written in place."""
        layers = cast(list[Any], self.layers)
        found = [self._pairs_of(layer, number) for number, layer in enumerate(layers)]
        old = [(pair[0].clone(), pair[1].clone()) if pair is not None else None for pair in found]
        self.reset()
        return old
