"""What measurements on several processes share: arrays on disk, shards."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from hf_crouter.utils.io import replaced_file


def save_arrays(path: Path, arrays: dict[str, np.ndarray], about: dict[str, Any]) -> None:
    """Writes a safetensors file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced_file(path) as part:
        save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, part, {"about": json.dumps(about)})


def about_of(path: Path) -> dict[str, Any]:
    """What `save_arrays` noted."""
    with safe_open(path, "np") as file:
        return json.loads((file.metadata() or {}).get("about", "{}"))


def made_by(paths: Sequence[Path]) -> dict[str, Any]:
    """Versions of the first that notes them, and every device and commit that the figures were collected on."""
    notes = [note for note in map(about_of, paths) if "commit" in note]
    if not notes:
        return {}
    several = {key: ", ".join(dict.fromkeys(note[key] for note in notes)) for key in ("device", "commit")}
    return {**notes[0], **several}


def shard_of(text: str) -> tuple[int, int]:
    """`i/k` of the command line: this process, and how many run at once."""
    index, _, count = text.partition("/")
    shard, shards = int(index), int(count or 1)
    if not 0 <= shard < shards:
        raise argparse.ArgumentTypeError(f"expected i/k with i from 0 to k - 1, got {text}")
    return shard, shards
