"""What the archives propose at every target position: found by a pool of processes, in arrays that travel well."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from eval.hgr.arms import Layout
from hf_crouter.ngram.archive import Archive
from hf_crouter.ngram.mixture import Candidates, collect


class Search(NamedTuple):
    """Work of one process: a row, the archives to search, and whose continuation is asked for."""

    layout: Layout
    row: np.ndarray
    rebuilt: tuple[np.ndarray, np.ndarray] | None  # ids and confidence `[chunks · chunk]`
    archives: tuple[tuple[int, str], ...]  # chunk count, and a kind of `Layout.extra` or "rebuilt"
    vocab_size: int
    stop_ids: frozenset[int]


def search(work: Search) -> dict[tuple[int, str], dict[str, np.ndarray]]:
    """Candidates of every target position for each archive, in small types."""
    layout, row = work.layout, work.row
    tail = layout.length  # nothing is sorted: these archives are small
    found = {}
    for count, kind in work.archives:
        archive = Archive.empty(work.vocab_size, work.stop_ids, tail_limit=tail)
        if kind == "rebuilt":
            assert work.rebuilt is not None
            ids, confidence = (values[-count * layout.chunk :] for values in work.rebuilt)
            archive = archive.extended(ids, confidence)
        else:
            archive = archive.extended(layout.past(row, count, layout.extra(kind, count)))
        ends = range(layout.split, layout.length)
        candidates = collect([archive.match(row[max(0, end - 64) : end]) for end in ends])
        small = {"positions": np.int16, "orders": np.int8, "tokens": np.int32, "best": np.int32}
        found[count, kind] = {
            name: value.numpy().astype(small.get(name, value.numpy().dtype))
            for name, value in vars(candidates).items()
        }
    return found


def joined(parts: Sequence[dict[str, np.ndarray]], positions: int, device: torch.device | str) -> Candidates:
    """Candidates of several rows of `positions` each as those of one text."""
    entries = [len(part["tokens"]) for part in parts]
    first = np.concatenate([[0], np.cumsum(entries)])
    arrays = {
        "positions": np.concatenate(
            [part["positions"].astype(np.int64) + i * positions for i, part in enumerate(parts)]
        ),
        # where there is nothing, the entry named is none of another text's, nor one behind the last
        "best": np.concatenate(
            [np.where(part["available"], part["best"].astype(np.int64) + first[i], 0) for i, part in enumerate(parts)]
        ),
    }
    for name in ("orders", "tokens", "probabilities", "available", "features"):
        arrays[name] = np.concatenate([part[name] for part in parts])
    tensors = {name: torch.from_numpy(values).to(device) for name, values in arrays.items()}
    for name in ("orders", "tokens"):
        tensors[name] = tensors[name].long()
    return Candidates(**tensors)


def _one_thread() -> None:
    torch.set_num_threads(1)


class Searchers:
    """`search` on so many processes, or at once where there are none; made before an accelerator is touched."""

    def __init__(self, workers: int):
        context = multiprocessing.get_context("fork")
        self.pool = context.Pool(workers, initializer=_one_thread) if workers else None

    def __enter__(self) -> Searchers:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.pool:
            self.pool.terminate()

    def submit(self, work: Search) -> Callable[[], dict]:
        """Returns what waits for the candidates."""
        if self.pool is None:
            found = search(work)
            return lambda: found
        return self.pool.apply_async(search, (work,)).get
