"""Hosts by name: what is missing, damaged or does not fit is said in one line."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..errors import InputError, MismatchError
from ..utils.loading import complete_model, from_pretrained_options, one_line
from .fetch import resolve_host
from .tokenizers import local_tokenizer

ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FETCH_AGAIN = "; a host of `hf-crouter host list` is fetched again by: hf-crouter host get NAME --force"


def load_host(
    name_or_path: str | os.PathLike,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str = "auto",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A host in evaluation mode, and its tokenizer.

    Args:
        name_or_path: name that `hf-crouter host list` shows, local folder or hub name; a local folder may hold a PEFT
            adapter, which is then active on the host that it names.
        device: where to put it.
        dtype: of its weights; as saved by default.

    Raises:
        InputError: missing or damaged.
        MismatchError: the tokenizer has more entries than the host's embedding.
    """
    adapter = adapter_base(name_or_path)
    if adapter is not None:
        return _with_adapter(Path(name_or_path).expanduser(), adapter, device, dtype)
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
    adapter = adapter_base(name_or_path)
    if adapter is not None:
        config, tokenizer = load_host_tokenizer(adapter)
        return config, local_tokenizer(str(Path(name_or_path).expanduser())) or tokenizer
    name = resolve_host(name_or_path)
    options = from_pretrained_options(name, "host")
    with one_line(name, "a host", FETCH_AGAIN):
        return AutoConfig.from_pretrained(name, **options), AutoTokenizer.from_pretrained(name, **options)


def adapter_base(name_or_path: str | os.PathLike) -> str | None:
    """The host that a local PEFT adapter's folder names; None where the name is no such folder.

    Raises:
        InputError: an adapter whose configuration names no host, or whose weights are not safetensors.
    """
    folder = Path(name_or_path).expanduser()
    if not (folder / ADAPTER).is_file():
        return None
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise InputError(f"{folder}: expected an adapter's weights in {ADAPTER_WEIGHTS}, got none")
    try:
        base = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / ADAPTER}: expected the name of a host, got {type(error).__name__}") from error
    if not isinstance(base, str) or not base:
        raise InputError(f"{folder / ADAPTER}: expected the name of a host in base_model_name_or_path, got {base!r}")
    return base


def _with_adapter(
    folder: Path, base: str, device: str | torch.device, dtype: torch.dtype | str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The host `base` with the adapter in `folder` active."""
    if importlib.util.find_spec("peft") is None:
        raise InputError(
            f'{folder}: expected peft for an adapter, got none installed: pip install "hf_crouter[train]"'
        )
    host, tokenizer = load_host(base, device, dtype)
    with one_line(str(folder), f"an adapter of {base}"):
        host.load_adapter(str(folder), adapter_kwargs={"local_files_only": True})
    return host.to(device).eval(), local_tokenizer(str(folder)) or tokenizer  # pyright: ignore[reportArgumentType]
