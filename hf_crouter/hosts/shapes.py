"""Bytes by the shapes that a host's configuration names."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig


def kv_bytes(config: PretrainedConfig, dtype: torch.dtype | None = None) -> int:
    """Bytes of keys and values that one position takes in a host's cache.

    Args:
        config: of the host.
        dtype: of the cache; as the host was saved by default.
    """
    return config.get_text_config(decoder=True).num_hidden_layers * layer_kv_bytes(config, dtype)


def layer_kv_bytes(config: PretrainedConfig, dtype: torch.dtype | None = None) -> int:
    """The same of one layer."""
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    saved = dtype or getattr(text, "dtype", None) or torch.bfloat16
    return 2 * heads * head_size(config) * saved.itemsize


def head_size(config: PretrainedConfig) -> int:
    """Numbers of a head."""
    text = config.get_text_config(decoder=True)
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
