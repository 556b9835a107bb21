"""Which host, which crouter: hashes of weights that do not change with the dtype they are loaded in."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from typing import Any

import torch

from ..errors import InputError
from ..utils.hashing import bfloat16_bytes
from .devices import offload_hooks, plain_module
from .unwrap import unwrap

EMBEDDING_ROWS = 64
LAYER_ROWS = 8
FINAL_NORMS = ("norm.weight", "ln_f.weight", "final_layer_norm.weight", "final_layernorm.weight", "norm_f.weight")
QUERY_KEY_VALUE = re.compile(r"\.(q_proj|k_proj|v_proj|qkv_proj|query_key_value|c_attn|Wqkv|qkv)\.weight$")
LAYER = re.compile(r"\.(\d+)\.")


def host_fingerprint(model: Any) -> str:
    """SHA-256 (first 32 hexadecimal digits) of a host's shape and of samples of its weights, cast to bfloat16.

    Equal for the same weights in bfloat16 or float32, wrapped or not, with or without (unmerged) adapters, in memory
    or offloaded by accelerate.

    Args:
        model: host, wrapped or plain.

    Raises:
        InputError: no decoder, or one without weights (on the meta device).
    """
    host = unwrap(model)
    config = host.config.get_text_config(decoder=True)
    shape = [
        config.model_type,
        *(
            getattr(config, name, None)
            for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
        ),
    ]
    digest = hashlib.sha256(json.dumps(shape).encode())
    embedding = plain_module(host.get_input_embeddings())
    path = next(name for name, module in host.named_modules() if module is embedding)
    digest.update(_rows(host, f"{path}.weight", EMBEDDING_ROWS))
    weights = {}
    for name, _ in host.named_parameters():
        if "lora_" in name or ".modules_to_save." in name:
            continue
        weights["." + name.replace(".base_layer", "").replace(".original_module", "")] = name
    norms = [n for n in weights if not LAYER.search(n) and n.endswith(FINAL_NORMS)]
    layers = {name: int(LAYER.search(name)[1]) for name in weights if QUERY_KEY_VALUE.search(name)}  # pyright: ignore
    ends = (min(layers.values(), default=0), max(layers.values(), default=0))
    for name in [*norms[-1:], *(name for name, layer in layers.items() if layer in ends)]:
        digest.update(_rows(host, weights[name], LAYER_ROWS))
    return digest.hexdigest()[:32]


def _rows(host: Any, name: str, count: int) -> bytes:
    """Some rows of a weight, or all of a vector."""
    weight = _weight(host, name)
    rows = torch.linspace(0, len(weight) - 1, len(weight) if weight.ndim < 2 else min(count, len(weight))).long()
    return bfloat16_bytes(weight.detach()[rows.to(weight.device)])


def _weight(host: Any, name: str) -> torch.Tensor:
    """A weight in memory: the host's, or what a hook would bring in, which is read alone."""
    path, _, leaf = name.rpartition(".")
    weight = getattr(host.get_submodule(path), leaf)
    if weight.device.type != "meta":
        return weight
    for below, hook in offload_hooks(host, path):
        with contextlib.suppress(KeyError):
            if (held := getattr(hook, "weights_map", None)) is not None:
                return held[f"{below}.{leaf}" if below else leaf]
    raise InputError(f"host: expected weights, got none in {name} (the meta device)")
