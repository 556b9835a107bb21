"""A GGUF file as an ordinary folder: bfloat16 safetensors, configuration, tokenizer."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import ReaderTensor
from gguf.quants import dequantize
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig
from transformers.utils import logging

from ..errors import InputError
from .gguf_families import Family, family_of, model_config
from .gguf_reader import read_gguf
from .gguf_tokenizers import gguf_tokenizer
from .safetensors_writer import SHARD_BYTES, Source, write_bfloat16


def convert_gguf(
    gguf: Path,
    folder: Path,
    *,
    title: str,
    splits_digits: bool = True,
    shard_bytes: int = SHARD_BYTES,
    poll: Callable[[int, int], None] | None = None,
) -> None:
    """Writes what `from_pretrained` reads.

    Weights are dequantised a few megabytes at a time: memory does not grow with the model.

    Args:
        gguf: the model's GGUF file, of any quantisation; Llama, Qwen2 or Gemma 3.
        folder: where to write; created.
        title: the model's name for its configuration.
        splits_digits: whether a Llama-type model's tokenizer takes every digit alone.
        shard_bytes: largest file of weights.
        poll: called with the bytes of weights that are written, 0 at first, and those there are.

    Raises:
        InputError: if the file cannot be read, or is no model of these families.
    """
    with _quiet():
        with _read_errors(gguf):
            settings, tensors = read_gguf(gguf)
            family = family_of(settings)
            rows = int(tensors["token_embd.weight"].shape[-1])
            config = model_config(settings, vocab_size=rows, tied="output.weight" not in tensors)
            sources = [_source(tensor, family, config) for tensor in tensors.values()]
            tokenizer = gguf_tokenizer(settings, splits_digits=splits_digits)
            ends = _end_ids(family, settings)
        names = _check_tensors(sources, config)
        folder.mkdir(parents=True, exist_ok=True)
        total = sum(source.bytes for source in sources)
        if poll is not None:
            poll(0, total)
        with _read_errors(gguf):
            write_bfloat16(
                folder, sources, shard_bytes=shard_bytes, poll=None if poll is None else lambda done: poll(done, total)
            )
        _save_config(config, folder, title, names, ends)
        tokenizer.save_pretrained(folder)


def _source(tensor: ReaderTensor, family: Family, config: PretrainedConfig) -> Source:
    """Where a tensor's values come from, and what it is called."""
    name = family.tensor_name(tensor.name)
    if name is None:
        raise InputError(f"expected tensors of its architecture only, got {tensor.name}")
    shape = tuple(int(size) for size in reversed(tensor.shape))  # the file counts from the fastest axis
    packed, kind = tensor.data, tensor.tensor_type
    heads = family.interleaved_heads(tensor.name, config)
    order = _half_order(shape[0], heads) if heads else None
    shift = np.float32(1) if family.is_shifted(tensor.name) else None

    def read(start: int, stop: int) -> np.ndarray:
        block = packed[start:stop] if order is None else packed[order[start:stop]]  # rows are packed one by one
        values = dequantize(block, kind)
        return values if shift is None else values - shift

    return Source(name, shape, read)


def _half_order(rows: int, heads: int) -> np.ndarray:
    """Rows of the file in transformers' order: of every head first the even ones, then the odd ones."""
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)


def _end_ids(family: Family, settings: Mapping[str, Any]) -> list[int]:
    tokens: list[str] = settings["tokenizer.ggml.tokens"]
    ids = [settings["tokenizer.ggml.eos_token_id"]]
    ids += [tokens.index(token) for token in family.end_tokens if token in tokens]
    return list(dict.fromkeys(ids))


def _check_tensors(sources: Sequence[Source], config: PretrainedConfig) -> list[str]:
    """The class's name, if the file has just the weights of a model of this configuration."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    expected = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight")
    found = {source.name: source.shape for source in sources}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            want, got = (shapes.get(name, "none") for shapes in (expected, found))
            raise InputError(f"weights: expected {name} of shape {want}, got {got}")
    return [type(model).__name__]


def _save_config(config: PretrainedConfig, folder: Path, title: str, names: list[str], ends: list[int]) -> None:
    config.architectures = names
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    file = folder / "config.json"
    saved = {"_name_or_path": title, **json.loads(file.read_text(encoding="utf-8"))}
    file.write_text(json.dumps(saved, indent=2) + "\n", encoding="utf-8")
    end = ends if len(ends) > 1 else ends[0]
    tokens = {name: getattr(config, name) for name in ("bos_token_id", "pad_token_id")}
    GenerationConfig(eos_token_id=end, **tokens).save_pretrained(folder)


@contextlib.contextmanager
def _read_errors(gguf: Path) -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise InputError(f"cannot read {gguf.name} as a model: {error}") from error
    except (ValueError, KeyError, IndexError, NotImplementedError, TypeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"cannot read {gguf.name} as a model: {type(error).__name__}: {reason[:200]}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences transformers' bars and messages, here only."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
