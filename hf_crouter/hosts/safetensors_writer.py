"""Weights written to safetensors files block by block, so that a model larger than memory can be converted."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

SHARD_BYTES = 1_000_000_000
"""Largest file of weights, where no single tensor is larger."""
_BLOCK_VALUES = 1 << 21  # 8 MB in float32


@dataclass(frozen=True)
class Source:
    """A tensor that is read as it is written.

    Attributes:
        name: in the file.
        shape: in values; one or more axes.
        read: the float32 values of the rows `[start, stop)`; called from several threads.
    """

    name: str
    shape: tuple[int, ...]
    read: Callable[[int, int], np.ndarray]

    @property
    def bytes(self) -> int:
        """Size in the file, where values are bfloat16."""
        return 2 * prod(self.shape)


def write_bfloat16(
    folder: Path,
    sources: Sequence[Source],
    *,
    shard_bytes: int = SHARD_BYTES,
    threads: int | None = None,
    poll: Callable[[int], None] | None = None,
) -> None:
    """Writes `model.safetensors`, or several shards and their index, as `from_pretrained` reads them.

    Memory holds one block of about 8 MB for each thread, whatever the size of the model.

    Args:
        folder: where to write; exists.
        sources: the tensors.
        shard_bytes: largest file; a tensor that is larger has one to itself.
        threads: that read and convert at the same time; by default two for each core, at most 8.
        poll: called with the bytes written so far, by one thread at a time.
    """
    shards = _shards(sorted(sources, key=lambda source: source.name), shard_bytes)
    names = [f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = ["model.safetensors"]
    written, lock = 0, threading.Lock()

    def write(work: tuple[BinaryIO, int, Source, int, int]) -> None:
        nonlocal written
        file, place, source, start, stop = work
        data = _bfloat16(source.read(start, stop))
        with lock:
            file.seek(place)
            file.write(data)
            written += len(data)
            if poll is not None:
                poll(written)

    pool = ThreadPoolExecutor(threads or min(8, 2 * (os.cpu_count() or 1)))
    try:
        for name, shard in zip(names, shards, strict=True):
            with (folder / name).open("wb") as file:
                begin = file.write(_header(shard))
                for _ in pool.map(write, _work(file, begin, shard)):
                    pass
    finally:
        pool.shutdown(cancel_futures=True)  # after an error nothing more is read
    if len(shards) > 1:
        where = {source.name: name for name, shard in zip(names, shards, strict=True) for source in shard}
        index = {"metadata": {"total_size": sum(source.bytes for source in sources)}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(sources: Sequence[Source], limit: int) -> list[list[Source]]:
    shards: list[list[Source]] = [[]]
    size = 0
    for source in sources:
        if shards[-1] and size + source.bytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(source)
        size += source.bytes
    return shards


def _header(sources: Sequence[Source]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    place = 0
    for source in sources:
        offsets = [place, place + source.bytes]
        entries[source.name] = {"dtype": "BF16", "shape": list(source.shape), "data_offsets": offsets}
        place += source.bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data begins at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def _work(file: BinaryIO, place: int, sources: Sequence[Source]) -> Iterator[tuple[BinaryIO, int, Source, int, int]]:
    for source in sources:
        rows, row = source.shape[0], source.bytes // source.shape[0]
        step = max(1, 2 * _BLOCK_VALUES // row)
        for start in range(0, rows, step):
            yield file, place + start * row, source, start, min(start + step, rows)
        place += source.bytes


def _bfloat16(values: np.ndarray) -> bytes:
    values = np.require(values, np.float32, ["C", "W"])
    return torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().tobytes()
