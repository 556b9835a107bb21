"""The figure of speed: time and memory against the length of a prompt, from `eval/results/speed-gpu.json`."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from eval.results import size_name, size_of
from hf_crouter.errors import InputError

FIGURE = "speed.svg"
RESULT = "speed-gpu.json"
TITLE = "Time and memory against the length of a prompt"
WIDTH, HEIGHT, DPI = 9.2, 4.4, 100  # inches
PANELS = {  # figures of a way at a length, and of the axis
    "ttft_seconds": "first token, seconds",
    "peak_gib": "peak over the weights, GiB",
}


class Way(NamedTuple):
    """A series of the figure: its keys begin with `key`."""

    key: str
    label: str
    color: str
    marker: str


WAYS = (
    Way("full_", "full history, in pieces of 2,048", "#222222", "s"),
    Way("auto_", "Compact(32) and Retrieve(2), the default", "#e0559a", "X"),
    Way("compact_", "Compact(8)", "#c0261f", "o"),
    Way("compact_copy_", "Compact(8) and Copy", "#c47a00", "v"),
    Way("fast_", 'Retrieve(2), "fast"', "#1b6ca8", "o"),
    Way("fast_copy_", "Retrieve(2) and Copy", "#2e7d32", "^"),
)


def drawn(metrics: dict[str, float]) -> dict[str, list[list[float]]]:
    """Every point, by panel and way: tokens of the prompt and the figure; of one row at a time.

    Raises:
        InputError: nothing was measured at two lengths.
    """
    points: dict[str, list[list[float]]] = {}
    for key, value in metrics.items():
        found = re.fullmatch(r"[^.]+(?:\.\d+b)?\.(\d+k?)\.b1\.(.+_)(ttft_seconds|peak_gib)", key)
        if found and found[2] in {way.key for way in WAYS}:
            points.setdefault(f"{found[3]}.{found[2]}", []).append([float(size_of(found[1])), value])
    if max(map(len, points.values()), default=0) < 2:
        raise InputError(f"{RESULT}: expected first tokens at two lengths or more, got fewer")
    return {key: sorted(rows) for key, rows in sorted(points.items())}


def draw(points: dict[str, list[list[float]]], result: dict[str, Any]) -> Any:
    """The matplotlib figure: seconds on the left, memory on the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, facecolor="white")
    grid = figure.subplots(1, 2)
    lengths = sorted({row[0] for rows in points.values() for row in rows})
    for axes, (panel, label) in zip(grid, PANELS.items(), strict=True):
        for way in WAYS:
            rows = points.get(f"{panel}.{way.key}")
            if rows:
                axes.plot(*zip(*rows, strict=True), color=way.color, marker=way.marker, linewidth=1.3, markersize=5,
                          label=way.label)  # fmt: skip
        axes.set(xscale="log", yscale="log", facecolor="white")
        axes.set_xlabel("tokens of the prompt (log)", fontsize=9)
        axes.set_ylabel(f"{label} (log)", fontsize=9)
        axes.minorticks_off()
        axes.set_xticks(lengths, [size_name(int(length)) for length in lengths], fontsize=8)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=3, fontsize=8, frameon=False, bbox_to_anchor=(0.5, 0.06))
    host = result["notes"].partition(". ")[0].partition(", ")[0]
    figure.text(0.01, 0.015, f"{host}. Batch 1. {result['device']}, {result['date']}.", fontsize=7.5, color="#333333")
    figure.tight_layout(rect=(0, 0.17, 1, 1))
    return figure
