"""Free generation beside the same reading without copying: does it repeat itself more, does it get names wrong?"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence

import numpy as np

from eval.reading.bench import Bench, batches, bench_arguments, group, opened, progress_of
from eval.reading.measures import repeated_trigrams
from eval.results import host_key, host_note, write_result
from eval.rows import Shape
from eval.statistics import mean_with_interval

ARMS = ("window", "copy", "retrieve2", "retrieve2_copy", "compact32_retrieve2", "compact32_retrieve2_copy")
NOTES = (
    "Greedy continuations of young code and of prose. repetition: share of generated trigrams that were generated "
    "before. exact: of the names that are written (identifiers with an underscore or an inner capital; capitalised "
    "words within a sentence), the share that stand in the prompt; only where any is written. minus_plain: the same "
    "prompts read without copying. Intervals: bootstrap, clustered by package or record."
)
_NAMES = re.compile(r"\b_*[A-Za-z]\w*(?:_|(?<=[a-z0-9])[A-Z])\w+\b|(?<=[a-z,] )[A-Z][a-z]{3,}\b")


def exactness(made: str, prompt: str) -> float:
    """Of the distinct names in a text, the share that stand in its prompt; nan without any."""
    names = {match.group() for match in _NAMES.finditer(made)}
    known = set(re.findall(r"\w+", prompt))
    return float(np.mean([name in known for name in names])) if names else float("nan")


def free(bench: Bench, shape: Shape, arms: Sequence[str], documents: int, count: int) -> dict[str, float]:
    """`<set>.<arm>.repetition` and `.exact`, and how they differ from the same reading without copying."""
    metrics: dict[str, float] = {}
    with bench.samples("free") as keep, progress_of("free", len(bench.sets) * documents * len(arms)) as advance:
        for name, windows in bench.sets.items():
            rows = bench.spread(name, documents)
            contexts = windows.ids[rows][:, : shape.split]
            groups = [group(windows.records[row]) for row in rows]
            prompts = [bench.text(ids) for ids in contexts]
            found: dict[tuple[str, str], np.ndarray] = {}
            for arm in arms:
                texts, repetition = [], []
                for part in batches(len(rows), bench.batch):
                    for ids in list(bench.generate(arm, contexts[part], count)):
                        texts.append(bench.text(ids))
                        repetition.append(repeated_trigrams([int(i) for i in ids.tolist() if i >= 0]))
                        keep(arm=arm, set=name, text=texts[-1])
                    advance(len(contexts[part]))
                found[arm, "repetition"] = np.array(repetition)
                found[arm, "exact"] = np.array([exactness(*pair) for pair in zip(texts, prompts, strict=True)])
            for (arm, what), values in found.items():
                metrics |= _compared(
                    f"{name}.{arm}.{what}", values, found.get((_plain(arm), what)), groups, bench.seed
                )
    return metrics


def _plain(arm: str) -> str:
    """The same reading without copying; empty where there is none."""
    return "window" if arm == "copy" else arm.removesuffix("_copy") if arm.endswith("_copy") else ""


def _compared(
    key: str, values: np.ndarray, plain: np.ndarray | None, groups: Sequence[str], seed: int
) -> dict[str, float]:
    """A mean with its interval, and the paired difference to another reading with its own."""
    metrics: dict[str, float] = {}
    for name, some in ((key, values), (f"{key}.minus_plain", None if plain is None else values - plain)):
        if some is not None:
            there = np.flatnonzero(np.isfinite(some))
            metrics |= mean_with_interval(name, some[there].tolist(), [groups[i] for i in there], seed)
    return metrics


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    bench_arguments(parser, "free", ARMS, "young, prose", batch=30)
    parser.add_argument("--sets", nargs="+", choices=("young", "prose"), default=["young", "prose"])
    parser.add_argument("--documents", type=int, default=60, help="of each set")
    parser.add_argument("--tokens", type=int, default=200, help="written freely")


def run(args: argparse.Namespace) -> None:
    """Measures and writes the result."""
    bench = opened(args, args.sets)
    metrics = free(bench, Shape(), bench.reader.readable(args.arms), args.documents, args.tokens)
    config = {key: getattr(args, key) for key in ("sets", "documents", "tokens", "batch")}
    result = args.result or f"free-{host_key(args.host)}"
    print(write_result(result, metrics, seed=args.seed, config=config, notes=f"{host_note(args.host)} {NOTES}"))
