"""Which host: a hash of its weights that does not change with their dtype, and its architecture, which has no weights.

The first tells this very copy from every other. The second is what copies of a model share: the hub's weights, the
same ones at four bits, a fine-tune.
"""

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
SHAPE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
         "intermediate_size", "num_experts")  # fmt: skip
EMBEDDINGS = ("model_type", "embeddings")  # what input embeddings that are made for a host depend on
ARCHITECTURE = (*EMBEDDINGS, *SHAPE, "positions")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")  # as families call them


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


def host_architecture(model: Any) -> str:
    """A host's `ARCHITECTURE` as "name=value" words, such as "model_type=llama embeddings=49152x576 hidden_size=576".

    `embeddings` is the input embeddings' shape, vocabulary x width; `positions` the family of position encodings, not
    its base or scaling, which a fine-tune for longer texts changes. A word that a family has no value for is left out.
    No weight is read: the same for an offloaded host and one on the meta device.

    Args:
        model: host, wrapped or plain.

    Raises:
        InputError: no decoder.
    """
    host = unwrap(model)
    config = host.config.get_text_config(decoder=True)
    values = {name: getattr(config, name, None) for name in SHAPE}
    heads = values["num_attention_heads"]
    if values["num_key_value_heads"] is None:
        values["num_key_value_heads"] = heads
    if values["head_dim"] is None and isinstance(heads, int) and isinstance(values["hidden_size"], int):
        values["head_dim"] = values["hidden_size"] // max(1, heads)
    values["num_experts"] = next((n for n in (getattr(config, name, None) for name in EXPERTS) if n is not None), None)
    values |= {"model_type": config.model_type, "embeddings": _embeddings(host), "positions": _positions(config)}
    return " ".join(f"{name}={_word(values[name])}" for name in ARCHITECTURE if values[name] is not None)


def architecture_fields(architecture: str) -> dict[str, str]:
    """The values by name, of what `host_architecture` wrote."""
    return {name: value for name, _, value in (word.partition("=") for word in architecture.split())}


def _embeddings(host: Any) -> str:
    """Vocabulary x width; of packed or sharded weights, whose own shape says nothing, as the module states it."""
    embedding = plain_module(host.get_input_embeddings())
    shape = tuple(embedding.weight.shape)
    if len(shape) != 2 or not embedding.weight.is_floating_point():
        shape = (embedding.num_embeddings, embedding.embedding_dim)
    return f"{shape[0]}x{shape[1]}"


def _positions(config: Any) -> str | None:
    if getattr(config, "alibi", False):
        return "alibi"
    return "rope" if getattr(config, "rope_parameters", None) else getattr(config, "position_embedding_type", None)


def _word(value: Any) -> str:
    """A value without white space; of a list of one value a layer that are all the same, that value."""
    if isinstance(value, list | tuple):
        value = value[0] if len(set(map(str, value))) == 1 else list(value)
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"), default=str)


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
