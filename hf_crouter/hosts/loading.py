"""Hosts by name: what is missing, damaged or does not fit is said in one line."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
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

_NAME = "default"
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
    base = adapter_base(name_or_path)
    if base is not None:
        return _with_adapter(Path(name_or_path).expanduser(), base, device, dtype)
    config, tokenizer = load_host_tokenizer(name_or_path)
    name = str(config.name_or_path)
    with one_line(name, "a host", FETCH_AGAIN):
        loaded = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, output_loading_info=True, **from_pretrained_options(name, "host")
        )
        model = complete_model(name, loaded)
        _check_vocabulary(name, tokenizer, model)
    return model.to(device).eval(), tokenizer


def load_host_tokenizer(name_or_path: str | os.PathLike) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    """A host's configuration and tokenizer, without its weights.

    Args:
        name_or_path: name that `hf-crouter host list` shows, local folder or hub name; a local folder of a PEFT
            adapter stands for the host that it names, with its own tokenizer if it has one.

    Raises:
        InputError: missing or damaged.
    """
    base = adapter_base(name_or_path)
    if base is not None:
        folder = Path(name_or_path).expanduser()
        with _host_of(folder):
            config, tokenizer = load_host_tokenizer(base)
        return config, _own_tokenizer(folder, config) or tokenizer
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
    if (Path(base).expanduser() / ADAPTER).is_file():
        raise InputError(f"{folder / ADAPTER}: expected a host in base_model_name_or_path, got an adapter, {base}")
    return base


def _with_adapter(
    folder: Path, base: str, device: str | torch.device, dtype: torch.dtype | str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The host `base` with the adapter in `folder` active."""
    if importlib.util.find_spec("peft") is None:
        raise InputError(
            f'{folder}: expected peft for an adapter, got none installed: pip install "hf_crouter[train]"'
        )
    from peft import PeftConfig, set_peft_model_state_dict

    with _host_of(folder):
        host, tokenizer = load_host(base, device, dtype)
    tokenizer = _own_tokenizer(folder, host.config) or tokenizer
    _check_vocabulary(str(folder), tokenizer, host)
    with one_line(str(folder), f"an adapter of {base}"):
        host.add_adapter(PeftConfig.from_pretrained(str(folder)), _NAME)
        tensors = load_file(folder / ADAPTER_WEIGHTS)
        tensors = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
        try:  # `host.load_adapter` leaves DoRA's magnitudes, and whatever else it does not find, untrained
            result = set_peft_model_state_dict(host, tensors, _NAME)
        except RuntimeError as error:  # its first line names the class alone
            raise ValueError(str(error).splitlines()[-1].strip()) from error
        except KeyError as error:  # of modules that were trained whole
            raise ValueError(f"no weights {error}") from error
    trained = {name for name, weight in host.named_parameters() if weight.requires_grad and _NAME in name.split(".")}
    odd = [*sorted(trained & set(result.missing_keys)), *result.unexpected_keys]
    if odd:
        raise InputError(
            f"{folder}: does not fit {base}, {len(odd)} weights are missing or unknown, {odd[0]} among them"
        )
    return host.requires_grad_(False).to(device).eval(), tokenizer  # pyright: ignore[reportArgumentType]


@contextmanager
def _host_of(folder: Path) -> Iterator[None]:
    """Says which adapter named a host that cannot be loaded."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{folder}: expected the adapter's host, got {error}") from error


def _own_tokenizer(folder: Path, config: PreTrainedConfig) -> PreTrainedTokenizerBase | None:
    """The tokenizer that was saved with an adapter; None where none was."""
    if not any((folder / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json")):
        return None
    with one_line(str(folder), "a tokenizer"):
        return AutoTokenizer.from_pretrained(str(folder), config=config, local_files_only=True)


def _check_vocabulary(name: str, tokenizer: PreTrainedTokenizerBase, host: Any) -> None:
    vocabulary = host.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > vocabulary:
        raise MismatchError(f"{name}: the tokenizer has {len(tokenizer)} entries, the host embeds {vocabulary}")
