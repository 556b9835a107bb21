"""A KV cache that knows what stands in each of its slots.

A row reads `[padding | raw prefix | soft prompts of chunks 1..n | recalled chunks, raw | raw window]`; `layout [B, S]`
(int64, on the CPU) holds one code a slot: `PAD`, a token's position in the row (>= 0), or a soft prompt (`< PAD`).
`experts [B, S]` holds the adapter under which each slot's keys and values were made. What `generate` does to the cache
(reorder beams, repeat, select, roll back drafts) is mirrored on that state, so the cache carries all of it.
"""

from __future__ import annotations

from collections.abc import Sequence, Sized
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import Cache, DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from ..adapters import BASE
from ..types import Route

PAD = -1
STALE = torch.iinfo(torch.int64).min  # a slot whose token was edited since: equal to no code


@dataclass(frozen=True, eq=False)
class CompressedChunk:
    """A compressed span of one row.

    Attributes:
        start: first host token of the span, counted from the row's first real token.
        end: host token after the span.
        ids: its crouter ids, int64 on the CPU, `[tokens]`.
        soft: soft prompts `[M, H]` on the host's device; None where the chunk is dropped (or not encoded yet).
        route: the expert that serves it; None without experts (or not decided yet).
    """

    start: int
    end: int
    ids: torch.Tensor
    soft: torch.Tensor | None = None
    route: Route | None = None


@dataclass(frozen=True, eq=False)
class Choice:
    """The chunks that a row recalled from some length on.

    Attributes:
        at: tokens of the row when it was made; it depends on nothing later.
        count: chunks that were compressed then.
        chunks: numbers of the recalled ones, ascending.
        scores: why, for each of them: parts of its score by name.
    """

    at: int
    count: int
    chunks: tuple[int, ...]
    scores: tuple[dict[str, float], ...]


@dataclass(frozen=True, eq=False)
class WindowRoute:
    """The expert that serves a row's raw window from some length on.

    Attributes:
        at: tokens of the row when it was decided; it depends on nothing later.
        count: chunks that were compressed then.
        route: the decision on the window's last tokens.
    """

    at: int
    count: int
    route: Route


@dataclass(frozen=True, eq=False)
class Row:
    """What the cache knows of one row; all counts in host tokens.

    Attributes:
        pad: padding columns before the row's first token in `input_ids`.
        prefix: tokens kept raw at the start; None until known.
        chunks: the compressed spans, contiguous, from `prefix` on.
        pending: the next chunk, already cut but still in the raw window.
        probed: tokens after the last chunk up to which a next chunk was looked for.
        prompt: tokens of the call's prompt.
        index: of the chunks, for recall; made when first needed, and may lag behind.
        choices: what was recalled in this call, one after the other; the last one is in force.
        routes: the experts that served the raw window in this call; the last one is in force.
    """

    pad: int
    prefix: int | None = None
    chunks: tuple[CompressedChunk, ...] = ()
    pending: CompressedChunk | None = None
    probed: int = 0
    prompt: int = 0
    index: Sized | None = None
    choices: tuple[Choice, ...] = ()
    routes: tuple[WindowRoute, ...] = ()

    @property
    def recalled(self) -> tuple[CompressedChunk, ...]:
        """The chunks that stand raw before the window."""
        return tuple(self.chunks[i] for i in self.choices[-1].chunks) if self.choices else ()

    @property
    def raw_start(self) -> int:
        """First host token of the raw window."""
        return self.chunks[-1].end if self.chunks else self.prefix or 0


def row_layout(
    length: int,
    prefix: int,
    spans: Sequence[tuple[int, int]],
    num_latents: int,
    recalled: Sequence[tuple[int, int]] = (),
) -> torch.Tensor:
    """Codes of one row's slots, `[slots]`.

    Args:
        length: tokens of the row.
        prefix: tokens kept raw at the start.
        spans: compressed spans `(start, end)`, contiguous from `prefix` on.
        num_latents: slots a compressed chunk takes, M; 0 drops them.
        recalled: those of the spans that stand raw as well, in order.
    """
    if not spans:
        return torch.arange(length)
    soft = PAD - 1 - torch.arange(len(spans) * num_latents)
    raw = [torch.arange(start, end) for start, end in (*recalled, (spans[-1][1], length))]
    return torch.cat([torch.arange(prefix), soft, *raw])


def row_experts(row: Row, codes: torch.Tensor, num_latents: int) -> torch.Tensor:
    """Numbers of the adapters that serve a row's slots, `[slots]`; `BASE` for none.

    A chunk's soft prompts, its recalled tokens and (of the first chunk) the prefix before it are served by its own
    expert, the rest by the window's.

    Args:
        row: its chunks and routes.
        codes: of its slots, as `row_layout` gives them.
        num_latents: slots a compressed chunk takes, M.
    """
    window = row.routes[-1].route.number if row.routes else BASE
    if not row.chunks or not row.routes:
        return torch.full_like(codes, window)
    numbers = [chunk.route.number if chunk.route is not None else BASE for chunk in row.chunks]
    ends = torch.tensor([chunk.end for chunk in row.chunks])
    where = torch.bucketize(codes, ends, right=True)  # chunk in which a token stands
    soft = codes < PAD
    where[soft] = soft_index(codes[soft]) // max(num_latents, 1)
    return torch.tensor([*numbers, window])[where]


def soft_index(codes: torch.Tensor) -> torch.Tensor:
    """Chunk times M plus latent for codes of soft prompts."""
    return PAD - 1 - codes


def stack_rows(rows: Sequence[torch.Tensor], width: int = 0) -> torch.Tensor:
    """Left-pads rows of codes to `[B, S]`, S the longest row or `width` if that is more."""
    width = max(width, *(len(row) for row in rows))
    return torch.stack([torch.nn.functional.pad(row, (width - len(row), 0), value=PAD) for row in rows])


def common_columns(cached: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> int:
    """Number of leading columns in which two layouts, each with its adapters (`[B, S]` all), agree in every row."""
    if len(cached[0]) != len(wanted[0]):
        return 0
    width = min(cached[0].shape[1], wanted[0].shape[1])
    same = torch.stack([a[:, :width] == b[:, :width] for a, b in zip(cached, wanted, strict=True)])
    return int(same.flatten(0, 1).all(0).cumprod(0).sum())


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
