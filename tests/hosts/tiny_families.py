"""Tiny random hosts of every decoder family that transformers can build offline."""

import inspect

import torch
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..tiny import VOCAB


def names(text):
    return frozenset(text.split())


# what is not a decoder of text by itself: encoders, halves of encoder-decoders, other inputs and outputs
NOT_DECODERS = names("""
    bart beam bert bert-generation big_bird bigbird_pegasus blenderbot blenderbot-small blt camembert
    data2vec-text electra ernie gemma4_assistant gemma4_unified_assistant git marian mbart megatron-bert
    moss_transcribe_diarize musicgen musicgen_melody mvp pegasus plbart prophetnet rembert roberta
    roberta-prelayernorm roc_bert roformer trocr whisper xlm xlm-roberta xlm-roberta-xl xlnet xmod got_ocr2
    phi4_multimodal fuyu dots3_note emu3 moshi
""")
# names that load the class of another family with its text configuration nested, and vision beside it
NESTED = names("""
    gemma3 gemma3n gemma4 gemma4_unified llama4 mllama qwen3_5 qwen3_5_moe qwen4_exp
""")

SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "initializer_range": 0.3,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sliding_window": 12,
    "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 512, "n_inner": 48, "d_model": 32, "n_heads": 4,
    "n_layers": 2, "max_seq_len": 512, "expansion_ratio": 2, "ffn_dim": 48, "word_embed_proj_dim": 32, "num_layers": 2,
    "attention_heads": 4, "rotary_dim": 4, "num_heads": 4,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "n_shared_experts": 1, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "moe_num_experts": 4,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_head_dim": 8, "linear_num_heads": 4,
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_expand": 2,
    "mamba_chunk_size": 16, "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1,
    "chunk_size": 16, "expand": 2, "state_size": 8,
}  # fmt: skip
LINEAR = {"num_hidden_layers": 4, "layer_types": [*["linear_attention"] * 3, "full_attention"]}
MLA = {"head_dim": None, "num_key_value_heads": 4}
CHANGES = {
    "axk1": MLA,
    "axk2": MLA,
    "bailing_hybrid": {**LINEAR, "num_key_value_heads": 4},
    "bamba": {"num_hidden_layers": 3, "attn_layer_indices": [1]},
    "ctrl": {"dff": 48},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48},
    },
    "deepseek_v2": MLA,
    "deepseek_v3": MLA,
    "deepseek_v32": MLA,
    "dots3_note_text": {"num_key_value_heads": 4},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCAB,
        "laurel_rank": 4,
        "activation_sparsity_pattern": None,
    },
    "gemma4_text": {"vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8},
    "glm4_moe_lite": MLA,
    "glm_moe_dsa": MLA,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 12},
    "granitemoehybrid": {
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "full_attention"] + ["linear_attention"],
    },
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {**LINEAR, "num_key_value_heads": 4},
    "lfm2": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
    "lfm2_moe": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "lfm3": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
    "longcat_flash": {"num_key_value_heads": 4, "head_dim": 8},
    "mamba2": {"head_dim": 16},
    "minicpm3": MLA,
    "nemotron_h": {
        "time_step_min": 1e-12,
        "layers_block_type": ["mamba", "attention", "mlp", "mamba"],
        "moe_shared_expert_intermediate_size": 16,
    },
    "olmo_hybrid": LINEAR,
    "qwen3_5_moe_text": LINEAR,
    "qwen3_5_text": LINEAR,
    "qwen3_next": LINEAR,
    "qwen4_exp_text": LINEAR,
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 64},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [8, 24], "axial_pos_shape": [8, 8]},
    "youtu": MLA,
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "attention_head_dim": 16,
        "mamba_dt_rank": 4,
    },
    "zamba2": {
        "num_hidden_layers": 3,
        "layers_block_type": ["mamba", "hybrid", "mamba"],
        "num_key_value_heads": 4,
        "time_step_min": 1e-12,
        "n_mamba_heads": 4,
        "mamba_d_state": 8,
    },
    "zaya": {"num_experts_per_tok": 1},
}


def text_families() -> list[str]:
    """Names of all families of this transformers that are decoders of text."""
    return [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in NOT_DECODERS | NESTED]


def tiny_config(model_type, **changes):
    cls = CONFIG_MAPPING[model_type]
    known = set(inspect.signature(cls.__init__).parameters)
    for base in cls.__mro__:
        known |= set(getattr(base, "__annotations__", {}))
    aliases = cls.attribute_map or {}
    known |= set(aliases)
    values = {key: value for key, value in SHAPE.items() if key in known}
    if getattr(cls, "sliding_window", None) is None:
        values.pop("sliding_window", None)  # a family that slides only where it is asked to
    for alias, name in aliases.items():
        if alias in values and name in values:
            del values[alias]
    values.update(CHANGES.get(model_type, {}))
    values.update(changes)
    values = {key: value for key, value in values.items() if value is not None}
    config = cls(**values)
    if set(getattr(config, "layer_types", None) or ()) == {"sliding_attention"} and "layer_types" in known:
        kinds = ["sliding_attention", "full_attention"]
        config = cls(**{**values, "layer_types": kinds * (config.num_hidden_layers // 2)})
    return config


def tiny_family(model_type, seed=0, **changes):
    """A host of a family; `changes` of its text configuration."""
    config = tiny_config(model_type, **changes)
    torch.manual_seed(seed)
    host = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])(config)
    with torch.no_grad():
        for name, weight in host.named_parameters():
            flat = weight.ndim > 1 and "conv" not in name and weight.std() < 0.05
            if flat or not weight.any():
                weight.normal_(std=0.2)
    host.generation_config.eos_token_id = None
    host.generation_config.pad_token_id = 0
    host.generation_config.use_cache = True
    return host.eval()
