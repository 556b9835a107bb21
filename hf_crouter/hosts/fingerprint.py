"""Which host, which crouter: hashes of weights that do not change with the dtype they are loaded in."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from typing import Any

import torch
from accelerate.utils import align_module_device

from ..errors import InputError
from ..utils.hashing import bfloat16_bytes
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
    embedding: Any = host.get_input_embeddings()
    while hasattr(embedding, "base_layer"):
        embedding = embedding.base_layer
    digest.update(_rows(embedding, "weight", EMBEDDING_ROWS))
    weights = {}
    for name, _ in host.named_parameters():
        if "lora_" in name or ".modules_to_save." in name:
            continue
        weights["." + name.replace(".base_layer", "").replace(".original_module", "")] = name
    norms = [n for n in weights if not LAYER.search(n) and n.endswith(FINAL_NORMS)]
    layers = {name: int(LAYER.search(name)[1]) for name in weights if QUERY_KEY_VALUE.search(name)}  # pyright: ignore
    ends = (min(layers.values(), default=0), max(layers.values(), default=0))
    for name in [*norms[-1:], *(name for name, layer in layers.items() if layer in ends)]:
        path, _, leaf = weights[name].rpartition(".")
        digest.update(_rows(host.get_submodule(path), leaf, LAYER_ROWS))
    return digest.hexdigest()[:32]


def _rows(module: Any, name: str, count: int) -> bytes:
    """Some rows of a module's weight, or all of a vector; an offloaded one comes into memory for it, alone."""
    weight = getattr(module, name)
    away = weight.device.type == "meta" and hasattr(module, "_hf_hook")
    with align_module_device(module, execution_device=torch.device("cpu")) if away else contextlib.nullcontext():
        weight = getattr(module, name)
        if weight.device.type == "meta":
            raise InputError(
                f"host: expected weights, got none in {name} of {type(module).__name__} (the meta device)"
            )
        rows = torch.linspace(0, len(weight) - 1, len(weight) if weight.ndim < 2 else min(count, len(weight))).long()
        return bfloat16_bytes(weight.detach()[rows.to(weight.device)])
