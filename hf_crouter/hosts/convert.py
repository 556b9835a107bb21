"""A GGUF file of a Llama-type model as an ordinary folder: bfloat16 safetensors, configuration, tokenizer."""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from ..errors import InputError


def convert_gguf(gguf: Path, folder: Path, *, title: str, splits_digits: bool) -> None:
    """Writes what `from_pretrained` reads.

    Args:
        gguf: the model's GGUF file, of any quantisation.
        folder: where to write; created.
        title: the model's name for its configuration.
        splits_digits: whether its tokenizer takes every digit alone.

    Raises:
        InputError: if transformers cannot read the file as a Llama-type model.
    """
    with _quiet():
        options: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
        try:
            read = AutoModelForCausalLM.from_pretrained(str(gguf.parent), dtype=torch.float32, **options)
            tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), **options)
        except (ValueError, KeyError, IndexError, NotImplementedError, RuntimeError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise InputError(f"cannot read {gguf.name} as a model: {reason[:200]}") from error
        if not isinstance(read, LlamaForCausalLM):
            raise InputError(f"expected a Llama-type model in {gguf.name}, got {type(read).__name__}")
        folder.mkdir(parents=True, exist_ok=True)
        _save_model(read, folder, title)
        _save_tokenizer(tokenizer, read.config, folder, splits_digits)


def _save_model(read: LlamaForCausalLM, folder: Path, title: str) -> None:
    # What was read still counts as quantised and refuses to be saved: the weights move into a plain model.
    values = read.config.to_dict()
    for name in ("quantization_config", "_model_name_or_path", "_name_or_path", "architectures", "dtype"):
        values.pop(name, None)
    values["rms_norm_eps"] = float(f"{values['rms_norm_eps']:.6g}")  # stored as float32, printed as such
    config = LlamaConfig(**values)
    config.dtype = torch.bfloat16
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict(read.state_dict(), assign=True)
    model.tie_weights()
    model.to(torch.bfloat16)  # pyright: ignore[reportArgumentType]
    tokens = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**tokens)
    model.save_pretrained(folder)
    file = folder / "config.json"
    saved = {"_name_or_path": title, **json.loads(file.read_text(encoding="utf-8"))}
    file.write_text(json.dumps(saved, indent=2) + "\n", encoding="utf-8")


def _save_tokenizer(read: Any, config: Any, folder: Path, splits_digits: bool) -> None:
    # Stated here in full, so that token ids and the tokenizer's fingerprint do not depend on how this version of
    # transformers reads GGUF files.
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if splits_digits:
        pieces = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pieces])
    state = json.loads(read.backend_tokenizer.to_str())
    state["normalizer"] = None
    plain = {"unk_token": None, "continuing_subword_prefix": "", "end_of_word_suffix": ""}
    state["model"] |= {**plain, "fuse_unk": False, "byte_fallback": False}
    backend = Tokenizer.from_str(json.dumps(state))
    backend.pre_tokenizer, backend.decoder = pieces, decoders.ByteLevel()
    # By the model's ids: transformers 5.17 gives a GGUF file's tokenizer the wrong end and no padding.
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    ids = {name: getattr(config, f"{name}_id", None) for name in names}
    special = {name: read.convert_ids_to_tokens(number) for name, number in ids.items() if number is not None}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=read.chat_template, **special)
    tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences transformers' bars and messages, here only."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        # The dequantisation draws a tqdm bar that no switch reaches.
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
