"""The next line of code that the host has not seen, written greedily."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from eval.reading.bench import Bench, batches, group, progress_of
from eval.reading.measures import (
    first_line,
    known_names,
    repeated_trigrams,
    right_before_mistake,
    similarity,
    statement,
)
from eval.rows import Rows, Shape
from eval.statistics import clustered_interval, mean_with_interval, ratio_with_interval

MADE = 64  # tokens generated for a line
MEASURES = ("exact", "edit", "statement", "right_tokens", "repetition")


@dataclass(frozen=True)
class Split:
    """A place in a row behind a line's end."""

    row: int
    at: int


def line_splits(bench: Bench, windows: Rows, shape: Shape, each: int, rows: Sequence[int], made: int = MADE
                ) -> list[Split]:  # fmt: skip
    """At most `each` places a row, spread out, whose next line has a letter and fits into `made` tokens.

    A context starts so that exactly window, chunks and prefix stand before the split: all are equally long.
    """
    # a tokenizer may join a line's end with most of the next line's indentation
    ends = np.array([piece.rstrip(" \t").endswith("\n") for piece in bench.pieces])
    found = []
    for row in rows:
        ids = windows.ids[row]
        places = []
        for at in range(shape.split, min(shape.split + shape.target, len(ids)) - made + 1):
            if ends[ids[at - 1]] and "\n" not in bench.pieces[int(ids[at])]:
                line = bench.text(ids[at : at + made])
                if first_line(line) and "\n" in line.lstrip() and re.search(r"[A-Za-z]", first_line(line)):
                    places.append(at)
        chosen = {places[int(i)] for i in np.linspace(0, len(places) - 1, min(each, len(places)))} if places else ()
        found += [Split(row, at) for at in sorted(chosen)]
    return found


def next_lines(bench: Bench, shape: Shape, arms: Sequence[str], documents: int, each: int) -> dict[str, float]:
    """Greedy next lines in code that the host has not seen, by arm; clustered by package."""
    windows = bench.sets["young"]
    splits = line_splits(bench, windows, shape, each, bench.spread("young", documents), MADE)
    contexts = np.stack([windows.ids[s.row][s.at - shape.split : s.at] for s in splits])
    truths = [windows.ids[s.row][s.at : s.at + MADE].tolist() for s in splits]
    groups = [group(windows.records[s.row]) for s in splits]
    values: dict[str, dict[str, list[float]]] = {}
    metrics: dict[str, float] = {"nextline.lines": len(splits), "nextline.packages": len(set(groups))}
    with bench.samples("nextline") as keep, progress_of("nextline", len(splits) * len(arms)) as advance:
        for arm in arms:
            columns: dict[str, list[float]] = {name: [] for name in (*MEASURES, "known", "names")}
            for rows in batches(len(splits), bench.batch):
                made = bench.generate(arm, contexts[rows], MADE)
                for split, context, truth, ids in zip(splits[rows], contexts[rows], truths[rows], made, strict=True):
                    text, wanted = bench.text(ids), bench.text(truth)
                    line, right = first_line(text), first_line(wanted)
                    known, names = known_names(text, bench.text(context), wanted)
                    real = [int(i) for i in ids if i >= 0]
                    figures = (line == right, similarity(line, right), statement(text) == statement(wanted),
                               right_before_mistake(real, truth), repeated_trigrams(real), known, names)  # fmt: skip
                    for column, figure in zip(columns.values(), figures, strict=True):
                        column.append(float(figure))
                    keep(arm=arm, document=windows.records[split.row].name, at=split.at, line=line, wanted=right,
                         **dict(zip(columns, map(float, figures), strict=True)))  # fmt: skip
                advance(len(made))
            values[arm] = columns
            for name in MEASURES:
                metrics |= mean_with_interval(f"nextline.{arm}.{name}", columns[name], groups, bench.seed)
            metrics |= ratio_with_interval(
                f"nextline.{arm}.known_names", columns["known"], columns["names"], groups, bench.seed
            )
    return metrics | gains(values, groups, bench.seed)


def gains(values: dict[str, dict[str, list[float]]], groups: Sequence[str], seed: int) -> dict[str, float]:
    """Paired differences of exact lines and edit similarity to the window, and the share of full history's."""
    metrics: dict[str, float] = {}
    for measure, suffix in (("exact", ""), ("edit", ".edit")):
        exact = {arm: np.array(columns[measure]) for arm, columns in values.items()}
        if "window" not in exact:
            continue
        for arm in exact.keys() - {"window"}:
            key = f"nextline.{arm}_minus_window{suffix}"
            difference = exact[arm] - exact["window"]
            mean, low, high = clustered_interval(lambda rows, d=difference: float(d[rows].mean()), groups, seed=seed)
            metrics |= {key: mean, f"{key}.lo": low, f"{key}.hi": high}
            if arm != "full" and "full" in exact and (worth := float((exact["full"] - exact["window"]).mean())) > 0:
                metrics[f"nextline.{arm}.share_of_gain{suffix}"] = mean / worth
    return metrics
