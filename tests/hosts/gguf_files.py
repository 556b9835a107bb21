"""Tiny random models written as GGUF files, as llama.cpp's converter would write them."""

from __future__ import annotations

import gguf
import numpy as np
import torch
from tokenizers import pre_tokenizers
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, Qwen2Config
from transformers import Qwen2ForCausalLM as Qwen2

from hf_crouter.hosts.gguf_families import FAMILIES

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
SHAPE |= {"max_position_embeddings": 128}


def byte_level_tokens():
    """SmolLM's layout: special tokens first."""
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *ALPHABET, "ĠĠ", "th"]
    ids = {"bos": 1, "eos": 2, "padding": 2, "unknown": 0}
    # transformers 5.17 cannot read a single merge
    return "smollm", tokens, [3, 3, 3] + [1] * (len(tokens) - 3), ["Ġ Ġ", "t h"], ids


def qwen2_tokens():
    """Qwen2's layout: special tokens behind the vocabulary, then padding to a round number."""
    plain = [*ALPHABET, "ĠĠ", "th", "12"]
    added = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "<|fim_prefix|>"]
    first = len(plain)
    padding = [f"[PAD{n}]" for n in range(first + len(added), 288)]
    kinds = [1] * first + [3, 3, 3, 4, 3] + [5] * len(padding)
    ids = {"bos": first, "eos": first + 2, "padding": first}
    return "qwen2", [*plain, *added, *padding], kinds, ["Ġ Ġ", "t h", "1 2"], ids


def gemma_tokens():
    """Gemma's layout: special tokens, runs of white space, bytes, pieces by falling score."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<unused0>", "<start_of_turn>", "<end_of_turn>"]
    runs = ["\n", "\n\n", "  ", "   ", "<table>"]
    octets = [f"<0x{n:02X}>" for n in range(256)]
    pieces = ["\u2581t", "he", "\u2581the", *"\u2581abcdefghijklmnopqrstuvwxyz"]
    kinds = [3] * len(special) + [4] * len(runs) + [6] * 256 + [1] * len(pieces)
    tokens = [*special, *runs, *octets, *pieces]
    return "default", tokens, kinds, None, {"bos": 2, "eos": 1, "padding": 0, "unknown": 3}


TOKENS = {"llama": byte_level_tokens, "qwen2": qwen2_tokens, "gemma3": gemma_tokens}


def tiny_model(family, **changes):
    """A random model whose weights are bfloat16 numbers in float32."""
    torch.manual_seed(0)
    vocab = len(TOKENS[family]()[1])
    if family == "gemma3":
        options = SHAPE | {"num_hidden_layers": 7, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8}
        model = Gemma3ForCausalLM(Gemma3TextConfig(vocab_size=vocab, **options | changes))
    elif family == "qwen2":
        options = SHAPE | {"num_hidden_layers": 2, "tie_word_embeddings": False, "rms_norm_eps": 1e-6}
        rope = {"rope_type": "default", "rope_theta": 1e6}
        model = Qwen2(Qwen2Config(vocab_size=vocab, rope_parameters=rope, **options | changes))
    else:
        options = SHAPE | {"num_hidden_layers": 2, "tie_word_embeddings": True, "rms_norm_eps": 1e-5}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=vocab, **options | changes))
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_((weight + torch.randn_like(weight) / 10).bfloat16().float())
    return model.eval()


def write_gguf(path, family, model=None, kind=gguf.GGMLQuantizationType.F32, *, extra=None, drop=()):
    """Writes a model, and sets its weights to what a reader of the file gets, in bfloat16.

    Args:
        path: the file.
        family: `llama`, `qwen2` or `gemma3`.
        model: of `tiny_model`.
        kind: of the matrices; norms and biases stay float32.
        extra: further tensors, by name.
        drop: names in the file of tensors that are left out.
    """
    model = model or tiny_model(family)
    config = model.config
    writer = gguf.GGUFWriter(path, family)
    _settings(writer, family, config)
    _tokens(writer, family)
    names = {ours: theirs for theirs, ours in FAMILIES[family].names.items()}
    tensors = dict(extra or {})
    with torch.no_grad():
        for name, weight in model.named_parameters():
            theirs = _name(name, names)
            values, shift = weight.numpy(), family == "gemma3" and name.endswith("norm.weight")
            if family == "llama" and (".q_proj." in name or ".k_proj." in name):
                heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
                values = values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
            if weight.ndim == 2 and kind != gguf.GGMLQuantizationType.F32:
                own = gguf.quantize(weight.numpy(), kind)
                weight.copy_(torch.from_numpy(np.array(gguf.dequantize(own, kind))).bfloat16())
                tensors[theirs] = (gguf.quantize(np.ascontiguousarray(values), kind), kind)
            else:
                tensors[theirs] = (np.array(values) + np.float32(shift), None)
    for name, (values, raw) in tensors.items():
        if name not in drop:
            writer.add_tensor(name, np.ascontiguousarray(values), raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _name(name, names):
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    module, _, leaf = name.rpartition(".")
    if module in outer:
        return f"{outer[module]}.{leaf}"
    _, _, layer, inner = module.split(".", 3)
    return f"blk.{layer}.{names[inner]}.{leaf}"


def _settings(writer, family, config):
    writer.add_name("Odd Name")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if family == "gemma3":
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_sliding_window(config.sliding_window)
        writer.add_rope_freq_base(config.rope_parameters["full_attention"]["rope_theta"])
    else:
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if family == "llama":
        writer.add_rope_dimension_count(config.head_dim)


def _tokens(writer, family):
    pre, tokens, kinds, merges, ids = TOKENS[family]()
    writer.add_tokenizer_model("llama" if merges is None else "gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    if merges is None:
        writer.add_token_scores([0.0 if kind != 1 else -float(n) for n, kind in enumerate(kinds)])
        writer.add_add_bos_token(True)
    else:
        writer.add_token_merges(merges)
        writer.add_chat_template(TEMPLATE)
    for name, number in ids.items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", number)
