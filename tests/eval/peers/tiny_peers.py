"""Tiny hosts and documents for the peers; this runs in the environment of kvpress too, so nothing of hf_crouter."""

import json

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file

from eval.peers.attention import NAME, install
from eval.peers.host import Host
from eval.peers.presses import Words
from eval.peers.rows import Layout, Rows

VOCAB = 97
LAYOUT = Layout(prefix=4, chunk=32, chunks=4, window=96, target=16)
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 96,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}
FAMILIES = ("llama", "qwen2", "gemma3")


class Tokenizer:
    """Letters to ids; no chat template, as of a base model."""

    def encode(self, text, return_tensors="pt", add_special_tokens=False):
        return torch.tensor([[3 + ord(letter) % 90 for letter in text]])


def make_model(family="qwen2", implementation=NAME):
    install()
    torch.manual_seed(0)
    if family == "gemma3":
        kinds = ["sliding_attention", "full_attention", "sliding_attention"]
        config = transformers.Gemma3TextConfig(**SIZES, sliding_window=24, layer_types=kinds)
        model = transformers.Gemma3ForCausalLM._from_config(config, attn_implementation=implementation)
    else:
        kind = "Llama" if family == "llama" else "Qwen2"
        config = getattr(transformers, f"{kind}Config")(**SIZES)
        model = getattr(transformers, f"{kind}ForCausalLM")._from_config(config, attn_implementation=implementation)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


def make_host(family="qwen2", tokens=4096):
    return Host(make_model(family), install(), Words.of(Tokenizer()), tokens)


def make_rows(documents=3):
    generator = np.random.default_rng(0)
    ids = generator.integers(3, VOCAB, (documents, LAYOUT.length)).astype(np.uint32)
    lines = np.repeat(np.arange(LAYOUT.target // 4), 4)[None].repeat(documents, 0).astype(np.int16)
    lines[:, :4] = -1
    return Rows(ids, lines, [f"package/{i}.py" for i in range(documents)], LAYOUT)


def write_set(folder, rows, name="young"):
    save_file({"ids": rows.ids, "lines": rows.lines}, folder / f"{name}.safetensors")
    documents = [{"name": document, "cluster": "package"} for document in rows.names]
    content = {"layout": vars(rows.layout), "documents": documents}
    (folder / f"{name}.json").write_text(json.dumps(content))


def write_questions(folder, name="young.200", count=3):
    generator = np.random.default_rng(1)
    questions = [
        {"ids": generator.integers(3, VOCAB, 200 + i).tolist(), "prefix": 6, "answers": ["x"], "cluster": "c"}
        for i in range(count)
    ]
    content = {"questions": questions, "chunk": 32, "window": 96, "max_new_tokens": 5, "stop_ids": [1]}
    (folder / f"{name}.json").write_text(json.dumps(content))


def context_of(rows, count):
    return torch.from_numpy(rows.layout.context(rows.ids, count).astype(np.int64))


def plain(model, rows, count, mask=None):
    """Log-probabilities `[D, T, V]` of a pass without a cache.

    Args:
        model: with sdpa attention.
        rows: to be read.
        count: of chunks.
        mask: `[N, N]`, what is seen of `[context | target]`, one token shorter than both.
    """
    ids = np.concatenate([rows.layout.context(rows.ids, count), rows.ids[:, -rows.layout.target : -1]], axis=1)
    if mask is not None:
        mask = mask.expand(len(ids), 1, *mask.shape)
    with torch.no_grad():
        logits = model(torch.from_numpy(ids.astype(np.int64)), attention_mask=mask, use_cache=False).logits
    return logits[:, -rows.layout.target :].log_softmax(-1).numpy()


def loss_of(told, rows):
    """Log-probabilities `[D, T, V]` to the loss of each row's target, `[D]`."""
    target = rows.ids[:, -rows.layout.target :].astype(np.int64)
    return -np.take_along_axis(told, target[..., None], 2)[..., 0].mean(1)
