"""Tiny hosts of one architecture and of others, and tokenizers of theirs."""

import copy

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from .tiny import VOCAB
from .trained_crouter import make_tokenizer

SHAPE = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}  # fmt: skip
TOKENIZER, OTHER = make_tokenizer(300), make_tokenizer(301)


def host_of(device="cpu", **changes):
    torch.manual_seed(3)
    config = LlamaConfig(**{**SHAPE, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **changes})
    with torch.device(device):
        return LlamaForCausalLM(config).eval()


def noised(host):
    twin = copy.deepcopy(host)
    with torch.no_grad():
        for weight in twin.parameters():
            weight += 1e-2 * torch.randn_like(weight)
    return twin
