"""A crouter small enough to be trained in seconds: 16 tokens to 2 latents, on one text of the standard library."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hf_crouter import CRouterConfig, CRouterModel
from hf_crouter.utils.batching import padded

TEXT = "".join(Path(json.__file__).read_text(encoding="utf-8").splitlines(keepends=True)[:12])
LENGTH = 16


def make_tokenizer(vocab_size: int = 384, text: str = TEXT) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, lossless on any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, special_tokens=["<|end|>"], show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


@functools.cache
def trained_crouter() -> Path:
    """Folder of a crouter, with its tokenizer, that rebuilds `TEXT` without an error."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    config = CRouterConfig(
        vocab_size=len(tokenizer), chunk_length=LENGTH, num_latents=2, latent_size=32, embedding_size=32,
        hidden_size=64, intermediate_size=96, num_attention_heads=2, num_encoder_layers=1, num_decoder_layers=1,
    )  # fmt: skip
    model = CRouterModel(config)
    ids = tokenizer(TEXT)["input_ids"]
    rows = [torch.tensor(ids[i : i + LENGTH]) for i in range(0, len(ids), LENGTH)]
    batch, mask = padded(rows)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # far faster than many threads on matrices this small
    for _ in range(400):
        out = model(batch, mask)
        if out.loss < 0.005:
            break
        optimiser.zero_grad()
        out.loss.backward()
        optimiser.step()
    torch.set_num_threads(threads)
    folder = Path(tempfile.mkdtemp(prefix="trained-crouter-")) / "crouter-tiny"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
