"""Masks and positions of a cache's slots, as a host's forward wants them.

At compact positions slots are consecutive and the host makes its masks itself. At true positions its sliding layers
must not count slots: they see raw tokens by their positions, and no entries, of which they keep nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from transformers import StaticCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from ..hosts.devices import input_device
from .kv_cache import CompressedCache
from .layout import PAD


def slot_positions(layout: torch.Tensor, true_positions: bool) -> torch.Tensor:
    """Position of each slot, `[B, S]`; of padding and, at true positions, of entries any (0)."""
    if true_positions:
        return layout.clamp(min=0)
    return ((layout != PAD).long().cumsum(1) - 1).clamp(min=0)


def sliding_layers(host: Any) -> tuple[bool, ...]:
    """Which layers of a host attend to a sliding window alone; one a layer."""
    config = host.config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return (getattr(config, "sliding_window", None) is not None,) * config.num_hidden_layers
    return tuple(kind == "sliding_attention" for kind in kinds)


def mask_and_positions(
    host: Any, cache: CompressedCache, columns: int, device: torch.device
) -> tuple[torch.Tensor | dict[str, Any] | None, torch.Tensor]:
    """What goes with a forward over the last `columns` slots.

    Args:
        host: the plain host.
        cache: whose `layout` already holds these slots, though its layers do not.
        columns: slots of the forward.
        device: of the host's inputs.

    Returns:
        Mask of all slots `[B, S]`, None without padding, or one mask a kind of layers; and positions `[B, columns]`.
    """
    positions = slot_positions(cache.layout, cache.true_positions)
    real = cache.layout != PAD
    some = positions[:, positions.shape[1] - columns :]
    some = some.clone(memory_format=torch.contiguous_format).to(device)  # a changing stride would recompile every step
    mask = None if bool(real.all()) else real.long().to(device)
    if cache.true_positions and cache.has_key_values and any(sliding_layers(host)):
        return layer_masks(host, cache, cache.layout, columns, device, some), some
    return mask, some


def over_buffers(host: Any, cache: CompressedCache, mask: Any) -> Any:
    """A mask `[B, S]` as long as the keys of a static cache, for hosts that make their ALiBi of it (BLOOM).

    In decoding such a host's own `prepare_inputs_for_generation` does the same.
    """
    if not isinstance(cache, StaticCache) or not hasattr(host.base_model, "build_alibi_tensor"):
        return mask
    if mask is None:
        mask = (cache.layout != PAD).long().to(input_device(host))
    return F.pad(mask, (0, max(0, int(cache.get_max_length()) - mask.shape[1])))


def layer_masks(
    host: Any, past: Any, layout: torch.Tensor, columns: int, device: torch.device, positions: torch.Tensor
) -> dict[str, Any]:
    """Masks of a host with full and sliding layers at true positions, by kind.

    Args:
        host: the plain host.
        past: cache of the slots before the forward's.
        layout: codes of all slots, `[B, S]`.
        columns: slots of the forward, the last ones.
        device: of the host's inputs.
        positions: of the forward's slots, `[B, columns]`.
    """
    config = host.config.get_text_config(decoder=True)
    width = max(layout.shape[1], max(past.get_mask_sizes(columns, i)[0] for i in range(len(past.layers) or 1)))
    at = F.pad(slot_positions(layout, True), (0, width - layout.shape[1])).to(device)
    token = F.pad(layout >= 0, (0, width - layout.shape[1])).to(device)
    window = config.sliding_window

    def near(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return token[batch, key] & (at[batch, query] - at[batch, key] < window)

    inputs = {
        "config": config,
        "inputs_embeds": torch.empty(len(layout), columns, 0, dtype=host.dtype, device=device),
        "attention_mask": (layout != PAD).long().to(device),
        "past_key_values": past,
        "position_ids": positions,
    }
    return {
        "full_attention": create_causal_mask(**inputs),
        "sliding_attention": create_sliding_window_causal_mask(**inputs, and_mask_function=near),
    }
