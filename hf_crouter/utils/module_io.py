"""Small trained modules as a folder's `NAME.safetensors` and `NAME.json`: description, origin and checksum."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import nn

from ..errors import InputError
from .io import replaced_file

T = TypeVar("T")


def save_module(folder: str | Path, name: str, module: nn.Module, config: Any, dtype: torch.dtype) -> None:
    """Writes a module's weights and its description, each whole or not at all; the JSON, with a checksum, last.

    Args:
        folder: made if missing.
        name: of both files.
        module: whose state is saved.
        config: a dataclass that describes it.
        dtype: of the saved weights.

    Raises:
        InputError: the disk is full or the folder cannot be written.
    """
    folder = Path(folder)
    tensors = {key: value.detach().to("cpu", dtype).contiguous() for key, value in module.state_dict().items()}
    data = save_safetensors(tensors, {"format": "pt"})
    text = json.dumps({**asdict(config), "sha256": hashlib.sha256(data).hexdigest()}, indent=1) + "\n"
    with replaced_file(folder / f"{name}.safetensors") as part:
        part.write_bytes(data)
    with replaced_file(folder / f"{name}.json") as part:
        part.write_text(text, encoding="utf-8")


def read_description(folder: str | Path, name: str, make: Callable[[dict[str, Any]], T]) -> tuple[T, str]:
    """The description, as `make` builds it from what the JSON holds, and the checksum of the weights.

    Raises:
        InputError: no such file, or one that is no description.
    """
    path = Path(folder) / f"{name}.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        checksum = record.pop("sha256")
        return make(record), checksum
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not a {name}'s description ({error})") from error


def load_weights(folder: str | Path, name: str, module: nn.Module, checksum: str) -> None:
    """Reads the weights that go with a description into its module.

    Raises:
        InputError: missing, truncated or altered weights, or those of another shape.
    """
    path = Path(folder) / f"{name}.safetensors"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    if hashlib.sha256(data).hexdigest() != checksum:
        raise InputError(f"{path}: truncated or altered since it was written (checksum differs)")
    try:
        module.load_state_dict(load_safetensors(data))
    except (SafetensorError, RuntimeError) as error:
        line = str(error).splitlines()[0]
        raise InputError(f"{path}: expected the weights of its {name}.json, got {line}") from error
