"""Keys that are set anew again and again, and asked for at the end: only the latest value is right.

The setting of PI-LLM (arXiv 2506.08184): a few keys are updated many times, in turns, and every older value tempts.
All updates stand in the compressed part; the window asks for one key in the words in which it was set. The forms are
those of files (assignments, configuration, logs, tables, function names), written before any arm was measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from eval.reading import stale as stale_values
from eval.reading.bench import Bench, progress_of
from eval.reading.passkeys import WORDS
from eval.reading.stale import hidden, written, young_code
from hf_crouter.errors import InputError

ARMS = ("window", "full", "copy", "copy_fitted", "retrieve2", "retrieve2_copy", "compact32_retrieve2",
        "compact32_retrieve2_copy")  # fmt: skip
UPDATES = (1, 3, 10, 32, 100)
KEYS, VALUES = 4, 900  # values differ in a number of three digits
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

    @property
    def older(self) -> tuple[tuple[int, ...], ...]:
        """The values that no longer hold."""
        return self.stale


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
        InputError: more than can differ, or a prompt that is too short for so many.
    """
    if not 1 <= updates <= VALUES:
        raise InputError(f"updates: expected 1 to {VALUES} of a key, got {updates}")
    line, question = FORMS[form]
    sep = "_" if form in ("config", "rename") else "-"
    names = random.choice(WORDS, (KEYS, 2), replace=False)
    keys = [sep.join(map(str, pair)) for pair in names]
    pool = random.permutation([word for word in WORDS if word not in names])
    values = [[f"{pool[int(i)]}{int(n)}" for i, n in zip(random.integers(0, len(pool), updates),
                                                          random.permutation(VALUES)[:updates] + 100, strict=True)]
              for _ in keys]  # fmt: skip
    text = "".join(
        line.format(key=keys[k], value=values[k][u]) for u in range(updates) for k in random.permutation(KEYS)
    )
    which = int(random.integers(KEYS))
    asked = line[: line.index("{value}")].format(key=keys[which])
    records, ending = bench.encode(text), bench.encode(f"\n\n{question}{asked}".rstrip(" "))
    blank = " " if asked.endswith(" ") else ""
    ids, at = hidden(bench, hay, length, records, ending, random)
    *stale, answer = (tuple(bench.encode(blank + value)) for value in values[which])
    return Updated(ids, answer, tuple(stale), form, (at, at + len(records)))


def measured(bench: Bench, arms: Sequence[str], length: int, updates: Sequence[int], count: int) -> dict[str, float]:
    """`u<updates>.<arm>.new` and `.old` with their intervals."""
    metrics: dict[str, float] = {}
    forms, samples = list(FORMS), {}
    for each in updates:  # all of them before any is read: one that does not fit is told at once
        samples[each] = []
        for n in range(count):
            random = np.random.default_rng([bench.seed, n, each, 29])
            hay = young_code(bench, length, random)
            samples[each].append(updated(bench, hay, length, each, forms[n % len(forms)], random))
    with bench.samples("updates") as keep, progress_of("updates", count * len(arms) * len(updates)) as advance:
        for each in updates:
            for arm in arms:
                metrics |= written(bench, arm, samples[each], f"u{each}.{arm}", keep, advance, updates=each)
    return metrics


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    stale_values.configure(parser, "updates", ARMS, length=8192, samples=60, batch=20)
    parser.add_argument("--updates", type=int, nargs="+", default=list(UPDATES), help="of each key")


def run(args: argparse.Namespace) -> None:
    """Measures and writes the result."""
    stale_values.run(
        args, "updates", NOTES,
        lambda bench, arms: measured(bench, arms, args.length, args.updates, args.samples), keys=KEYS,
    )  # fmt: skip
