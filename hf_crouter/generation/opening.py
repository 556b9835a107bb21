"""The cache on which a call begins."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from transformers import StaticCache
from transformers.cache_utils import StaticLayer

from ..cache.kv_cache import CompressedCache, CompressedDynamicCache, CompressedStaticCache
from ..errors import InputError
from ..types import Row
from .call import Call

DRAFTS = 64  # slots of a static cache kept free for drafted tokens


def open_cache(host: Any, call: Call, given: Any, input_ids: torch.Tensor, pads: list[int], verified: int) -> Any:
    """The cache that a call starts on: the compressed one of an earlier turn, or the empty one that is given.

    A dynamic cache, and a static one of the caller's, becomes a compressed cache in place, so that who passed it finds
    it filled. A static one that `generate` made, which no buffers belong to yet, is replaced by one of the right size.

    Args:
        host: the plain host.
        call: that begins.
        given: the cache.
        input_ids: `[B, T]`, the prompt and what is drafted behind it.
        pads: padding columns of each row.
        verified: columns that are decided.

    Raises:
        InputError: a cache of another batch or history, or a static one that is too small.
    """
    policy = call.processor.policy
    if isinstance(given, CompressedCache):
        if len(given.rows) != len(pads):
            raise InputError(f"past_key_values: expected {len(pads)} rows, got {len(given.rows)}")
        if given.has_private_state and given.made_by != policy.key:
            raise InputError(
                "past_key_values: compressed by another crouter, projector or experts than this history's"
            )
        given.made_by = policy.key
        given.follow(input_ids, pads, [verified - pad - policy.window for pad in pads])
        given.rows = tuple(replace(row, prompt=verified - row.pad) for row in given.rows)
        given.discard_partial()
        return given
    if isinstance(given, StaticCache):
        if not call.compresses and policy.router is None:
            return given
        cache = _static(host, call, given, input_ids, pads)
    else:
        cache = CompressedDynamicCache.adopt(given, host.config.get_text_config(decoder=True))
    cache.start([Row(pad, prompt=verified - pad) for pad in pads], input_ids, policy.key)
    return cache


def _static(host: Any, call: Call, given: StaticCache, input_ids: torch.Tensor, pads: list[int]) -> Any:
    """A static cache with room for every slot that the call can come to need."""
    policy, config = call.processor.policy, host.config.get_text_config(decoder=True)
    full = call.columns or int(given.get_max_length())
    longest = full - min(pads)
    retrieved = policy.retriever.chunks if policy.retriever is not None else 0
    by_layer: tuple[int, ...] = getattr(policy.compressor, "most_by_layer", ())
    entries = 0 if by_layer else policy.most_entries
    room = most = full + retrieved * entries  # retrieved chunks may stand beside their entries
    chunks = max(0, longest - policy.window) // policy.chunker.step + 1  # about: another tokenizer cuts them
    if policy.chunker.same_tokenizer:
        length = policy.chunker.chunk_length
        chunks = max(0, longest - policy.window) // length
        prefix = max(policy.raw_prefix(row[pad:], len(row) - pad) for row, pad in zip(input_ids, pads, strict=True))
        raw = min(chunks, retrieved) * length
        room = min(pads) + prefix + chunks * entries + raw + policy.window + length + DRAFTS
    room = min(most, room)
    pairs = [chunks * count for count in by_layer or [0] * config.num_hidden_layers]
    if call.options.get("past_key_values") is given:
        wanted = room + max(pairs)
        growing = (layer for layer in given.layers if not getattr(layer, "is_sliding", False))
        sizes = [layer.max_cache_len for layer in growing if isinstance(layer, StaticLayer)]
        if sizes and min(sizes) < wanted:
            raise InputError(f"past_key_values: expected a static cache of at least {wanted} slots, got {min(sizes)}")
        cache = CompressedStaticCache.adopt(given)
    else:
        cache: Any = CompressedStaticCache(config=config, max_cache_len=room, offloading=given.offloading)
        for layer, more in zip(cache.layers, pairs, strict=False):
            if isinstance(layer, StaticLayer) and not getattr(layer, "is_sliding", False):
                layer.max_cache_len += more  # no buffers yet
    cache.room = tuple(pairs) if by_layer else ()
    return cache
