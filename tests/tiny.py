"""Tiny random models: a host, a crouter on the same tokens, and a projector between them."""

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from hf_crouter.compressors.projector import Projector, new_projector
from hf_crouter.crouter import CRouterConfig, CRouterModel
from hf_crouter.history import CompressedHistory
from hf_crouter.modes import modes_from_options

VOCAB = 97
CHUNK = 16
LATENTS = 2
FAMILIES = ("llama", "qwen2", "gpt_neox", "gpt2", "gemma2")


def tiny_host(family="llama", seed=0, positions=256, vocab_size=VOCAB):
    shape = {
        "vocab_size": vocab_size, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": positions, "initializer_range": 0.3,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    torch.manual_seed(seed)
    if family == "llama":
        host = LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=2))
    elif family == "qwen2":
        host = Qwen2ForCausalLM(Qwen2Config(**shape, num_key_value_heads=2))
    elif family == "gpt_neox":
        host = GPTNeoXForCausalLM(GPTNeoXConfig(**shape))
    elif family == "gpt2":
        shape.pop("intermediate_size")
        host = GPT2LMHeadModel(GPT2Config(**shape))
    else:
        host = Gemma2ForCausalLM(Gemma2Config(**shape, num_key_value_heads=2, head_dim=8, sliding_window=12))
    host.generation_config.eos_token_id = None
    return host.eval()


def tiny_crouter(seed=0, **changes):
    torch.manual_seed(seed)
    config = {
        "vocab_size": VOCAB, "chunk_length": CHUNK, "num_latents": LATENTS, "latent_size": 12, "embedding_size": 8,
        "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_encoder_layers": 1,
        "num_decoder_layers": 1, "initializer_range": 1.0,
    }  # fmt: skip
    crouter = CRouterModel(CRouterConfig(**{**config, **changes})).eval()
    with torch.no_grad():  # layers start as the identity: make the chunk's tokens matter
        for layer in (*crouter.encoder, *crouter.decoder):
            layer.attention.o_proj.weight.normal_(std=0.5)
            layer.mlp.down_proj.weight.normal_(std=0.5)
    return crouter


def tiny_projector(host, crouter, seed=0, **options) -> Projector:
    torch.manual_seed(seed)
    return new_projector(host, crouter, hidden_size=20, **options).eval()


def prompt(*lengths, seed=1):
    """Left-padded random ids and their mask, `[B, T]` each."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids, mask = torch.zeros(len(lengths), width, dtype=torch.long), torch.zeros(len(lengths), width, dtype=torch.long)
    for i, length in enumerate(lengths):
        ids[i, width - length :] = torch.randint(3, VOCAB, (length,), generator=generator)
        mask[i, width - length :] = 1
    return ids, mask


def make_history(
    host, crouter, *, extra=(), keys=("window", "keep_first", "tokenizer", "crouter_tokenizer"), **options
):
    """A history by flat options, as a command line gives them; soft prompts and copying unless they are turned off.

    `extra` are modes made elsewhere.
    """
    common = {key: options.pop(key) for key in keys if key in options}
    if crouter is not None and options.get("soft_prompts", True) is True:
        options["soft_prompts"] = tiny_projector(host, crouter)
    modes, rest = modes_from_options({"copy": True, **options})
    assert not rest
    return CompressedHistory(host, crouter, modes=[*([] if modes == "auto" else modes), *extra], **common)
