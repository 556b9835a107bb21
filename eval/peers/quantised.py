"""The platform's cheap choice: the whole cache in 4 or 2 bits, as `QuantizedCache` of transformers holds it.

Its backend here is HQQ: all in PyTorch, where quanto compiles a CUDA extension when it first unpacks. Groups of 64
values of one token and head share a scale and a zero (axis 1, which transformers recommends for HQQ). What is read
after the context in one pass is not quantised, nor are fewer than 128 generated tokens, as in `QuantizedCache`.

Keys of some hosts, Qwen2's with their biases, differ far more between channels than between tokens. So there is the
same with keys whose groups are 64 tokens of one channel, as the paper has it that the platform follows (KIVI).
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import DynamicCache, cache_utils

from eval.peers.rows import BadInput

AXES = {"axis_key": 1, "axis_value": 1}
FILL = 64  # tokens of which a multiple is quantised: HQQ packs 2 bits only where groups come in fours


def quantised_layer(bits: int, like: torch.Tensor) -> Any:
    """A layer of a `QuantizedCache`.

    Args:
        bits: of a value.
        like: keys or values that it will hold.

    Raises:
        BadInput: HQQ is not installed.
    """
    try:
        layer = cache_utils.HQQQuantizedLayer(nbits=bits, **AXES)
    except ImportError:
        raise BadInput(f"full_quantised{bits}: expected hqq 0.2.8.post1 to be installed, found none") from None
    if len(inspect.signature(layer.lazy_initialization).parameters) > 1:
        layer.lazy_initialization(like, like)
    else:
        layer.lazy_initialization(like)
    return layer


def quantised(whole: Any, bits: int, channels: bool = False) -> tuple[DynamicCache, dict[int, torch.Tensor]]:
    """A cache of what a quantised one gives back, without its last position, as `attention.shortened`.

    Args:
        whole: a cache of `L` positions.
        bits: of a value.
        channels: whether a key's group is of one channel.
    """
    cache = DynamicCache()
    for index, layer in enumerate(whole.layers):
        how = quantised_layer(bits, layer.keys)
        parts, length = [], layer.keys.shape[2]
        for part, axis, turned in ((layer.keys, how.axis_key, channels), (layer.values, how.axis_value, False)):
            filled = torch.cat([part, part[:, :, -1:].expand(-1, -1, -length % FILL, -1)], 2)
            if turned:
                filled = filled.transpose(2, 3).contiguous()
            back = how._dequantize(how._quantize(filled, axis=axis))
            parts.append((back.transpose(2, 3) if turned else back)[:, :, : length - 1].to(part.dtype))
        cache.update(*parts, index)
    return cache, {}


def bytes_a_token(model: Any, bits: int | None) -> float:
    """Of a model's cache, whole or quantised, with scales and zeros; measured on 64 tokens."""
    config = model.config.get_text_config(decoder=True)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    part = torch.zeros(1, config.num_key_value_heads, 64, size, dtype=model.dtype, device=model.device)
    if bits is None:
        each = part.numel() * part.element_size()
    else:
        how = quantised_layer(bits, part)
        codes, meta = how._quantize(part, axis=how.axis_key)
        tensors = [codes, *(value for value in meta.values() if isinstance(value, torch.Tensor))]
        each = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return 2 * config.num_hidden_layers * each / 64
