"""Crouters and hosts by name: what is missing, damaged or does not fit is said in one line."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.hub import cached_file

from .compressor import CRouterConfig, CRouterModel
from .errors import InputError, MismatchError
from .host.fetch import resolve_host
from .routing.calibration import CALIBRATION_FILE, Calibration
from .routing.experts import SET_FILE

FETCH_AGAIN = "; a host of `hf-crouter host list` is fetched again by: hf-crouter host get NAME --force"
SHIPPED = Path(__file__).parent / "checkpoints" / "crouter-code-mini"
SHIPPED_EXPERTS = SHIPPED.with_name("experts-smollm2-135m")  # of that crouter and this host


def shipped_crouter() -> Path:
    """Folder of the small crouter that comes with the package.

    Raises:
        InputError: this installation has none.
    """
    if not (SHIPPED / "config.json").is_file():
        raise InputError(f"{SHIPPED}: the shipped crouter is missing from this installation; name one with --crouter")
    return SHIPPED


def expert_folder(name_or_path: str | os.PathLike | None = None) -> Path:
    """Folder of an expert set; by default, and for its own name, that of the set that comes with the package.

    Raises:
        InputError: this installation has none.
    """
    if name_or_path is None or (str(name_or_path) == SHIPPED_EXPERTS.name and not Path(name_or_path).exists()):
        if not (SHIPPED_EXPERTS / SET_FILE).is_file():
            raise InputError(f"{SHIPPED_EXPERTS}: the shipped experts are missing from this installation")
        return SHIPPED_EXPERTS
    return Path(name_or_path)


def _crouter_name(name_or_path: str | os.PathLike | None) -> str:
    """The folder or hub name; the shipped crouter's folder for None and for its own name."""
    if name_or_path is None or (str(name_or_path) == SHIPPED.name and not Path(name_or_path).exists()):
        return str(shipped_crouter())
    return str(name_or_path)


def load_crouter(
    name_or_path: str | os.PathLike | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[CRouterModel, PreTrainedTokenizerBase]:
    """A crouter in evaluation mode, and its tokenizer from the same folder.

    Args:
        name_or_path: local folder, hub name or `crouter-code-mini`; the shipped crouter by default.
        device: where to put it.
        dtype: of its weights.

    Raises:
        InputError: missing, damaged, or not a crouter.
        MismatchError: the tokenizer's vocabulary is not the model's.
    """
    name = _crouter_name(name_or_path)
    options = _local(name, "crouter")
    with one_line(name, "a crouter"):
        config = AutoConfig.from_pretrained(name, **options)
        if config.model_type != CRouterConfig.model_type:
            raise InputError(f"{name}: expected a crouter, got a model of type {config.model_type!r}")
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        if len(tokenizer) != config.vocab_size:
            raise MismatchError(
                f"{name}: the tokenizer has {len(tokenizer)} entries, the crouter was built for {config.vocab_size}"
            )
        loaded = CRouterModel.from_pretrained(name, dtype=dtype, output_loading_info=True, **options)
        model = _complete(name, loaded)
    return model.to(device).eval(), tokenizer  # pyright: ignore[reportArgumentType]


def load_calibration(name_or_path: str | os.PathLike | None = None) -> Calibration | None:
    """The calibration in a crouter's folder, or None where it has none.

    Args:
        name_or_path: local folder or hub name; the shipped crouter by default.

    Raises:
        InputError: it is damaged.
    """
    name = _crouter_name(name_or_path)
    path = cached_file(name, CALIBRATION_FILE, _raise_exceptions_for_missing_entries=False, **_local(name, "crouter"))
    return Calibration.load(Path(path).parent) if path else None


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
            name, dtype=dtype, output_loading_info=True, **_local(name, "host")
        )
        model = _complete(name, loaded)
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
    options = _local(name, "host")
    with one_line(name, "a host", FETCH_AGAIN):
        return AutoConfig.from_pretrained(name, **options), AutoTokenizer.from_pretrained(name, **options)


def _local(name: str, what: str) -> dict[str, Any]:
    """Options of `from_pretrained`: a local folder never asks the network."""
    if Path(name).is_dir():
        return {"local_files_only": True}
    if Path(name).exists():
        raise InputError(f"{name}: expected the folder of a {what}, got a file")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise InputError(f"{name}: no such {what} folder")
    return {}


def _complete(name: str, loaded: Any) -> Any:
    """The model, unless weights were missing: transformers would fill them with random numbers."""
    model, info = loaded
    missing = [*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])]
    if missing:
        raise InputError(f"{name}: damaged, {len(missing)} weights are missing or misshapen, {missing[0]} among them")
    return model


@contextmanager
def one_line(name: str, what: str, advice: str = "") -> Iterator[None]:
    """Turns whatever goes wrong while `name` is loaded as `what` into an `InputError` of one line."""
    try:
        yield
    except (InputError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # transformers, tokenizers, safetensors and json share no base class
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"{name}: cannot be read as {what} ({lines[0]}){advice}") from error
