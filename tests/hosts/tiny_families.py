"""Tiny random hosts of every decoder family that transformers can build offline: `TEXT`, and `IMAGE` with a tower."""

from dataclasses import fields
from functools import partial

import torch
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from ..tiny import VOCAB


def names(text):
    return frozenset(text.split())


# encoders, halves of encoder-decoders, and what needs another model's states, images or sound
NOT_DECODERS = names("""
    bart bert bert-generation big_bird bigbird_pegasus blenderbot blenderbot-small camembert data2vec-text electra
    ernie gemma4_assistant gemma4_unified_assistant git marian mbart megatron-bert moss_transcribe_diarize musicgen
    musicgen_melody mvp pegasus plbart prophetnet rembert roberta roberta-prelayernorm roc_bert roformer trocr whisper
    xlm xlm-roberta xlm-roberta-xl xlnet xmod
""")
# names whose configuration nests the text's: built by the text's own name, or in IMAGE
NESTED = names("""
    dots3_note fuyu gemma3 gemma3n gemma4 gemma4_unified got_ocr2 llama4 mllama phi4_multimodal qwen3_5
    qwen3_5_moe qwen4_exp
""")
IMAGE_FAMILIES = names("""
    aya_vision exaone4_5 gemma3 gemma4 glm4v idefics3 internvl kimi_k25 lfm2_vl llama4 llava llava_next
    llava_onevision mistral3 mllama paligemma qwen2_5_vl qwen2_vl qwen3_5 qwen3_5_moe qwen3_vl qwen3_vl_moe qwen4_exp
    smolvlm
""")
VARIANTS = {"falcon_alibi": ("falcon", {"alibi": True})}  # of a family, by another name

SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "initializer_range": 0.3,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sliding_window": 12,
    "sliding_window_size": 12, "attention_chunk_size": 16,
    # the same under other names
    "n_embd": 32, "d_model": 32, "hidden_dim": 32, "n_head": 4, "n_heads": 4, "num_heads": 4, "attention_heads": 4,
    "n_layer": 2, "n_layers": 2, "num_layers": 2, "n_positions": 256, "max_seq_len": 256, "n_inner": 48, "dff": 48,
    "dim_ff": 48, "ffn_dim": 48, "dim_head": 8, "word_embed_proj_dim": 32, "expansion_ratio": 2, "rotary_dim": 4,
    "init_std": 0.3, "prompt_length": 4,
    # experts
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "shared_intermediate_size": 16,
    "shared_experts_intermediate_size": 16, "dense_intermediate_size": 48, "intermediate_size_mlp": 48,
    "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "expert_ffn_hidden_size": 16,
    "router_hidden_size": 16, "zero_expert_num": 2, "moe_topk": 2, "ffn_hidden_size": 48,
    # latent and indexed attention
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "o_lora_rank": 8, "o_groups": 2, "index_n_heads": 16, "index_head_dim": 16, "index_topk": 24,
    # recurrences
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_head_dim": 8, "linear_num_heads": 4, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8,
    "mamba_n_groups": 1, "mamba_expand": 2, "mamba_chunk_size": 16, "mamba_num_heads": 4, "mamba_head_dim": 16,
    "ssm_state_size": 8, "n_groups": 1, "chunk_size": 16, "expand": 2, "state_size": 8,
}  # fmt: skip
TOWER = {
    "hidden_size": 32, "embed_dim": 32, "intermediate_size": 48, "num_hidden_layers": 2, "depth": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "num_heads": 4, "head_dim": 8, "image_size": 28,
    "patch_size": 14, "out_hidden_size": 32, "projection_dim": 32, "vision_output_dim": 32, "projector_input_dim": 32,
    "projector_output_dim": 32, "deepstack_visual_indexes": [0], "fullatt_block_indexes": [1],
    "num_position_embeddings": 16, "position_embedding_size": 64, "initializer_range": 0.3,
}  # fmt: skip

LINEAR = {"num_hidden_layers": 4, "layer_types": [*["linear_attention"] * 3, "full_attention"]}
LATENT = {"num_key_value_heads": 4}  # one key head for each query head
CONVOLVED = {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]}
SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
INKLING = {
    "layer_types": ["hybrid_sliding", "hybrid"], "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2,
    "swa_head_dim": 8, "d_rel": 4, "rel_extent": 64, "unpadded_vocab_size": VOCAB,
}  # fmt: skip
BYTES = {
    "vocab_size": VOCAB, "hidden_size": 32, "hidden_size_global": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "initializer_range": 0.3,
}  # fmt: skip
CHANGES = {
    "axk1": LATENT,
    "axk2": LATENT,
    "bailing_hybrid": {**LINEAR, "num_key_value_heads": 4},
    "bamba": {"num_hidden_layers": 3, "attn_layer_indices": [1]},
    "blt": {
        "encoder_hash_byte_group_vocab": 64, "patching_mode": "static",
        **{part: BYTES for part in ("patcher_config", "encoder_config", "decoder_config", "global_config")},
    },
    "cohere": {"logit_scale": 1.0},
    "cohere2": {"logit_scale": 1.0},
    "cohere2_moe": {"logit_scale": 1.0},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {kind: SECTIONS for kind in ("sliding_attention", "full_attention")},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48},
    },
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "deepseek_v32": LATENT,
    "deepseek_v4": {
        "num_hidden_layers": 3, "num_key_value_heads": 1,
        "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
    },
    "dots3_note_text": {
        "num_key_value_heads": 4, "head_dim": 16, "sliding_window": 12,
        "layer_types": ["indexed_attention", "sliding_attention"],
        "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_head_dim": 16, "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8,
        "index_topk": 2048,  # otherwise an exact tie of index scores
    },
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {
        "num_hidden_layers": 4, "num_kv_shared_layers": 2, "laurel_rank": 4, "activation_sparsity_pattern": None,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB,
    },
    "gemma4_text": {"vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8, "global_head_dim": 8},
    "gemma4_unified_text": {"global_head_dim": 8},
    "glm4_moe_lite": LATENT,
    "glm4v_text": {"rope_parameters": SECTIONS},
    "glm_moe_dsa": LATENT,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 12},
    "granitemoehybrid": {
        "num_hidden_layers": 3, "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    },
    "hy_v4": LATENT,
    "inkling2_text": INKLING,
    "inkling_text": {**INKLING, "logits_mup_width_multiplier": 1.0},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {**LINEAR, "num_key_value_heads": 4},
    "lfm2": CONVOLVED,
    "lfm2_moe": {**CONVOLVED, "num_dense_layers": 1},
    "lfm3": CONVOLVED,
    "llama4_text": {"layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 0]},
    "longcat_flash": {"num_key_value_heads": 4},
    "mamba2": {"head_dim": 16, "num_hidden_layers": 4},
    "minicpm3": {**LATENT, "dim_model_base": 32},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"], "index_block_size": 8, "index_topk_blocks": 3,
        "index_n_heads": 2,
    },
    "modernbert-decoder": {"local_attention": 24},
    "moshi": {"sliding_window": 256},  # its mask does not slide, its cache would
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention", "mlp", "moe", "mamba"], "time_step_min": 1e-12,
        "moe_shared_expert_intermediate_size": 16,
    },
    "olmo_hybrid": LINEAR,
    "qwen2_5_vl_text": {"rope_parameters": SECTIONS},
    "qwen2_vl_text": {"rope_parameters": SECTIONS},
    "qwen3_5_moe_text": LINEAR,
    "qwen3_5_text": LINEAR,
    "qwen3_next": LINEAR,
    "qwen3_vl_text": {"rope_parameters": SECTIONS},
    "qwen4_exp_text": {
        "num_hidden_layers": 4, "hc_count": 2, "hc_lowrank": 8, "indexer_n_heads": 2, "indexer_kv_heads": 1,
        "indexer_head_dim": 8, "indexer_budget": 24, "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 64},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [8, 24], "axial_pos_shape": [16, 16]},
    "xlstm": {"hidden_size": 64, "qk_dim_factor": 1.0},  # its cache has no room for heads that it rounds up
    "youtu": LATENT,
    "zamba": {
        "num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2, "attention_head_dim": 16,
        "mamba_dt_rank": 4,
    },
    "zamba2": {
        "num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "mamba"], "num_key_value_heads": 4,
        "n_mamba_heads": 4, "time_step_min": 1e-12,
    },
    "zaya": {"num_experts_per_tok": 1, "tie_word_embeddings": True},
}  # fmt: skip


def tiny_config(model_type, shape=SHAPE, **changes):
    cls = CONFIG_MAPPING[model_type]
    accepted = {field.name for field in fields(cls)} | set(cls.attribute_map)
    values = {key: value for key, value in shape.items() if key in accepted}
    for alias, name in cls.attribute_map.items():
        if name in values:
            values.pop(alias, None)
    if shape is SHAPE and getattr(cls, "sliding_window", None) is None:
        values.pop("sliding_window", None)  # a family that slides only where it is asked to
    values |= CHANGES.get(model_type, {}) | changes
    config = cls(**values)
    kinds, slides = set(getattr(config, "layer_types", None) or ()), getattr(config, "sliding_window", None)
    if slides and kinds in ({"sliding_attention"}, {"full_attention"}) and "layer_types" not in changes:
        both = ["sliding_attention", "full_attention"] * (config.num_hidden_layers // 2)
        config = cls(**values, layer_types=both)
    return config


def image_config(model_type, **changes):
    cls = CONFIG_MAPPING[model_type]
    whole = cls()
    if model_type == "mistral3":  # mistral slides by default, not in here
        changes = {"sliding_window": None, **changes}
    tower = "gemma4_vision" if model_type == "gemma4" else whole.vision_config.model_type
    text, vision = tiny_config(whole.text_config.model_type, **changes), tiny_config(tower, TOWER)
    tokens = [field.name for field in fields(cls) if field.name.endswith(("_token_id", "_token_index"))]
    tokens = {name: 2 if name.startswith("image") else 1 for name in tokens if name[:3] not in ("pad", "bos", "eos")}
    return cls(text_config=text.to_dict(), vision_config=vision.to_dict(), **tokens)


def tiny_family(model_type, seed=0, **changes):
    if model_type in IMAGE_FAMILIES:
        name, config = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[model_type], image_config(model_type, **changes)
    else:
        name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
        config = tiny_config("emu3_text_model" if model_type == "emu3" else model_type, **changes)
    torch.manual_seed(seed)
    host = getattr(transformers, name)(config)
    with torch.no_grad():
        for weight in host.parameters():
            if not weight.any() or weight.ndim > 1 and weight.std() < 0.05:
                weight.normal_(std=0.2 if weight.ndim > 1 else 0.05)
        host.get_input_embeddings().weight[0].normal_(std=0.3)  # of a real host padding is no zero either
    host.generation_config.eos_token_id = None
    host.generation_config.pad_token_id = 0
    host.generation_config.use_cache = True
    if model_type in IMAGE_FAMILIES:
        host.generation_config.suppress_tokens = [1, 2]  # a picture's ids, which no real host gives
    return host.eval()


def text_families() -> list[str]:
    return [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in NOT_DECODERS | NESTED]


def tables():
    text = {name: partial(tiny_family, name) for name in text_families()}
    for name, (family, changes) in VARIANTS.items():
        text[name] = partial(tiny_family, family, **changes)
    return text, {name: partial(tiny_family, name) for name in sorted(IMAGE_FAMILIES) if name in CONFIG_MAPPING}


TEXT, IMAGE = tables()
