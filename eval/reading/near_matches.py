"""Records that nearly match: the window corrects one, the compressed past holds the old one, which is asked for anew.

Copying is tempted here: what followed the same words before is the value that no longer holds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from eval.reading import stale as stale_values
from eval.reading.bench import Bench, progress_of
from eval.reading.passkeys import WORDS
from eval.reading.stale import hidden, written, young_code

ARMS = (
    "window",
    "full",
    "copy",
    "retrieve2",
    "compact32_retrieve2",
    "soft_retrieve2_copy",
    "copy_half",
    "copy_fitted",
    "retrieve2_copy",
    "retrieve2_copy_fitted",
)
NOTES = (
    "Share of prompts after which the greedy next tokens are the corrected value (new), or the older record's (old). "
    "Six records as JSON, CSV or keys stand somewhere in the compressed part, among young code; the raw window "
    "corrects one and then begins to write it. Intervals: bootstrap over prompts."
)
CITIES = ("Paris", "London", "Berlin", "Madrid", "Rome", "Vienna", "Dublin", "Lisbon", "Athens", "Prague", "Warsaw",
          "Moscow", "Tokyo", "Delhi", "Cairo", "Lima", "Boston", "Chicago", "Denver", "Dallas")  # fmt: skip
FORMS = ("json", "csv", "key")


@dataclass(frozen=True, eq=False)
class NearMatch:
    """A prompt whose next value stands in its window, while a matching older record has another.

    Attributes:
        ids: `[length]`.
        answer: ids of the new value.
        stale: ids of the older record's.
        form: of `FORMS`.
        record: `(start, end)` of the older record, in tokens.
    """

    ids: np.ndarray
    answer: tuple[int, ...]
    stale: tuple[int, ...]
    form: str
    record: tuple[int, int]

    @property
    def older(self) -> tuple[tuple[int, ...], ...]:
        """The values that no longer hold."""
        return (self.stale,)


def _record(form: str, name: str, number: int, city: str) -> str:
    if form == "json":
        return json.dumps({"id": number, "name": name, "city": city}) + "\n"
    return f"{number},{name},{city}\n" if form == "csv" else f"{name}.{number}.city = {city}\n"


def near_match(bench: Bench, hay: np.ndarray, length: int, form: str, random: np.random.Generator) -> NearMatch:
    """Old records in the compressed part; in the window one of them is corrected, and then written once more.

    Args:
        bench: tokenizer and where the compressed part ends.
        hay: ids of other text, at least `length`.
        length: tokens of the prompt.
        form: of `FORMS`.
        random: draws everything.
    """
    names = ["-".join(random.choice(WORDS, 2, replace=False)) for _ in range(6)]
    numbers = random.choice(np.arange(1000, 9999), 6, replace=False)
    cities = random.choice(CITIES, 7, replace=False)
    texts = [_record(form, *values) for values in zip(names, map(int, numbers), map(str, cities[:6]), strict=True)]
    table = [bench.encode(text) for text in texts]
    new, which = str(cities[6]), int(random.integers(6))
    text = _record(form, names[which], int(numbers[which]), new)
    # no record in the window but the corrected one: its value is what the text goes on with
    cut = text.index(new)
    ending = bench.encode(
        f"\n\nCorrection: {names[which]} has moved to {new}. The record is now:\n\n{text[:cut]}".rstrip(" ")
    )
    blank = " " if text[:cut].endswith(" ") else ""
    records = [token for part in table for token in part]
    ids, at = hidden(bench, hay, length, records, ending, random)
    start = at + sum(len(part) for part in table[:which])
    answer, stale = (tuple(bench.encode(blank + city)) for city in (new, str(cities[which])))
    return NearMatch(ids, answer, stale, form, (start, start + len(table[which])))


def near_matches(bench: Bench, arms: Sequence[str], length: int, count: int) -> dict[str, float]:
    """`<arm>.new` and `<arm>.old` with their intervals: which value was written."""
    samples = []
    for n in range(count):
        random = np.random.default_rng([bench.seed, n, 17])
        hay = young_code(bench, length, random)
        samples.append(near_match(bench, hay, length, FORMS[n % len(FORMS)], random))
    metrics: dict[str, float] = {}
    with bench.samples("near_matches") as keep, progress_of("near matches", count * len(arms)) as advance:
        for arm in arms:
            metrics |= written(bench, arm, samples, arm, keep, advance)
    return metrics


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    stale_values.configure(parser, "near-matches", ARMS, length=4096, samples=90, batch=30)


def run(args: argparse.Namespace) -> None:
    """Measures and writes the result."""
    stale_values.run(
        args, "near-matches", NOTES, lambda bench, arms: near_matches(bench, arms, args.length, args.samples)
    )
