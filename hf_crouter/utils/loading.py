"""Loading models by name: whatever goes wrong is said in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError


def from_pretrained_options(name: str, what: str) -> dict[str, Any]:
    """Options of `from_pretrained`: a local folder never asks the network."""
    if Path(name).is_dir():
        return {"local_files_only": True}
    if Path(name).exists():
        raise InputError(f"{name}: expected the folder of a {what}, got a file")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise InputError(f"{name}: no such {what} folder")
    return {}


def complete_model(name: str, loaded: Any) -> Any:
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
