"""A KV cache that knows what stands in each of its slots.

A row reads `[padding | raw prefix | soft prompts of chunks 1..n | recalled chunks, raw | raw window]`; `layout [B, S]`
(int64, on the CPU) holds one code a slot: `PAD`, a token's position in the row (>= 0), or a soft prompt (`< PAD`).
`experts [B, S]` holds the adapter under which each slot's keys and values were made. What `generate` does to the cache
(reorder beams, repeat, select, roll back drafts) is mirrored on that state, so the cache carries all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from transformers import Cache, DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from ..types import BASE, Row
from .layout import PAD, STALE, soft_index


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
        origin: what made its soft prompts; None where nothing is known yet.
    """

    rows: tuple[Row, ...] = ()
    layout: torch.Tensor = torch.empty(0, 0, dtype=torch.long)
    experts: torch.Tensor = torch.empty(0, 0, dtype=torch.long)
    ids: torch.Tensor = torch.empty(0, 0, dtype=torch.long)
    peak: int = 0
    origin: Any = None

    @property
    def width(self) -> int:
        """Columns of `input_ids` that the slots stand for."""
        return self.ids.shape[1]

    @property
    def compressed(self) -> bool:
        """Whether any row holds a compressed chunk."""
        return any(row.chunks for row in self.rows)

    @property
    def own(self) -> bool:
        """Whether it holds what only its own history can read on: compressed chunks, or slots made under adapters."""
        return self.compressed or bool((self.experts != BASE).any())

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

    def start(self, rows: Sequence[Row], input_ids: torch.Tensor, origin: Any = None) -> None:
        """Sets the state of an empty cache.

        Args:
            rows: what is known of each row.
            input_ids: `[B, T]`, of which nothing stands in the cache yet.
            origin: what makes its soft prompts.
        """
        self.rows, self.origin, self.ids = tuple(rows), origin, input_ids[:, :0]
        self.layout = self.experts = torch.empty(len(self.rows), 0, dtype=torch.long)

    def clear(self) -> None:
        """Empties every slot."""
        raise NotImplementedError

    def heal(self) -> None:
        """Empties the cache if an earlier call broke off in the middle: its layers do not hold what `layout` says."""
        layers = cast(list[Any], self.layers)
        if any(int(layer.get_seq_length()) != self.layout.shape[1] for layer in layers):
            self.clear()
            self._cut(0)

    def rebase(self, input_ids: torch.Tensor, pads: Sequence[int], lengths: Sequence[int], lookahead: int) -> None:
        """Fits the state to the ids of a new call: what was cached of tokens that have changed becomes stale.

        Args:
            input_ids: `[B, T]`.
            pads: padding columns of each row.
            lengths: host tokens of each row in which chunks may stay compressed; later chunks are given up.
            lookahead: tokens after a chunk that may have decided where it ends.
        """
        rows, layout = [], self.layout.clone()
        for i, (row, pad) in enumerate(zip(self.rows, pads, strict=True)):
            old, new = self.ids[i, row.pad :], input_ids[i, pad:].to(self.ids.device)
            shared = min(len(old), len(new))
            shared = int((old[:shared] == new[:shared]).cumprod(0).sum())
            chunks = tuple(chunk for chunk in row.chunks if chunk.end <= min(shared - lookahead, lengths[i]))
            latents = next((len(chunk.soft) for chunk in row.chunks if chunk.soft is not None), 0)
            layout[i, layout[i] >= shared] = STALE
            layout[i, (layout[i] < PAD) & (soft_index(layout[i]) >= len(chunks) * latents)] = STALE
            index = row.index if row.index is not None and len(chunks) >= len(row.index) else None
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
            if layer.is_initialized and layer.keys is not None and layer.keys.numel():
                widths = sum(kv.shape[1] * kv.shape[3] * kv.element_size() for kv in (layer.keys, layer.values))
                total += widths * min(slots, getattr(layer, "sliding_window", None) or slots)
        return total


class CompressedDynamicCache(CompressedCache, DynamicCache):
    """Grows with its slots; the usual cache."""

    def __init__(self, *args, config=None, **kwargs):
        super().__init__(*args, config=config, **kwargs)
        self._config = config

    def clear(self) -> None:
        """Empties every slot (the layers' own `reset` kept zeroed slots before transformers 5.2x)."""
        recording = is_recording(self)
        self.layers = DynamicCache(config=self._config).layers
        if recording:
            self.activate_past_recording()


class CompressedStaticCache(CompressedCache, StaticCache):
    """Buffers of a fixed size, whose addresses stay: for compiled decoding."""

    def clear(self) -> None:
        """Empties every slot, in place."""
        self.reset()
