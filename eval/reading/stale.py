"""What experiments on outdated values share: records hidden in other text, which value is written, the command."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from eval.reading.bench import PREFIX, Bench, batches, bench_arguments, opened
from eval.results import host_key, host_note, write_result
from eval.statistics import mean_with_interval
from hf_crouter.errors import InputError


class Asked(Protocol):
    """A prompt that is to go on with a value of which there are older ones."""

    @property
    def ids(self) -> np.ndarray:
        """Of the prompt, `[length]`."""
        ...

    @property
    def answer(self) -> tuple[int, ...]:
        """Ids of the value that holds."""
        ...

    @property
    def older(self) -> tuple[tuple[int, ...], ...]:
        """Ids of those that no longer hold."""
        ...

    @property
    def form(self) -> str:
        """How records are written."""
        ...


def young_code(bench: Bench, length: int, random: np.random.Generator) -> np.ndarray:
    """Ids of young code, at least `length`."""
    rows = bench.sets["young"].ids
    return np.concatenate([rows[i] for i in np.resize(random.permutation(len(rows)), -(-length // rows.shape[1]))])


def hidden(
    bench: Bench, hay: np.ndarray, length: int, records: Sequence[int], ending: Sequence[int],
    random: np.random.Generator,
) -> tuple[np.ndarray, int]:  # fmt: skip
    """A prompt `[length]` with records somewhere in its compressed part and an ending, and where the records begin.

    Raises:
        InputError: a prompt that is too short for them.
    """
    compressed = bench.compressed_end(length)
    room = compressed - PREFIX - len(records)
    if room < 0 or len(ending) > length - compressed:
        raise InputError(
            f"expected prompts that hold {len(records)} tokens of records and a question of {len(ending)}, "
            f"got {length} tokens: too few for the records"
        )
    at = PREFIX + int(random.integers(0, room + 1))
    rest = length - at - len(records) - len(ending)
    pieces = [hay[:at], records, hay[at : at + rest], ending]
    return np.concatenate([np.asarray(piece, np.int64) for piece in pieces]), at


def written(
    bench: Bench, arm: str, samples: Sequence[Asked], key: str, keep: Any, advance: Callable[[int], None], **noted: Any
) -> dict[str, float]:
    """`<key>.new` and `<key>.old` with their intervals: which value an arm writes, the one that holds or an older one.

    Args:
        bench: generates.
        arm: of `eval.arms`.
        samples: prompts of one length.
        key: of the metrics.
        keep: is given every sample.
        advance: is told how many more were read.
        **noted: kept with each sample.
    """
    most = max(len(ids) for sample in samples for ids in (sample.answer, *sample.older))
    new, old = [], []
    for part in batches(len(samples), bench.batch):
        made = bench.generate(arm, np.stack([sample.ids for sample in samples[part]]), most)
        for sample, ids in zip(samples[part], made.tolist(), strict=True):
            new.append(float(tuple(ids[: len(sample.answer)]) == sample.answer))
            old.append(float(any(tuple(ids[: len(value)]) == value for value in sample.older)))
            keep(arm=arm, **noted, form=sample.form, new=new[-1], old=old[-1], made=bench.text(ids))
        advance(len(made))
    names = [str(n) for n in range(len(samples))]
    metrics = mean_with_interval(f"{key}.new", new, names, bench.seed)
    metrics |= mean_with_interval(f"{key}.old", old, names, bench.seed)
    print(f"{key}: new {metrics[f'{key}.new']:.2f}, old {metrics[f'{key}.old']:.2f}", flush=True)
    return metrics


def configure(
    parser: argparse.ArgumentParser, name: str, arms: Sequence[str], length: int, samples: int, batch: int
) -> None:
    """Adds the arguments; `batch` on an accelerator."""
    bench_arguments(parser, name, arms, "young", batch)
    parser.add_argument("--length", type=int, default=length, help="tokens of a prompt")
    parser.add_argument("--samples", type=int, default=samples, help="prompts")


def run(
    args: argparse.Namespace, name: str, notes: str, measure: Callable[[Bench, list[str]], dict[str, float]],
    **config: Any,
) -> None:  # fmt: skip
    """Measures and writes the result.

    Args:
        args: of `configure`.
        name: of the experiment.
        notes: of the result, behind the host's.
        measure: gives the metrics of the arms that can be read.
        **config: what shaped it beside length, samples and window.
    """
    bench = opened(args, ["young"])
    metrics = measure(bench, bench.reader.readable(args.arms))
    config = {"length": args.length, "samples": args.samples, "window": bench.window, **config}
    result = args.result or f"{name}-{host_key(args.host)}"
    print(write_result(result, metrics, seed=args.seed, config=config, notes=f"{host_note(args.host)} {notes}"))
