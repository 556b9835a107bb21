"""Families whose GGUF files can be read: what their tensors and settings are called in transformers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import Gemma3TextConfig, LlamaConfig, PretrainedConfig, Qwen2Config

from ..errors import InputError

_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_PROJECTIONS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
}


@dataclass(frozen=True)
class Family:
    """How one architecture's GGUF files differ from transformers' checkpoints.

    Attributes:
        config: makes the configuration from the file's settings, common ones and own ones.
        names: a layer's modules, by their names in the file.
        interleaved: modules whose rows the file orders for a rotation of neighbours instead of halves.
        shifted: end of the names of weights that the file holds plus one.
        end_tokens: texts of tokens that end an answer besides the file's own end token.
    """

    config: Callable[[Mapping[str, Any], dict[str, Any]], PretrainedConfig]
    names: Mapping[str, str] = field(default_factory=lambda: {**_PROJECTIONS, "ffn_norm": "post_attention_layernorm"})
    interleaved: tuple[str, ...] = ()
    shifted: tuple[str, ...] = ()
    end_tokens: tuple[str, ...] = ()

    def tensor_name(self, name: str) -> str | None:
        """A tensor's name in transformers; None where the family has no such tensor."""
        found = _BLOCK.fullmatch(name)
        if found is None:
            return _OUTER.get(name)
        layer, module, leaf = found.groups()
        return f"model.layers.{layer}.{self.names[module]}.{leaf}" if module in self.names else None

    def interleaved_heads(self, name: str, config: PretrainedConfig) -> int:
        """Heads whose rows have to be put back in order in this tensor of the file; 0 for none."""
        found = _BLOCK.fullmatch(name)
        if found is None or found[2] not in self.interleaved:
            return 0
        return config.num_attention_heads if found[2] == "attn_q" else config.num_key_value_heads

    def is_shifted(self, name: str) -> bool:
        """Whether the file holds this tensor plus one."""
        return bool(self.shifted) and name.endswith(self.shifted)


def family_of(settings: Mapping[str, Any]) -> Family:
    """The family of a file.

    Raises:
        InputError: if there is none for it.
    """
    architecture = settings.get("general.architecture")
    if architecture not in FAMILIES:
        raise InputError(f"architecture: expected one of {', '.join(sorted(FAMILIES))}, got {architecture!r}")
    return FAMILIES[architecture]


def model_config(settings: Mapping[str, Any], *, vocab_size: int, tied: bool) -> PretrainedConfig:
    """A GGUF file's settings as a configuration of transformers.

    Args:
        settings: the file's, by their full names.
        vocab_size: rows of the embedding.
        tied: whether the file has no head of its own.

    Raises:
        InputError: if the architecture is unknown, or the rotary embedding is scaled.
        KeyError: if a setting is missing.
    """
    family = family_of(settings)
    own = _own(settings)
    scaling = own.get("rope.scaling.type", "none")
    if scaling != "none":
        raise InputError(f"rope.scaling.type: expected none, got {scaling!r}")
    heads, width = own["attention.head_count"], own["embedding_length"]
    tokens = {"bos": "bos", "eos": "eos", "padding": "pad", "unknown": "unk"}
    common = {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": own["feed_forward_length"],
        "num_hidden_layers": own["block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": own.get("attention.head_count_kv", heads),
        "max_position_embeddings": own["context_length"],
        # stored as float32, printed as such
        "rms_norm_eps": float(f"{own['attention.layer_norm_rms_epsilon']:.6g}"),
        "tie_word_embeddings": tied,
        **{f"{name}_token_id": settings.get(f"tokenizer.ggml.{key}_token_id") for key, name in tokens.items()},
    }
    if common["unk_token_id"] is None:
        del common["unk_token_id"]  # configurations have no such field of their own
    return family.config(own, common)


def _own(settings: Mapping[str, Any]) -> dict[str, Any]:
    prefix = settings["general.architecture"] + "."
    return {name.removeprefix(prefix): value for name, value in settings.items() if name.startswith(prefix)}


def _rope(own: Mapping[str, Any], default: float = 10_000.0) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": float(own.get("rope.freq_base", default))}


def _llama(own: Mapping[str, Any], common: dict[str, Any]) -> PretrainedConfig:
    even = common["hidden_size"] // common["num_attention_heads"]
    head_dim = own.get("attention.key_length", own.get("rope.dimension_count", even))
    return LlamaConfig(**common, head_dim=head_dim, rope_parameters=_rope(own))


def _qwen2(own: Mapping[str, Any], common: dict[str, Any]) -> PretrainedConfig:
    return Qwen2Config(**common, use_sliding_window=False, rope_parameters=_rope(own))


def _gemma3(own: Mapping[str, Any], common: dict[str, Any]) -> PretrainedConfig:
    layers, head_dim = common["num_hidden_layers"], own["attention.key_length"]
    every = own.get("attention.sliding_window_pattern", 6)  # every sixth layer sees everything
    # The 27B model alone scales attention by another number; files do not state it.
    scale = common["hidden_size"] // common["num_attention_heads"] if layers == 62 else head_dim
    kinds = ["sliding_attention" if (layer + 1) % every else "full_attention" for layer in range(layers)]
    local = {"rope_type": "default", "rope_theta": float(own.get("rope.freq_base_swa", 10_000.0))}
    return Gemma3TextConfig(
        **common,
        head_dim=head_dim,
        query_pre_attn_scalar=scale,
        sliding_window=own["attention.sliding_window"],
        layer_types=kinds,
        rope_parameters={"full_attention": _rope(own, 1_000_000.0), "sliding_attention": local},
    )


FAMILIES: dict[str, Family] = {
    "llama": Family(_llama, interleaved=("attn_q", "attn_k")),
    "qwen2": Family(_qwen2, end_tokens=("<|endoftext|>",)),
    "gemma3": Family(
        _gemma3,
        names={
            **_PROJECTIONS,
            "attn_q_norm": "self_attn.q_norm",
            "attn_k_norm": "self_attn.k_norm",
            "post_attention_norm": "post_attention_layernorm",
            "ffn_norm": "pre_feedforward_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        },
        shifted=("norm.weight",),
    ),
}
"""By the architecture's name in GGUF files."""
