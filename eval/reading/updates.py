"""Keys that are set anew again and again, and asked for at the end: only the latest value is right.

The setting of PI-LLM (arXiv 2506.08184): a few keys are updated many times, in turns, and every older value tempts.
All updates stand in the compressed part; the window asks for one key in the words in which it was set. The forms are
those of files (assignments, configuration, logs, tables, function names), written before any arm was measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from eval.arms import GENERATING, Reader
from eval.reading.bench import PREFIX, Bench, batches, progress_of
from eval.reading.passkeys import WORDS
from eval.results import host_key, host_note, write_result
from eval.rows import Rows
from eval.statistics import mean_with_interval
from hf_crouter.chunking import tokenizer_fingerprint
from hf_crouter.crouter.loading import load_crouter
from hf_crouter.errors import InputError
from hf_crouter.hosts.loading import load_host

ARMS = ("window", "full", "copy", "copy_fitted", "retrieve2", "retrieve2_copy", "compact32_retrieve2",
        "compact32_retrieve2_copy")  # fmt: skip
UPDATES = (1, 3, 10, 32, 100)
KEYS = 4
NOTES = (
    "PI-LLM's setting: four keys are set so many times each, in turns, somewhere in the compressed part, among young "
    "code; the raw window asks for one of them in the words in which it was set. u<updates>.<arm>.new: share of "
    "prompts after which the greedy next tokens are its latest value, .old: one of its older values. Intervals: "
    "bootstrap over prompts."
)
FORMS: dict[str, tuple[str, str]] = {  # how a key is set, and what begins the question
    "colon": ("{key}: {value}\n", "The latest entry of each name:\n\n"),
    "config": ("{key} = {value}\n", "# the values that are in force now\n"),
    "log": ("INFO set {key} to {value}\n", "Last line of the log for each name:\n\n"),
    "table": ("| {key} | {value} |\n", "The table as it stands now:\n\n"),
    "rename": ("# the function {key} is now called {value}\n", "# present names\n\n"),
}


@dataclass(frozen=True, eq=False)
class Updated:
    """A prompt that asks for a key's latest value.

    Attributes:
        ids: `[length]`.
        answer: ids of the latest value.
        stale: ids of each older one.
        form: of `FORMS`.
        records: `(start, end)` of all updates, in tokens.
    """

    ids: np.ndarray
    answer: tuple[int, ...]
    stale: tuple[tuple[int, ...], ...]
    form: str
    records: tuple[int, int]


def updated(
    bench: Bench, hay: np.ndarray, length: int, updates: int, form: str, random: np.random.Generator
) -> Updated:
    """Keys set in turns in the compressed part, and one of them asked for.

    Args:
        bench: tokenizer and where the compressed part ends.
        hay: ids of other text, at least `length`.
        length: tokens of the prompt.
        updates: of each key.
        form: of `FORMS`.
        random: draws everything.

    Raises:
        InputError: a prompt that is too short for so many.
    """
    line, question = FORMS[form]
    sep = "_" if form in ("config", "rename") else "-"
    names = random.choice(WORDS, (KEYS, 2), replace=False)
    keys = [sep.join(map(str, pair)) for pair in names]
    pool = random.permutation([word for word in WORDS if word not in names])
    values = [[f"{pool[int(i)]}{int(n)}" for i, n in zip(random.integers(0, len(pool), updates),
                                                          random.permutation(900)[:updates] + 100, strict=True)]
              for _ in keys]  # fmt: skip
    text = "".join(
        line.format(key=keys[k], value=values[k][u]) for u in range(updates) for k in random.permutation(KEYS)
    )
    which = int(random.integers(KEYS))
    asked = line[: line.index("{value}")].format(key=keys[which])
    records, ending = bench.encode(text), bench.encode(f"\n\n{question}{asked}".rstrip(" "))
    blank = " " if asked.endswith(" ") else ""
    compressed = bench.compressed_end(length)
    room = compressed - PREFIX - len(records)
    if room < 0 or len(ending) > length - compressed:
        raise InputError(f"updates: expected prompts that hold {len(records)} tokens of records, got {length} tokens")
    at = PREFIX + int(random.integers(0, room + 1))
    rest = length - at - len(records) - len(ending)
    pieces = [hay[:at], records, hay[at : at + rest], ending]
    ids = np.concatenate([np.asarray(piece, np.int64) for piece in pieces])
    *stale, answer = (tuple(bench.encode(blank + value)) for value in values[which])
    return Updated(ids, answer, tuple(stale), form, (at, at + len(records)))


def measured(bench: Bench, arms: Sequence[str], length: int, updates: Sequence[int], count: int) -> dict[str, float]:
    """`u<updates>.<arm>.new` and `.old` with their intervals."""
    rows = bench.sets["young"].ids
    metrics: dict[str, float] = {}
    names, forms = [str(n) for n in range(count)], list(FORMS)
    with bench.samples("updates") as keep, progress_of("updates", count * len(arms) * len(updates)) as advance:
        for each in updates:
            samples = []
            for n in range(count):
                random = np.random.default_rng([bench.seed, n, each, 29])
                order = np.resize(random.permutation(len(rows)), -(-length // rows.shape[1]))
                hay = np.concatenate([rows[i] for i in order])
                samples.append(updated(bench, hay, length, each, forms[n % len(forms)], random))
            most = max(len(ids) for s in samples for ids in (s.answer, *s.stale))
            for arm in arms:
                new, old = [], []
                for part in batches(count, bench.batch):
                    made = bench.generate(arm, np.stack([s.ids for s in samples[part]]), most)
                    for sample, ids in zip(samples[part], made.tolist(), strict=True):
                        new.append(float(tuple(ids[: len(sample.answer)]) == sample.answer))
                        old.append(float(any(tuple(ids[: len(value)]) == value for value in sample.stale)))
                        keep(arm=arm, updates=each, form=sample.form, new=new[-1], old=old[-1], made=bench.text(ids))
                    advance(len(made))
                metrics |= mean_with_interval(f"u{each}.{arm}.new", new, names, bench.seed)
                metrics |= mean_with_interval(f"u{each}.{arm}.old", old, names, bench.seed)
                print(f"{each} updates, {arm}: new {np.mean(new):.2f}, old {np.mean(old):.2f}", flush=True)
    return metrics


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    cuda = torch.cuda.device_count() > 0
    parser.add_argument("--data", type=Path, required=True, help="folder of the sets of eval.documents: young")
    parser.add_argument("--host", default="smollm2-135m", help="known name, folder or hub name")
    parser.add_argument("--crouter", help="the shipped one by default; none: arms that need one are left out")
    parser.add_argument("--gate", type=Path, help="folder of a gate that was fitted for this host")
    parser.add_argument("--arms", nargs="+", choices=GENERATING, default=list(ARMS))
    parser.add_argument("--length", type=int, default=6144, help="tokens of a prompt")
    parser.add_argument("--updates", type=int, nargs="+", default=list(UPDATES), help="of each key")
    parser.add_argument("--samples", type=int, default=60, help="prompts of each number of updates")
    parser.add_argument("--batch", type=int, default=20 if cuda else 2, help="prompts at once")
    parser.add_argument("--save", type=Path, help="folder for single samples, JSON lines")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--result", help="updates-HOST by default")


def run(args: argparse.Namespace) -> None:
    """Measures and writes the result."""
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    host, tokenizer = load_host(args.host, device, torch.bfloat16 if cuda else torch.float32)
    crouter = None if args.crouter == "none" else load_crouter(args.crouter, device)[0]
    reader = Reader(host, tokenizer, crouter, args.gate)
    sets = {"young": Rows.load(args.data, "young", tokenizer_fingerprint(tokenizer))}
    bench = Bench(reader, sets, args.batch, args.save, args.seed)
    metrics = measured(bench, reader.readable(args.arms), args.length, args.updates, args.samples)
    config = {"length": args.length, "samples": args.samples, "window": reader.window, "keys": KEYS}
    result = args.result or f"updates-{host_key(args.host)}"
    print(write_result(result, metrics, seed=args.seed, config=config, notes=f"{host_note(args.host)} {NOTES}"))
