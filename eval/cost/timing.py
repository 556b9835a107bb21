"""What every measurement of speed shares: work that takes turns, its seconds and its peak of memory."""

from __future__ import annotations

import gc
import math
import sysconfig
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from hf_crouter.errors import InputError
from hf_crouter.utils.progress import Progress

PIECE = 2048  # tokens that a host with little memory reads at once
GIB = 2**30


def long_text(tokenizer: Any, tokens: int) -> torch.Tensor:
    """The first `tokens` ids `[tokens]` of the standard library's source, file by file in order of name.

    Raises:
        InputError: the library holds fewer.
    """
    ids: list[int] = []
    folder = Path(sysconfig.get_path("stdlib"))
    paths = [*sorted(folder.glob("*.py")), *sorted(path for path in folder.glob("[a-z]*/**/*.py")
                                                   if "site-packages" not in path.parts)]  # fmt: skip
    for path in paths:
        if len(ids) >= tokens:
            break
        ids += tokenizer(path.read_text(encoding="utf-8", errors="ignore"), add_special_tokens=False)["input_ids"]
    if len(ids) < tokens:
        raise InputError(f"expected {tokens:,} tokens of the standard library, got {len(ids):,}")
    return torch.tensor(ids[:tokens])


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock seconds of one call, from an empty queue of the device to an empty one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turns(
    works: Mapping[str, Callable[[], Callable[[], object]]], turns: int, progress: Progress
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of every turn and peaks in GiB, by what was timed.

    Args:
        works: each makes ready, untimed, what is then timed.
        turns: after one that warms up and whose peak is taken.
        progress: is told of each run.
    """
    times: dict[str, list[float]] = {name: [] for name in works}
    peaks = {}
    for turn in range(turns + 1):
        for name, ready in works.items():
            work = ready()
            if turn:
                times[name].append(seconds(work))
            else:
                peaks[name] = peak_gib(work)
            progress.advance()
    return times, peaks


def peak_gib(work: Callable[[], object]) -> float:
    """GiB that the allocator held at most over what stood there before; not a number without a GPU."""
    if not torch.cuda.is_available():
        work()
        return math.nan
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / GIB


@torch.no_grad()
def read_plain(host: Any, ids: torch.Tensor, piece: int = PIECE) -> DynamicCache:
    """The host's own prefill of rows `[B, T]`, or of one `[T]`, in pieces; gives its cache."""
    cache = DynamicCache(config=host.config.get_text_config(decoder=True))
    for part in torch.atleast_2d(ids).split(piece, 1):
        host(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def generated(host: Any, history: Any, ids: torch.Tensor, new: int, **options: Any) -> Any:
    """Greedy generation of so many tokens after prompts `[B, T]`."""
    options |= {"logits_processor": [history] if history is not None else [], "do_sample": False, "pad_token_id": 0}
    return host.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, **options)


class Stamps(BaseStreamer):
    """Notes when each token comes; the first is of the prompt."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Notes the time."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing."""
