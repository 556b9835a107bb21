"""From one layout of a cache to the next: what is kept, and what is read anew."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import DynamicCache

from ..errors import InputError
from ..hosts.devices import input_device
from ..hosts.rope import rope_switch, rotated_as_of
from ..types import Chunk, Entries, Row
from .capacity import check_capacity
from .kv_cache import CompressedCache, is_recording
from .layout import PAD, common_columns, entry_chunk, entry_place, row_experts, row_layout, stack_experts, stack_rows
from .masks import given_to, mask_and_positions, over_buffers
from .policy import ContextPolicy, ids_key
from .reads import pairs_by_reading

ENCODE_BATCH = 8  # chunks
READ_TOKENS = 8 * 2048  # of all rows in one forward, where rows can be read in parts: activations grow with them


@torch.no_grad()
def prefill(
    host: Any,
    policy: ContextPolicy,
    cache: CompressedCache,
    input_ids: torch.Tensor,
    verified: int,
    main: int | None,
    ends: Callable[[], Sequence[int]] | None = None,
    *,
    one_rotation: bool = False,
    keep: bool = True,
) -> tuple[int, int]:
    """Brings the cache to the layout that `input_ids` call for, short of the last `main` columns.

    Args:
        host: the plain host.
        policy: its rule.
        cache: whose state is behind `input_ids`.
        input_ids: `[B, T]`, left-padded, the whole conversation.
        verified: columns that are decided; later ones are drafts and are compressed by no chunk.
        main: columns left to the forward of the caller; by default the raw columns that all rows share.
        ends: gives the columns at which each row ended, 0 where it goes on; nothing where none ends before the others.
        one_rotation: read anew where rotary factors switch even if nothing is compressed; `generate` leaves that to
            the host.
        keep: whether slots that stand there may stay once something is compressed.

    Returns:
        Columns left to the caller, and the slots that were kept from before.

    Raises:
        CapacityError: more slots than the positions that the host was trained on.
        InputError: entries that are not finite.
    """
    width = input_ids.shape[1]
    if main is not None and isinstance(cache, DynamicCache):  # of a static one the count stands on the device
        cache.check_filled()
    if main is not None and width < cache.quiet and width - main == cache.width:
        cache.append(input_ids)
        return main, cache.layout.shape[1] - main
    if ends is not None and any(
        row.end is None and verified - row.pad >= policy.changes_at(row) for row in cache.rows
    ):
        cache.mark_ends(ends())  # asked only where it matters, since asking waits for the device
    before = cache.rows
    tokens = [input_ids[i, row.pad : row.pad + row.end if row.end is not None else verified]
              for i, row in enumerate(before)]  # fmt: skip
    rows = [policy.retrieve(policy.extend(row, ids), ids) for row, ids in zip(before, tokens, strict=True)]
    rows = policy.route(rows, tokens)
    rows = with_entries(host, policy, cache, rows, tokens)
    codes = _codes(policy, cache, rows, width, main)
    left = sys.maxsize
    if any(row.chunks for row in rows):  # without, the host's own limits hold
        left = check_capacity(host, policy, max(row.prefix or 0 for row in rows), rows, codes)
    layout = stack_rows(codes, 0 if any(row.chunks for row in rows) else width)
    served = [row_experts(row, code) for row, code in zip(rows, codes, strict=True)]
    experts = stack_experts(served, layout.shape[1])
    wanted, cached = (layout, experts), (cache.layout, cache.experts)
    slots, longest = layout.shape[1], max(len(row) for row in codes)
    compressed = any(row.chunks for row in rows)
    anew = compressed and not keep or (compressed or one_rotation) and _rotated_anew(host, cache, longest)
    common = 0 if anew else common_columns(cached, wanted)
    common = min(common, *map(_seen_alike, rows, cache.layout, layout))
    if main is None:
        raw = min((width - row.pad - row.raw_start for row in rows if row.chunks), default=slots)
        kept = min(common, slots - (width - verified) - 1)
        main = min(raw, slots - kept)
        if slots - kept - main == 1 and main > width - verified + 1 and cache.is_recurrent:
            main -= 1  # recurrent layers take one column for a decoding step, and its padding for a token
        if compressed and len(rows) * main > READ_TOKENS and cache.in_rows:
            main = width - verified + 1
    else:
        kept = min(common, slots - main)
    cache.rows = tuple(rows)
    kept = cache.keep_columns(kept)
    if kept < slots - main:
        cache.layout, cache.experts = layout[:, : slots - main], experts[:, : slots - main]
        with rotated_as_of(host, longest):
            _read_slots(host, policy, cache, input_ids, kept)
        cache.check_filled()
        if is_recording(cache):
            cache.crop(0)  # sliding layers expect it between two forwards
    cache.layout, cache.experts = layout, experts
    cache.ids, cache.peak = input_ids, max(cache.peak, slots + cache.pair_slots)
    cache.quiet = 0
    if (compressed or not cache.places) and rope_switch(host) is None:
        changes = (row.pad + policy.changes_at(row) for row in rows if row.end is None)
        cache.quiet = min([*changes, width + left + 1])
    return main, kept


def _read_slots(host: Any, policy: ContextPolicy, cache: CompressedCache, input_ids: torch.Tensor, kept: int) -> None:
    """Reads the slots from column `kept` on, of a few rows at a time where there are many tokens."""
    columns, rows = cache.layout.shape[1] - kept, len(cache.rows)
    some = max(1, READ_TOKENS // columns)
    if some < rows and cache.in_rows:
        parts = []
        for first in range(0, rows, some):
            parts.append(cache.part(first, first + some))
            _read_slots(host, policy, parts[-1], input_ids[first : first + some], kept)
            parts[-1].shed(kept)
        cache.take(parts)
        return
    inputs = slot_inputs(host, cache, input_ids, kept)
    mask, positions = mask_and_positions(host, cache, columns, input_device(host))
    mask = over_buffers(host, cache, mask)
    with policy.serving(cache.experts[:, kept:]), given_to(host, mask) as given:
        host.base_model(**inputs, past_key_values=cache, attention_mask=given, position_ids=positions, use_cache=True)


def _codes(
    policy: ContextPolicy, cache: CompressedCache, rows: Sequence[Row], width: int, main: int | None
) -> list[torch.Tensor]:
    """Codes of each row's slots.

    Nobody reads what a row gives after its end. It goes on as it stands while nothing else changes, so that no slot is
    read anew for its sake; then all but the columns of the next forward go.
    """
    codes = [row_layout(width - row.pad, row, beside_raw=policy.beside_raw)
             for row in rows]  # fmt: skip
    ended = [i for i, row in enumerate(rows) if row.end is not None]
    if not ended or main is None:
        return codes
    held = [row[row != PAD] for row in cache.layout]
    grown = all(torch.equal(codes[i][: len(held[i])], held[i]) for i in range(len(rows)) if i not in ended)
    for i in ended:
        length = width - rows[i].pad
        new = torch.arange(length - main, length)
        codes[i] = torch.cat([held[i], new]) if grown else new
    return codes


def _seen_alike(row: Row, cached: torch.Tensor, wanted: torch.Tensor) -> int:
    """Leading columns of a row that may stay: in a compact one every slot behind the prefix saw what is not raw."""
    size = cached.shape[0]
    if not row.compact or not size:
        return size
    start = row.prefix or 0
    before, now = (codes[(codes >= start) & (codes < row.raw_start)] for codes in (cached, wanted))  # retrieved
    return size if torch.equal(before, now) else int((wanted < start).long().cumprod(0).sum())


def _rotated_anew(host: Any, cache: CompressedCache, slots: int) -> bool:
    """Whether so many slots call for other rotary factors than those that stand in the cache."""
    switch = rope_switch(host)
    if switch is None or not cache.layout.numel():
        return False
    before = int((cache.layout != PAD).sum(1).max())
    return (before > switch) != (slots > switch)


def with_entries(
    host: Any, policy: ContextPolicy, cache: CompressedCache, rows: Sequence[Row], tokens: Sequence[torch.Tensor]
) -> Sequence[Row]:
    """The rows with entries for every chunk; what is equal (chunks where ids decide, rows of beams) is made once.

    Args:
        host: the plain host.
        policy: its rule.
        cache: that takes pairs.
        rows: with every chunk that their tokens call for.
        tokens: each row's decided tokens without padding, `[T]`.

    Raises:
        InputError: entries that are not finite.
        MismatchError: ids outside the crouter's vocabulary.
    """
    compressor: Any = policy.compressor
    turning = any(row.compact and not before.compact for row, before in zip(rows, cache.rows, strict=True))
    if compressor is None or not turning and all(chunk.entries is not None for row in rows for chunk in row.chunks):
        return rows
    if compressor.reads:
        return pairs_by_reading(host, policy, cache, rows, tokens)
    wanted: dict[Any, tuple[Chunk, str]] = {}
    for number, row in enumerate(rows):
        for n, chunk in enumerate(row.chunks):
            if chunk.entries is None:
                key = _sharing_key(chunk, number, compressor.ids_decide)
                wanted.setdefault(key, (chunk, f"chunk {n} of row {number}"))
    made: dict[Any, Entries] = {}
    items = list(wanted.items())
    with policy.serving(None):
        for first in range(0, len(items), ENCODE_BATCH):
            batch = items[first : first + ENCODE_BATCH]
            entries = compressor.encode([chunk for _, (chunk, _) in batch])
            for (key, (chunk, name)), some in zip(batch, entries, strict=True):
                if some.embeddings is not None and not bool(some.embeddings.isfinite().all()):
                    raise InputError(
                        f"entries: expected finite numbers, got others in {name} (tokens {chunk.start} to {chunk.end})"
                    )
                made[key] = some
    filled = []
    for number, row in enumerate(rows):
        chunks = (chunk if chunk.entries is not None
                  else replace(chunk, entries=made[_sharing_key(chunk, number, compressor.ids_decide)])
                  for chunk in row.chunks)  # fmt: skip
        filled.append(replace(row, chunks=tuple(chunks)))
    return filled


def _sharing_key(chunk: Chunk, row: int, ids_decide: bool) -> Any:
    return (ids_key(chunk.ids), ids_key(chunk.host_ids)) if ids_decide else (row, chunk.start)


def slot_inputs(host: Any, cache: CompressedCache, input_ids: torch.Tensor, first: int) -> dict[str, torch.Tensor]:
    """What the host reads in a cache's slots from column `first` on: ids `[B, slots]` or embeddings `[B, slots, H]`.

    Embeddings only where some entries are such: the layers of some hosts look ids up as well. Padding gets token 0.
    """
    codes = cache.layout[:, first:]
    pads = torch.tensor([row.pad for row in cache.rows])[:, None]
    columns = torch.where(codes >= 0, codes + pads, 0).to(input_ids.device)
    ids = input_ids.gather(1, columns).to(input_device(host))
    if not any(chunk.entries is not None and chunk.entries.embeddings is not None
               for row in cache.rows for chunk in row.chunks):  # fmt: skip
        return {"input_ids": ids}
    embeddings = host.get_input_embeddings()(ids)
    for i, row in enumerate(cache.rows):
        where = (codes[i] < PAD).nonzero()[:, 0]
        chunks, places = entry_chunk(codes[i, where]), entry_place(codes[i, where])
        for number in chunks.unique().tolist():
            entries, here = row.chunks[number].entries, chunks == number
            if entries is not None and entries.embeddings is not None:
                some = entries.embeddings[places[here].to(entries.embeddings.device)]
                embeddings[i, where[here].to(embeddings.device)] = some.to(embeddings.device, embeddings.dtype)
    return {"inputs_embeds": embeddings}
