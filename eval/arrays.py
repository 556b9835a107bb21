"""What the stages of the HGR measurement share: documents in blocks, progress, files that other processes wait for."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from eval.documents import Record, place
from eval.hgr_passes import Block, DocumentReader
from hf_crouter.errors import InputError
from hf_crouter.utils.io import replaced_file


class Progress:
    """A line now and then: how far, how fast, how long still."""

    def __init__(self, what: str, total: int, reader: DocumentReader):
        self.what, self.total, self.reader, self.start = what, total, reader, time.monotonic()
        self.before, self.said = reader.forwarded, 0.0

    def __call__(self, done: int) -> None:
        """Prints at most every two seconds, and at the end."""
        now = time.monotonic()
        if done < self.total and now - self.said < 2:
            return
        self.said, passed = now, now - self.start
        rate = (self.reader.forwarded - self.before) / max(passed, 1e-9)
        left = passed / max(done, 1) * (self.total - done)
        print(f"{self.what}: {done}/{self.total} documents, {rate:,.0f} tokens/s, {passed:.0f} s, {left:.0f} s left",
              flush=True)  # fmt: skip


def blocks(
    reader: DocumentReader, ids: np.ndarray, index: np.ndarray, size: int, partner: np.ndarray | None, archives: list
) -> Iterator[Block]:
    """Blocks of documents, two of them ahead so that the archives are searched meanwhile."""
    ahead: list[Block] = []
    for some in (index[i : i + size] for i in range(0, len(index), size)):
        others = ids[partner[some]].astype(np.int64) if partner is not None else None
        ahead.append(reader.prepare(some, ids[some].astype(np.int64), others, archives))
        if len(ahead) > 2:
            yield ahead.pop(0)
    yield from ahead


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


def about(args: argparse.Namespace) -> dict[str, Any]:
    """What another shard's or an earlier run's files must agree on."""
    return {"chunks": args.chunks, "gate_documents": args.gate_documents, "seed": args.seed}


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
