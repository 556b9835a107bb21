"""Hosts by name: what is missing, damaged or does not fit is said in one line."""

from __future__ import annotations

import os

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..errors import MismatchError
from ..utils.loading import complete_model, from_pretrained_options, one_line
from .fetch import resolve_host

FETCH_AGAIN = "; a host of `hf-crouter host list` is fetched again by: hf-crouter host get NAME --force"


def load_host(
    name_or_path: str | os.PathLike,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str = "auto",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A host in evaluation mode, and its tokenizer.

    Args:
        name_or_path: name that `hf-crouter host list` shows, local folder or hub name.
        device: where to put it.
        dtype: of its weights; as saved by default.

    Raises:
        InputError: missing or damaged.
        MismatchError: the tokenizer has more entries than the host's embedding.
    """
    config, tokenizer = load_host_tokenizer(name_or_path)
    name = str(config.name_or_path)
    with one_line(name, "a host", FETCH_AGAIN):
        loaded = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, output_loading_info=True, **from_pretrained_options(name, "host")
        )
        model = complete_model(name, loaded)
        vocabulary = model.get_input_embeddings().weight.shape[0]
        if len(tokenizer) > vocabulary:
            raise MismatchError(f"{name}: the tokenizer has {len(tokenizer)} entries, the host embeds {vocabulary}")
    return model.to(device).eval(), tokenizer


def load_host_tokenizer(name_or_path: str | os.PathLike) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    """A host's configuration and tokenizer, without its weights.

    Args:
        name_or_path: name that `hf-crouter host list` shows, local folder or hub name.

    Raises:
        InputError: missing or damaged.
    """
    name = resolve_host(name_or_path)
    options = from_pretrained_options(name, "host")
    with one_line(name, "a host", FETCH_AGAIN):
        return AutoConfig.from_pretrained(name, **options), AutoTokenizer.from_pretrained(name, **options)
