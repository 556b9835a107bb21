"""Batches of texts over processes, in order; serial where the input is small."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

_BATCH = 1_000_000  # characters that travel to a process at once
_FLOOR = 8_000_000  # characters below which processes cost more than they save


def map_texts(
    function: Callable[[list[str]], Any],
    texts: Sequence[str],
    workers: int | None = None,
    *,
    prepare: Callable[..., None] | None = None,
    arguments: tuple[Any, ...] = (),
) -> Iterator[tuple[int, Any]]:
    """Applies `function` to batches of texts over processes and yields the results in order.

    Args:
        function: a module-level function of a list of texts, so that every start method can send it.
        texts: the texts.
        workers: processes; by default one for each core that this process may use, none for small inputs.
        prepare: a module-level function that every process calls once with `arguments`, before its first batch.
        arguments: as said.

    Yields:
        Index of the batch's first text, and the function's result.
    """
    batches: list[tuple[int, list[str]]] = []
    size = 0
    for index, text in enumerate(texts):
        if not batches or size > _BATCH:
            batches.append((index, []))
            size = 0
        batches[-1][1].append(text)
        size += len(text)
    workers = workers or cores()
    if workers < 2 or sum(map(len, texts)) < _FLOOR:
        if prepare is not None:
            prepare(*arguments)
        for first, batch in batches:
            yield first, function(batch)
        return
    # Forking spares each worker the import of torch, which it does not need; where that is unsafe, they are spawned.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=prepare, initargs=arguments) as pool:
        firsts = [first for first, _ in batches]
        yield from zip(firsts, pool.map(function, [batch for _, batch in batches]), strict=True)


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
