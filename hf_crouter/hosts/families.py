"""Families of hosts: what was tried of each, or why it is refused.

The one list: it feeds the tests (`tests/hosts/test_families.py` runs nine checks on a tiny random host of each, and
one more where `Compact` can read it), the table in `docs/hosts.md`, `hf-crouter doctor` and the text of refusals. A
family that is not in it is tried against the plain host at first use (`probe.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import transformers
from packaging.version import Version
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..errors import InputError
from .attention import EAGER, sliding_layers

CHECKS = (
    "short prompts are bit-identical",
    "every step of a long one equals a forward from scratch",
    "copying equals brute force",
    "sampling",
    "beams",
    "padded batches",
    "prompt lookup",
    "static caches",
    "`score`",
)


@dataclass(frozen=True)
class Family:
    """A `model_type` of transformers.

    Attributes:
        name: the `model_type`.
        kind: `attention`, where some layers may slide; `hybrid`, with recurrent or convolutional layers between;
            `images`, a text model that sees images as well; or `recurrent`.
        without: numbers of the checks, from 0, that the plain host itself does not pass or refuses.
        note: what a user should know.
        refused: why; empty for a family that is served.
        since: the transformers in which the plain host reads right; before, it is tried like an unknown family.
        compact: why its key-value pairs cannot be compacted; empty where they can, or where it is refused anyway.
    """

    name: str
    kind: str = "attention"
    without: tuple[int, ...] = ()
    note: str = ""
    refused: str = ""
    since: str = ""
    compact: str = ""


_PADDED, _DRAFTS, _STATIC = 5, 6, 7
_STATE = "keeps a state instead of slots, out of which nothing can be taken"
_PIECES = "reads a text in two pieces differently from one: its recurrent layers forget their state"
_OWN = "keeps a cache of its own, not transformers'"


def _names(text: str) -> list[str]:
    return text.split()


_ATTENTION = _names("""
    afmoe apertus arcee aria_text axk1 axk2 beam biogpt bitnet bloom codegen cohere cohere2 cohere2_moe
    cohere_compass_text ctrl cwm dbrx deepseek_v2 deepseek_v3 deepseek_v32 diffllama dots1 dots3_note_text
    emu3_text_model ernie4_5 ernie4_5_moe exaone4 exaone_moe falcon flex_olmo flint gemma gemma2 gemma3_text
    gemma4_unified_text glm glm4 glm4_moe glm4_moe_lite glm_moe_dsa gpt-sw3 gpt2 gpt_bigcode gpt_neox
    gpt_neox_japanese gpt_oss gptj granite granite_swa granitemoe granitemoe_swa granitemoeshared helium hrm_text
    hunyuan_v1_dense hunyuan_v1_moe hy_v3 hy_v4 hyperclovax internlm3 iquestcoder jais2 jetmoe kolibri1 laguna
    llama llama4_text longcat_flash mellum mimo_v2_flash minicpm3 minimax_m2 ministral ministral3 mistral mixtral
    modernbert-decoder nanochat nemotron olmo olmo2 olmo3 olmoe opt persimmon phi phi3 phimoe qwen2
    qwen2_moe qwen3 qwen3_moe seed_oss smollm3 solar_open stablelm starcoder2 vaultgemma xglm youtu
""")
_HYBRID = _names("""
    bailing_hybrid bamba falcon_h1 granitemoehybrid kimi_linear nemotron_h olmo_hybrid qwen3_5_moe_text
    qwen3_5_text qwen3_next qwen4_exp_text zamba2 zaya
""")
_IMAGES = _names("""
    aya_vision exaone4_5 gemma3 gemma4 glm4v idefics3 internvl kimi_k25 lfm2_vl llama4 llava llava_next
    llava_onevision mistral3 mllama qwen2_5_vl qwen2_vl qwen3_vl qwen3_vl_moe smolvlm
""")
_TEXT_ALONE = "text alone: a call with images is refused where something would be compressed"
_LOOKS_UP = "its layers look token ids up: no soft prompts"

_RECURRENT = "has recurrent layers, for whose states no pairs can stand"
_HIDES = "hides its queries in attention of its own"
_ALIBI = "hides its queries in attention of its own, with ALiBi"
_LATENTS = "caches latents, and makes its keys of them at every step"
_INDEX = "chooses by an index what its layers attend to"
_CHUNKED = "has layers that attend within chunks"
_NO_PAIRS = {
    **dict.fromkeys(_names("codegen doge falcon gpt_neo gpt_neox_japanese gptj xglm"), _HIDES),
    **dict.fromkeys(_names("bloom mpt"), _ALIBI),
    **dict.fromkeys(
        _names("axk1 deepseek_v2 deepseek_v3 glm4_moe_lite kimi_k25 longcat_flash minicpm3 youtu"), _LATENTS
    ),
    **dict.fromkeys(
        _names("axk2 deepseek_v32 dots3_note_text glm_moe_dsa hy_v4 minimax_m3_vl_text qwen4_exp qwen4_exp_text"),
        _INDEX,
    ),
    **dict.fromkeys(_names("lfm2_vl qwen3_5 qwen3_5_moe"), _RECURRENT),
    **dict.fromkeys(_names("inkling2_text inkling_text"), "adds a bias to its products, and has recurrent layers"),
    **dict.fromkeys(_names("llama4 llama4_text"), _CHUNKED),
    "deepseek_v4": "compresses its older keys itself",
    "diffllama": "attends twice in each layer, each time to half of its values",
    "gemma3n_text": "has layers that read the keys of others",
    "hrm_text": "reads through its layers more than once",
    "jetmoe": "repeats its keys for experts after it has cached them",
    "mllama": "passes over its layers of cross-attention in a text alone",
    "moshi": "has a cache that slides in every layer, though its attention does not",
}


def _why_not_compact(family: Family) -> str:
    if family.refused:
        return ""
    return _NO_PAIRS.get(family.name, _RECURRENT if family.kind == "hybrid" else "")


FAMILIES: dict[str, Family] = {
    family.name: replace(family, compact=_why_not_compact(family))
    for family in (
        *(Family(name) for name in _ATTENTION),
        *(Family(name, "hybrid", (_DRAFTS,)) for name in _HYBRID),
        *(Family(name, "hybrid") for name in ("lfm2", "lfm2_moe", "lfm3")),
        *(Family(name, "images", note=_TEXT_ALONE) for name in _IMAGES),
        *(Family(name, "images", (_DRAFTS,), note=_TEXT_ALONE) for name in ("qwen3_5", "qwen3_5_moe", "qwen4_exp")),
        Family("minimax_m3_vl_text", without=(_PADDED,)),
        *(Family(name, without=(_STATIC,)) for name in ("inkling2_text", "inkling_text")),
        Family("doge", since="5.23", note="transformers 5.23 or later: before, its attention is not causal"),
        Family("moshi", since="5.23", note="transformers 5.23 or later: before, it misreads a second piece"),
        Family("gpt_neo", without=(_STATIC,)),
        Family("deepseek_v4", without=(_PADDED, _DRAFTS, _STATIC), note=_LOOKS_UP),
        Family("mpt", note="its `use_cache` is False by default: pass `use_cache=True`"),
        Family("gemma3n_text", note=_LOOKS_UP),
        Family("gemma4_text", note="with per-layer embeddings no soft prompts"),
        *(Family(name, "recurrent", refused=_STATE) for name in ("falcon_mamba", "mamba", "mamba2", "rwkv", "xlstm")),
        *(Family(name, "hybrid", refused=_PIECES) for name in ("jamba", "recurrent_gemma", "zamba")),
        Family("minimax", "hybrid", refused=_OWN),
        Family("reformer", refused=_OWN),
        Family("cpmant", refused="puts slots of its own before every text"),
        Family("blt", refused="cannot read on from a cache"),
        Family("paligemma", "images", refused="reads a prompt in both directions"),
        Family("openai-gpt", refused="reads every text anew, without a cache"),
    )
}


def family_of(host_or_config: Any) -> Family | None:
    """The family of a host, by its `model_type`; None for one that is not in the list."""
    return FAMILIES.get(getattr(host_or_config, "config", host_or_config).model_type)


def is_tested(host: Any) -> bool:
    """Whether it is one of the list's, with transformers' own code, in a version that reads it right."""
    family = family_of(host)
    if family is None or not type(host).__module__.startswith("transformers.models."):
        return False
    return not family.since or Version(transformers.__version__) >= Version(family.since)


def looks_ids_up(host_or_config: Any) -> bool:
    """Whether layers of a host need the token ids beside their embeddings."""
    config = getattr(host_or_config, "config", host_or_config).get_text_config(decoder=True)
    return bool(getattr(config, "hidden_size_per_layer_input", 0)) or config.model_type == "deepseek_v4"


def check_family(host: Any) -> None:
    """Refuses a host of a family whose past cannot be read compressed.

    Raises:
        InputError: names the host and why.
    """
    family = family_of(host) or FAMILIES.get(host.config.get_text_config(decoder=True).model_type)
    why = family.refused if family is not None else ""
    if not why and not host._supports_default_dynamic_cache():
        why = _OWN
    if why:
        raise InputError(
            f"host: expected a decoder whose past can be read compressed, got {type(host).__name__}, which {why}"
        )


def check_compact(host: Any) -> None:
    """Refuses a host whose key-value pairs cannot be compacted: what its layers attend to must stand in its cache.

    Raises:
        InputError: names the host and why.
    """
    name, attention = type(host).__name__, host.config.get_text_config(decoder=True)._attn_implementation
    why = next(_no_pairs(host), "")
    if why:
        raise InputError(f"host: expected one whose key-value pairs can be compacted, got {name}, which {why}")
    if attention not in (EAGER, "sdpa"):
        raise InputError(
            f"host: expected sdpa or eager attention to compact key-value pairs, got {attention} in {name}"
        )


def _no_pairs(host: Any) -> Iterator[str]:
    """Why pairs of a host cannot be compacted: what is known of its family, and what its configuration says."""
    config = host.config.get_text_config(decoder=True)
    for family in (family_of(host), family_of(config)):
        if family is not None and family.compact:
            yield family.compact
    if getattr(config, "kv_lora_rank", None):
        yield _LATENTS
    if getattr(config, "num_kv_shared_layers", None):
        yield "has layers that read the keys of others"
    caches = DynamicCache(config=config)
    if any(caches.is_linear):
        yield _RECURRENT
    kinds = sorted({*(getattr(config, "layer_types", None) or ())} - {"full_attention", "sliding_attention"})
    if kinds:
        yield f"has layers of the kind {kinds[0]!r}"
    others = {type(layer) for layer in caches.layers} - {DynamicLayer, DynamicSlidingWindowLayer}
    if others:
        yield f"keeps {min(other.__name__ for other in others)} in its cache"
    if all(sliding_layers(host)):
        yield "has no layer that looks further back than its sliding window"
