"""What measurements on several processes share: arrays on disk, files that the others wait for, shards."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from eval.documents import Record, place
from hf_crouter.errors import InputError
from hf_crouter.utils.io import replaced_file


def chosen(records: Sequence[Record], most: int | None, seed: int) -> np.ndarray:
    """Numbers of at most so many documents in a seeded order: what an ended lease leaves is a fair sample."""
    return np.array(sorted(range(len(records)), key=lambda i: place(seed, records[i].name))[:most], np.int64)


def save_arrays(path: Path, arrays: dict[str, np.ndarray], about: dict[str, Any]) -> None:
    """Writes a safetensors file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced_file(path) as part:
        save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, part, {"about": json.dumps(about)})


def about_of(path: Path) -> dict[str, Any]:
    """What `save_arrays` noted."""
    with safe_open(path, "np") as file:
        return json.loads((file.metadata() or {}).get("about", "{}"))


def wait_for(paths: Sequence[Path], seconds: float = 300) -> None:
    """Until other processes have written these files.

    Raises:
        InputError: they do not in time.
    """
    end = time.monotonic() + seconds
    while missing := [path for path in paths if not path.exists()]:
        if time.monotonic() > end:
            raise InputError(f"{missing[0]}: expected from another shard within {seconds:.0f} s; is it running?")
        time.sleep(0.5)


def joined_arrays(parts: Sequence[Mapping[str, np.ndarray]], size: str = "documents") -> dict[str, np.ndarray]:
    """Arrays of several parts one behind the other; a figure that one of them lacks is nan, or -1, there.

    Args:
        parts: arrays `[n, ...]` by key.
        size: key of an array that every part has.
    """
    out = {}
    for key in sorted(set().union(*parts)):
        like = next(part[key] for part in parts if key in part)
        none = -1 if like.dtype.kind == "i" else np.nan
        out[key] = np.concatenate(
            [
                part[key] if key in part else np.full((len(part[size]), *like.shape[1:]), none, like.dtype)
                for part in parts
            ]
        )
    return out


def shard_of(text: str) -> tuple[int, int]:
    """`i/k` of the command line: this process, and how many run at once."""
    index, _, count = text.partition("/")
    shard, shards = int(index), int(count or 1)
    if not 0 <= shard < shards:
        raise argparse.ArgumentTypeError(f"expected i/k with i from 0 to k - 1, got {text}")
    return shard, shards
