"""Tiny random hosts that read images beside text."""

import torch
import transformers

from ..tiny import VOCAB
from .tiny_families import tiny_config

IMAGE, OTHER = 2, 1  # ids that prompts of text never hold
TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8,
         "patch_size": 4}  # fmt: skip
QWEN = {"depth": 1, "hidden_size": 16, "out_hidden_size": 32, "num_heads": 2, "intermediate_size": 24, "patch_size": 4}
TEXT = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "initializer_range": 0.3,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MARKS = {
    "image_token_id": IMAGE,
    "video_token_id": OTHER,
    "vision_start_token_id": OTHER,
    "vision_end_token_id": OTHER,
}


def _rope(section, **more):
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": section, **more}}


def _parts(name):
    """Names of configuration and model class, and the values of the configuration."""
    text = {key: value for key, value in TEXT.items() if key != "head_dim"}
    clip = transformers.CLIPVisionConfig(**TOWER, projection_dim=16)
    pixtral = transformers.PixtralVisionConfig(**TOWER, head_dim=8)
    squares = {**TOWER, "image_size": [8, 8], "patch_size": [4, 4]}
    return {
        "llava": ("Llava", {"text_config": tiny_config("llama"), "vision_config": clip, "image_token_index": IMAGE,
                            "image_seq_length": 4}),
        "mistral3": ("Mistral3", {"text_config": tiny_config("mistral"), "vision_config": pixtral,
                                  "image_token_index": IMAGE}),
        "gemma3": ("Gemma3", {"text_config": tiny_config("gemma3_text"), "mm_tokens_per_image": 4,
                              "vision_config": transformers.SiglipVisionConfig(**TOWER), "image_token_index": IMAGE,
                              "boi_token_index": OTHER, "eoi_token_index": OTHER}),
        "qwen2_vl": ("Qwen2VL", {"text_config": {**text, **_rope([1, 1, 2])}, **MARKS,
                                 "vision_config": {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2,
                                                   "mlp_ratio": 2, "patch_size": 4}}),
        "qwen2_5_vl": ("Qwen2_5_VL", {"text_config": {**text, **_rope([1, 1, 2])}, **MARKS,
                                      "vision_config": {**QWEN, "fullatt_block_indexes": [0]}}),
        "qwen3_vl": ("Qwen3VL", {"text_config": {**TEXT, **_rope([2, 1, 1], mrope_interleaved=True)}, **MARKS,
                                 "vision_config": {**QWEN, "deepstack_visual_indexes": [0],
                                                   "num_position_embeddings": 16}}),
        "qwen3_5": ("Qwen3_5", {"text_config": tiny_config("qwen3_5_text").to_dict(), **MARKS,
                                "vision_config": {**QWEN, "num_position_embeddings": 16}}),
        "internvl": ("InternVL", {"text_config": tiny_config("qwen2"), "vision_config": squares,
                                  "image_token_id": IMAGE, "image_seq_length": 4}),
        "smolvlm": ("SmolVLM", {"text_config": tiny_config("llama"), "vision_config": TOWER, "image_token_id": IMAGE,
                                "scale_factor": 2, "pad_token_id": 0}),
        "llama4": ("Llama4", {"text_config": tiny_config("llama4_text"),
                              "vision_config": {**TOWER, "vision_output_dim": 16, "projector_input_dim": 16,
                                                "projector_output_dim": 16},
                              "image_token_index": IMAGE, "boi_token_index": OTHER, "eoi_token_index": OTHER}),
    }[name]  # fmt: skip


NAMES = (
    "llava",
    "mistral3",
    "gemma3",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_5",
    "internvl",
    "smolvlm",
    "llama4",
)


def tiny_image_host(name):
    stem, values = _parts(name)
    torch.manual_seed(0)
    config = getattr(transformers, f"{stem}Config")(**values)
    host = getattr(transformers, f"{stem}ForConditionalGeneration")(config)
    host.generation_config.eos_token_id = None
    host.generation_config.pad_token_id = 0
    host.generation_config.use_cache = True
    return host.eval()
