"""From one layout of a cache to the next: what is kept, what is refilled, and how much fits."""

from __future__ import annotations

from typing import Any

import torch

from ..types import BASE
from .capacity import check_capacity
from .kv_cache import CompressedCache, is_recording
from .layout import PAD, common_columns, row_experts, row_layout, soft_index, stack_rows
from .policy import ContextPolicy


@torch.no_grad()
def advance(
    host: Any, reader: ContextPolicy, cache: CompressedCache, input_ids: torch.Tensor, verified: int, main: int | None
) -> tuple[int, int]:
    """Brings the cache to the layout that `input_ids` call for, short of the last `main` columns.

    Args:
        host: the plain host.
        reader: its rule.
        cache: whose state is behind `input_ids`.
        input_ids: `[B, T]`, left-padded, the whole conversation.
        verified: columns that are decided; later ones are drafts and are compressed by no chunk.
        main: columns left to the forward of the caller; by default the raw columns that all rows share.

    Returns:
        Columns left to the caller, and the slots that were kept from before.

    Raises:
        CapacityError: more slots than the positions that the host was trained on.
        InputError: latents that are not finite.
    """
    width = input_ids.shape[1]
    tokens = [input_ids[i, row.pad : verified] for i, row in enumerate(cache.rows)]
    rows = [reader.choose(reader.extend(row, ids), ids) for row, ids in zip(cache.rows, tokens, strict=True)]
    rows = reader.route(rows, tokens)
    compressed = any(row.chunks for row in rows)
    codes = []
    for row in rows:
        spans, retrieved = ([(c.start, c.end) for c in chunks] for chunks in (row.chunks, row.retrieved))
        codes.append(row_layout(width - row.pad, row.prefix or 0, spans, reader.num_latents, retrieved))
    check_capacity(host, reader, max(row.prefix or 0 for row in rows), max(len(code) for code in codes))
    layout = stack_rows(codes, 0 if compressed else width)
    served = [row_experts(row, code, reader.num_latents) for row, code in zip(rows, codes, strict=True)]
    experts = torch.full_like(layout, BASE)
    for i, numbers in enumerate(served):  # padding goes with what comes first: rows stay uniform where they can
        experts[i, : layout.shape[1] - len(numbers)] = numbers[0] if len(numbers) else BASE
        experts[i, layout.shape[1] - len(numbers) :] = numbers
    wanted, cached = (layout, experts), (cache.layout, cache.experts)
    slots = layout.shape[1]
    if main is None:
        raw = min((width - row.pad - row.raw_start for row in rows if row.chunks), default=slots)
        kept = min(common_columns(cached, wanted), slots - (width - verified) - 1)
        main = min(raw, slots - kept)
    else:
        kept = min(common_columns(cached, wanted), slots - main)
    embedding = host.get_input_embeddings()
    filled = reader.fill(rows, embedding.weight.device, embedding.weight.dtype)
    kept = cache.keep_columns(kept)
    cache.rows = filled
    if kept < slots - main:
        cache.layout, cache.experts = layout[:, : slots - main], experts[:, : slots - main]
        embeddings = embed(host, cache, input_ids, kept)
        mask, positions = mask_and_positions(cache, slots - main - kept, embeddings.device)
        with reader.serving(cache.experts[:, kept:]):
            host.base_model(
                inputs_embeds=embeddings,
                past_key_values=cache,
                attention_mask=mask,
                position_ids=positions,
                use_cache=True,
            )
        if is_recording(cache):
            cache.crop(0)  # sliding layers expect it between two forwards
    cache.layout, cache.experts = layout, experts
    cache.ids, cache.peak = input_ids, max(cache.peak, slots)
    return main, kept


def embed(host: Any, cache: CompressedCache, input_ids: torch.Tensor, first: int) -> torch.Tensor:
    """Input embeddings of the cache's slots from column `first` on, `[B, slots, H]`; padding gets token 0's."""
    table = host.get_input_embeddings()
    codes = cache.layout[:, first:]
    pads = torch.tensor([row.pad for row in cache.rows])[:, None]
    columns = torch.where(codes >= 0, codes + pads, 0).to(input_ids.device)
    embeddings = table(input_ids.gather(1, columns).to(table.weight.device))
    for i, row in enumerate(cache.rows):
        where = (codes[i] < PAD).nonzero()[:, 0]
        if len(where):
            soft = torch.cat([chunk.soft for chunk in row.chunks])  # pyright: ignore
            embeddings[i, where.to(embeddings.device)] = soft[soft_index(codes[i, where]).to(soft.device)]
    return embeddings


def mask_and_positions(
    cache: CompressedCache, columns: int, device: torch.device
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Mask of all slots `[B, S]` (None without padding) and compact positions of the last `columns`."""
    mask = cache.layout != PAD
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, mask.shape[1] - columns :]
    positions = positions.clone(memory_format=torch.contiguous_format)  # a changing stride would recompile every step
    return None if bool(mask.all()) else mask.long().to(device), positions.to(device)
