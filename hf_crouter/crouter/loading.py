"""Crouters by name: what is missing, damaged or does not fit is said in one line."""

from __future__ import annotations

import os
from pathlib import Path

import huggingface_hub
import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from ..errors import InputError, MismatchError
from ..utils.loading import complete_model, from_pretrained_options, one_line
from . import CRouterConfig, CRouterModel

SHIPPED = Path(__file__).parent.parent / "checkpoints" / "crouter-code-mini"


def shipped_crouter() -> Path:
    """Folder of the small crouter that comes with the package.

    Raises:
        InputError: this installation has none.
    """
    if not (SHIPPED / "config.json").is_file():
        raise InputError(f"{SHIPPED}: the shipped crouter is missing from this installation; name one with --crouter")
    return SHIPPED


def crouter_name(name_or_path: str | os.PathLike | None) -> str:
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
    name = crouter_name(name_or_path)
    options = from_pretrained_options(name, "crouter")
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
        model = complete_model(name, loaded)
    return model.to(device).eval(), tokenizer  # pyright: ignore[reportArgumentType]


def crouter_folder(name_or_path: str, part: str) -> Path:
    """The local folder of a crouter, a copy of its `part` folder where it comes from the hub."""
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    try:
        return Path(huggingface_hub.snapshot_download(name_or_path, allow_patterns=[f"{part}/**"]))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError):
        return Path(name_or_path)  # no such folder: the caller says what is missing and how it is made
