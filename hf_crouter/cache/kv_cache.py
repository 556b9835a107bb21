"""A KV cache that knows what stands in each of its slots.

`layout [B, S]` (int64, on the CPU) holds one code a slot (`layout.py`), `experts [B, S]` the adapter under which its
keys and values were made. What `generate` does to the cache (reorder beams, repeat, select, roll back drafts) is
mirrored on that state, so the cache carries all of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from transformers import Cache, DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from ..errors import InputError
from ..types import BASE, Row
from .layout import PAD, STALE, entry_chunk, entry_place

Put = tuple[int, torch.Tensor, int, torch.Tensor]
"""Row, columns of the forward, chunk, and the places of its entries that are put there."""


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
        true_positions: whether tokens keep their positions, see `Compressor.positions`.
    """

    rows: tuple[Row, ...] = ()
    layout: torch.Tensor = torch.empty(0, 0, dtype=torch.long)
    experts: torch.Tensor = torch.empty(0, 0, dtype=torch.long)
    ids: torch.Tensor = torch.empty(0, 0, dtype=torch.long)
    peak: int = 0
    made_by: object = None
    true_positions: bool = False
    _puts: tuple[Put, ...] = ()  # what the forward in hand gets from entries

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
    def has_key_values(self) -> bool:
        """Whether some chunk's entries are keys and values."""
        return any(chunk.entries is not None and chunk.entries.keys is not None
                   for row in self.rows for chunk in row.chunks)  # fmt: skip

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        """Stores a layer's keys and values `[B, heads, T, D]`; in the columns of entries, theirs instead."""
        if self._puts:
            key_states, value_states = self._put(key_states, value_states, layer_idx)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def _put(self, keys: torch.Tensor, values: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = keys.clone(), values.clone()
        for row, columns, chunk, places in self._puts:
            entries = self.rows[row].chunks[chunk].entries
            if entries is not None and entries.keys is not None and entries.values is not None:
                key, value = entries.keys[layer], entries.values[layer]
                if key is not None and value is not None:
                    keys[row, :, columns] = key[:, places].to(keys.device, keys.dtype)
                    values[row, :, columns] = value[:, places].to(values.device, values.dtype)
        return keys, values

    @contextlib.contextmanager
    def entries_put_in(self, first: int) -> Iterator[None]:
        """A block in which a forward over the slots from column `first` on gets entries' keys and values."""
        puts: list[Put] = []
        if self.has_key_values:
            for row, codes in enumerate(self.layout[:, first:]):
                columns = (codes < PAD).nonzero()[:, 0]
                chunks, places = entry_chunk(codes[columns]), entry_place(codes[columns])
                for chunk in chunks.unique().tolist():
                    puts.append((row, columns[chunks == chunk], chunk, places[chunks == chunk]))
        self._puts = tuple(puts)
        try:
            yield
        finally:
            self._puts = ()

    def keep_columns(self, columns: int) -> int:
        """Drops the slots after the first `columns`, or all where that cannot be done; returns how many stay."""
        if columns == self.layout.shape[1]:
            return columns
        if columns and all(type(layer) is DynamicLayer for layer in self.layers):
            super().crop(columns - self.layout.shape[1])
        else:
            self.clear()
            columns = 0
        self._cut(columns)
        return columns

    def _cut(self, columns: int) -> None:
        self.layout, self.experts = self.layout[:, :columns], self.experts[:, :columns]

    def start(
        self, rows: Sequence[Row], input_ids: torch.Tensor, made_by: object = None, true_positions: bool = False
    ) -> None:
        """Sets the state of an empty cache.

        Args:
            rows: what is known of each row.
            input_ids: `[B, T]`, of which nothing stands in the cache yet.
            made_by: key of what makes its entries.
            true_positions: whether tokens keep their positions.
        """
        self.rows, self.made_by, self.ids = tuple(rows), made_by, input_ids[:, :0]
        self.true_positions = true_positions
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
        layers = cast(list[Any], self.layers)
        lengths = [int(layer.get_seq_length()) for layer in layers if hasattr(layer, "get_seq_length")]
        if any(length != self.layout.shape[1] for length in lengths):
            self.clear()
            self._cut(0)

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
            index = row.index if row.index is not None and kept >= len(row.index) else None
            rows.append(Row(pad, row.prefix if chunks else None, chunks, index=index))
        self.rows, self.layout = tuple(rows), layout

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
        layers = cast(list[Any], self.layers)
        filled = [int(layer.get_seq_length()) for layer in layers if hasattr(layer, "get_seq_length")]
        if not filled or max(filled) != self.layout.shape[1]:
            slots, most = self.layout.shape[1], max(filled, default=0)
            raise InputError(f"host: expected {slots} slots in the cache that it was given, got {most}")


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
