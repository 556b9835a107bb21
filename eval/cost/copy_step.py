"""What copying adds to a decode step of the host on a CPU, at several sizes of the archive."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from eval.results import write_result
from eval.rows import Rows
from hf_crouter.cache.kv_cache import CompressedDynamicCache
from hf_crouter.crouter.loading import load_crouter
from hf_crouter.errors import InputError
from hf_crouter.hosts.loading import load_host
from hf_crouter.hosts.tokenizers import special_ids
from hf_crouter.modes.copy import Copier
from hf_crouter.ngram.gate import find_gate
from hf_crouter.ngram.row_archive import Archives
from hf_crouter.types import Chunk, Row

CHUNK, PREFIX = 512, 4
NAMES = {10_000: "10k", 100_000: "100k", 1_000_000: "1m"}


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("--host", default="smollm2-135m")
    parser.add_argument("--data", type=Path, required=True, help="folder of eval.documents")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(NAMES), help="archived tokens")
    parser.add_argument("--steps", type=int, default=100, help="timed steps of each")
    parser.add_argument("--leak-steps", type=int, default=2000)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--soft-slots", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--result", default="copy-cpu")


def archived(ids: torch.Tensor, size: int, config: Any) -> CompressedDynamicCache:
    """A cache that stands for `[prefix | size compressed tokens | window]`, without any keys and values.

    Args:
        ids: `[1, T]`, the row's tokens.
        size: compressed tokens; whole chunks of them.
        config: of the host.
    """
    cache = CompressedDynamicCache(config=config)
    starts = range(PREFIX, PREFIX + size - CHUNK + 1, CHUNK)
    texts = {start: ids[0, start : start + CHUNK] for start in starts}
    chunks = tuple(Chunk(start, start + CHUNK, text, text) for start, text in texts.items())
    cache.rows, cache.ids = (Row(0, PREFIX, chunks),), ids
    return cache


def resident_mib() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


class HostSteps:
    """Decode steps of the host behind a filled cache of constant length."""

    def __init__(self, host: Any, ids: torch.Tensor, slots: int):
        self.host, self.token = host, ids[:, :1]
        self.cache = DynamicCache(config=host.config)
        with torch.no_grad():
            for first in range(0, slots, 512):
                host(input_ids=ids[:, first : min(first + 512, slots)], past_key_values=self.cache, logits_to_keep=1)

    @torch.no_grad()
    def __call__(self) -> float:
        """Seconds of one step."""
        start = time.perf_counter()
        self.host(input_ids=self.token, past_key_values=self.cache)
        spent = time.perf_counter() - start
        self.cache.crop(-1)
        return spent


class CopySteps:
    """Steps of copying along a real text, with the host's real scores of that text.

    Args:
        copier: with its archive.
        cache: that says what is archived.
        ids: `[1, T]`, the text; its end follows the archive.
        start: columns at the first step.
        scores: `[S, V]`, the host's scores before the S columns from `start` on.
    """

    def __init__(self, copier: Copier, cache: Any, ids: torch.Tensor, start: int, scores: torch.Tensor):
        self.copier, self.cache, self.ids, self.start, self.scores, self.at = copier, cache, ids, start, scores, 0

    def __call__(self) -> float:
        """Seconds of one step."""
        at = self.at % len(self.scores)
        self.at += 1
        columns = self.ids[:, : self.start + at]
        start = time.perf_counter()
        self.copier.step(self.cache, columns, self.scores[at : at + 1])
        return time.perf_counter() - start


def measure(hosts: dict[str, Any], copier_of: Any, text: torch.Tensor, sizes: list[int], args: argparse.Namespace
            ) -> dict[str, float]:  # fmt: skip
    """Seconds of steps and their ratios, blocks of host and copying in turn.

    Args:
        hosts: by dtype.
        copier_of: makes a `Copier` for a prompt's width.
        text: `[1, T]`, more than the largest archive and window.
        sizes: archived tokens.
        args: `window`, `soft_slots`, `steps`, `leak_steps`.
    """
    metrics: dict[str, float] = {}
    slots, scored = PREFIX + args.window + args.soft_slots, 256
    steps = {name: HostSteps(host, text, slots) for name, host in hosts.items()}
    first = next(iter(hosts.values()))
    for size in sizes:
        size = size // CHUNK * CHUNK
        start = PREFIX + size + args.window
        if text.shape[1] < start + scored:
            raise InputError(f"--data: expected more than {start + scored} tokens of code, got {text.shape[1]}")
        with torch.no_grad():
            piece = text[:, start - args.window : start + scored - 1]
            scores = first(input_ids=piece, logits_to_keep=scored).logits[0].float()
        cache, copier = archived(text[:, :start], size, first.config), copier_of(start)
        begun = time.perf_counter()
        copier.of_rows(cache)
        name = NAMES.get(size, min(NAMES.items(), key=lambda item: abs(item[0] - size))[1])
        metrics[f"copy.archive_seconds.{name}"] = time.perf_counter() - begun
        copying = CopySteps(copier, cache, text, start, scores)
        for step in (copying, *steps.values()):
            step()  # not timed: first calls are slow
        times: dict[str, list[float]] = {key: [] for key in ("copy", *steps)}
        for _ in range(max(1, args.steps // 10)):
            times["copy"] += [copying() for _ in range(10)]
            for key, step in steps.items():
                times[key] += [step() for _ in range(10)]
        medians = {key: float(np.median(values)) for key, values in times.items()}
        fastest = min(medians[key] for key in steps)
        mean = float(np.mean(times["copy"]))
        metrics[f"copy.step_share.{name}"] = medians["copy"] / fastest
        metrics[f"copy.step_mean_share.{name}"] = mean / fastest
        metrics[f"copy.step_ms.{name}"] = 1e3 * medians["copy"]
        metrics |= {f"host.step_ms.{key}.{name}": 1e3 * medians[key] for key in steps}
        print(f"{name}: copy {1e3 * medians['copy']:.2f} ms, host {1e3 * fastest:.1f} ms", file=sys.stderr, flush=True)
        for _ in range(256):
            copying()
        before = resident_mib()
        for _ in range(args.leak_steps):
            copying()
        metrics[f"copy.leak_mib.{name}"] = resident_mib() - before
    return metrics


def run(args: argparse.Namespace) -> None:
    """Measures and writes the result; always on the CPU."""
    torch.set_num_threads(args.threads)
    rows = Rows.load(args.data, "young").ids
    order = np.random.default_rng(args.seed).permutation(len(rows))
    text = torch.from_numpy(rows[order].astype(np.int64).reshape(1, -1))
    hosts = {name: load_host(args.host, dtype=getattr(torch, name))[0] for name in args.dtypes}
    _, tokenizer = load_host(args.host)
    crouter, _ = load_crouter()
    host = next(iter(hosts.values()))
    gate, stops = find_gate(crouter, host), special_ids(tokenizer, host)
    embedding: Any = host.get_input_embeddings()
    vocabulary = int(embedding.weight.shape[0])

    def copier_of(width: int) -> Copier:
        return Copier(Archives(vocabulary, stops), gate, 1.0, width, width)

    metrics = measure(hosts, copier_of, text, args.sizes, args)
    config = {"host": args.host, "threads": args.threads, "window": args.window, "soft_slots": args.soft_slots,
              "steps": args.steps, "leak_steps": args.leak_steps, "dtypes": args.dtypes, "batch": 1}  # fmt: skip
    notes = (
        "step_share: median time of Copier.step over the median of a decode step of the host behind window and soft "
        "slots (the fastest dtype), timed in turn in one process, along code that the host has not seen with its own "
        "scores. leak_mib: growth of resident memory over leak_steps further steps."
    )
    print(write_result(args.result, metrics, seed=args.seed, config=config, notes=notes))
