"""The figures, made from `eval/results`: `python -m eval.plots [--check]`. This one, of quality, and that of speed.

Needs matplotlib.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from eval import speed_plot
from eval.drawing import drawing, save
from eval.results import FOLDER
from hf_crouter.errors import InputError

FIGURE = "hgr.svg"
RESULT = "hgr-qwen1.5b.json"
PANELS = {"young.n8": "one file, 4,096 older tokens", "repo.n40": "a repository, 20,480 older tokens"}
FIGURES = {"hgr": "history gain recovered", "lines": "whole lines right"}
WINDOW, FULL = "window", "full"  # arms that every result has: the slots that both hold are of no older token
WIDTH, HEIGHT, DPI = 9.2, 7.4, 100  # inches


class Way(NamedTuple):
    """A series of the figure.

    Attributes:
        label: its name.
        arms: keys of the result, from few slots to many; such as were not measured are left out.
        color: of line and points.
        marker: of the points.
        line: style of the line that joins them; empty: none does.
    """

    label: str
    arms: tuple[str, ...]
    color: str
    marker: str
    line: str = "-"


WAYS = (
    Way("Compact", ("compact8", "compact32", "compact60", "compact64", "compact128"), "#c0261f", "o"),
    Way("Compact and Retrieve(2)", ("compact8_retrieve2", "compact32_retrieve2", "compact64_retrieve2",
                                    "compact128_retrieve2"), "#e0559a", "X", ""),
    Way("Retrieve", ("retrieve2", "retrieve4", "retrieve8"), "#1b6ca8", "o"),
    Way("Copy, a gate fitted to the host", ("copy_fitted",), "#c47a00", "v", ""),
    Way("Copy", ("copy",), "#e6b84c", "v", ""),
    Way("a raw window, longer by as much", (WINDOW, "longer_same_slots", "longer_same_slots_at32",
                                            "longer_same_slots_at128", "longer_same_slots_retrieve2",
                                            "longer_same_slots_retrieve4"), "#777777", "s"),
    Way("KVzip", ("kvzip.at8", "kvzip.at32", "kvzip.at128"), "#2e7d32", "^"),
    Way("SnapKV", ("snapkv.at8", "snapkv.at32", "snapkv.at128"), "#6a3d9a", "D"),
    Way("full history", (FULL,), "#222222", "", "--"),
)  # fmt: skip
LOWEST = -0.3  # HGR below which a point stands at the edge with its value beside it
NOTHING = 0.5  # where no slots stand on the axis, as a share of the first tick
ASIDE = 1.03  # factor from way to way by which points stand aside, so that bars at equal slots can be told apart


def drawn(metrics: dict[str, float]) -> dict[str, list[list[float]]]:
    """Every point: slots for older tokens, then HGR and share of lines with the ends of their intervals.

    Returns:
        By panel and way; ways of which nothing was measured are left out, the same arm at the same slots stands once.

    Raises:
        InputError: window or full history were not measured.
    """
    points = {}
    for panel in PANELS:
        for arm in (WINDOW, FULL):
            if f"{panel}.{arm}.hgr" not in metrics:
                raise InputError(f"{RESULT}: expected {panel}.{arm}.hgr, got nothing")
        base = metrics[f"{panel}.{WINDOW}.slots"]
        for way in WAYS:
            rows = []
            for arm in way.arms:
                key = f"{panel}.{arm}"
                if f"{key}.hgr" in metrics:
                    ends = [f"{key}.{figure}{end}" for figure in FIGURES for end in ("", ".lo", ".hi")]
                    rows.append([metrics[f"{key}.slots"] - base, *(metrics[end] for end in ends)])
            if rows:
                points[f"{panel}.{way.label}"] = sorted(row for n, row in enumerate(rows) if row not in rows[:n])
    return points


def digest(points: dict[str, list[list[float]]], result: str = RESULT) -> str:
    """What a figure says about the result that it was made from."""
    return f"{result} " + hashlib.sha256(json.dumps(points).encode()).hexdigest()[:16]


def draw(points: dict[str, list[list[float]]], result: dict[str, Any]) -> Any:
    """The matplotlib figure: HGR above, whole lines below, one file on the left, a repository on the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, facecolor="white")
    grid = figure.subplots(2, 2, sharex="col")
    for column, (panel, title) in enumerate(PANELS.items()):
        series = [(way, points[key]) for way in WAYS if (key := f"{panel}.{way.label}") in points]
        ticks = _ticks([row[0] for way, rows in series for row in rows if way.arms != (FULL,)])
        for row, (name, label) in enumerate(FIGURES.items()):
            axes = grid[row][column]
            for way, rows in series:
                _draw_way(axes, way, rows, name, ticks[0] * NOTHING)
            _finish(axes, name, ticks)
            if name == "hgr":
                axes.set_title(title, fontsize=10)
            else:
                axes.set_xlabel("KV slots for older tokens (log)", fontsize=9)
            if column == 0:
                axes.set_ylabel(label, fontsize=9)
    named = {name: handle for handle, name in zip(*_legend(grid), strict=True)}
    shown = [way.label for way in WAYS if way.label in named]
    figure.legend([named[name] for name in shown], shown, loc="lower center", ncol=3, fontsize=8, frameon=False,
                  bbox_to_anchor=(0.5, 0.075))  # fmt: skip
    pressed = " and ".join(", ".join(name for name in ("Compact", "KVzip", "SnapKV") if name in shown).rsplit(", ", 1))
    documents = [result["metrics"][f"{panel}.documents"] for panel in PANELS]
    figure.text(
        0.01, 0.01,
        f"Host: Qwen2.5-Coder-1.5B-Instruct. Code younger than the host, {documents[0]:.0f} files and "
        f"{documents[1]:.0f} places in repositories. Slots beside the raw window of 512 tokens:\n8 to 128 pairs of "
        f"every 512 tokens by {pressed}; 2, 4 or 8 chunks of 512 raw by Retrieve. HGR: 0% as good as that window\n"
        "alone, 100% as good as full history. Bars: 95% intervals, clustered by package; points at equal slots stand "
        f"side by side. {result['device']}, {result['date']}.",
        fontsize=7.5, color="#333333",
    )  # fmt: skip
    figure.tight_layout(rect=(0, 0.155, 1, 1))
    return figure


def _legend(grid: Any) -> tuple[list[Any], list[str]]:
    """Handles and labels of all axes."""
    found = [axes.get_legend_handles_labels() for axes in grid.flat]
    return [handle for handles, _ in found for handle in handles], [label for _, labels in found for label in labels]


def _ticks(slots: list[float]) -> list[float]:
    """Powers of two, as the axis names them, from the fewest slots that some way has to the most."""
    some = [value for value in slots if value > 0] or [1.0]
    first, last = math.floor(math.log2(min(some)) + 0.01), math.ceil(math.log2(max(some)) - 0.01)
    return [2.0**power for power in range(first, last + 1)]


def _draw_way(axes: Any, way: Way, rows: list[list[float]], name: str, nothing: float) -> None:
    """Points of one way with their intervals, joined where it has a line; no slots stand at `nothing`."""
    at = 1 + 3 * list(FIGURES).index(name)
    if way.arms == (FULL,):
        axes.axhline(rows[0][at], color=way.color, linestyle=way.line, linewidth=1, label=way.label)
        return
    aside = ASIDE ** (WAYS.index(way) - (len(WAYS) - 2) / 2)
    for some, line in (([row for row in rows if row[0] <= 0], ""), ([row for row in rows if row[0] > 0], way.line)):
        if not some:
            continue
        slots = [(row[0] if row[0] > 0 else nothing) * aside for row in some]
        values = [max(row[at], LOWEST) if name == "hgr" else row[at] for row in some]
        bars = [[max(value - row[at + 1], 0), max(row[at + 2] - value, 0)] if value == row[at] else [0, 0]
                for value, row in zip(values, some, strict=True)]  # fmt: skip
        label = way.label if some[-1] is rows[-1] else "_"  # once
        axes.errorbar(slots, values, yerr=list(zip(*bars, strict=True)), color=way.color, marker=way.marker,
                      linestyle=line or "none", linewidth=1.3, markersize=5, elinewidth=0.8, capsize=2,
                      label=label)  # fmt: skip
        for slot, value, row in zip(slots, values, some, strict=True):
            if value != row[at]:
                text = f"{100 * row[at]:.0f}%".replace("-", "−")
                axes.annotate(text, (slot, value), (7, 2), textcoords="offset points", fontsize=8, color=way.color)


def _finish(axes: Any, name: str, ticks: list[float]) -> None:
    """Axes, and the gap between no slots and the fewest."""
    from matplotlib.ticker import MultipleLocator

    nothing = ticks[0] * NOTHING
    axes.set(xscale="log", facecolor="white", xlim=(nothing / 1.4, ticks[-1] * 1.2))
    axes.minorticks_off()
    axes.set_xticks([nothing, *ticks], ["0", *(f"{tick:,.0f}" for tick in ticks)], fontsize=8)
    axes.axvline(nothing * (ticks[0] / nothing) ** 0.5, color="#bbbbbb", linewidth=0.8, linestyle=":")
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.yaxis.set_major_locator(MultipleLocator(0.2 if name == "hgr" else 0.05))
    axes.tick_params(labelsize=8)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}%".replace("-", "−"))
    if name == "hgr":
        axes.set_ylim(LOWEST - 0.06, 1.06)


class Picture(NamedTuple):
    """One figure.

    Attributes:
        file: its name.
        result: of the result's.
        title: of the picture.
        drawn: every point of a result's metrics.
        draw: the figure of points and a result.
        needed: it is an error where the result is missing.
    """

    file: str
    result: str
    title: str
    drawn: Callable[[dict[str, float]], dict[str, list[list[float]]]]
    draw: Callable[[dict[str, list[list[float]]], dict[str, Any]], Any]
    needed: bool = True


PICTURES = (
    Picture(FIGURE, RESULT, "Quality against KV slots", drawn, draw),
    Picture(speed_plot.FIGURE, speed_plot.RESULT, speed_plot.TITLE, speed_plot.drawn, speed_plot.draw, needed=False),
)


def write(folder: Path, picture: Picture, png: Path | None = None) -> Path | None:
    """Makes a figure anew, the same bytes from the same result; `png` is a folder that takes another copy to look at.

    Raises:
        InputError: no result, or no matplotlib.
    """
    result = _result(folder, picture)
    if result is None:
        return None
    points = picture.drawn(result["metrics"])
    name = picture.file.partition(".")[0]
    with drawing(name):
        figure = picture.draw(points, result)
        save(figure, folder / picture.file, Title=picture.title, Description=digest(points, picture.result))
        if png is not None:
            png.mkdir(parents=True, exist_ok=True)
            figure.savefig(png / f"{name}.png", format="png", dpi=2 * DPI)
    return folder / picture.file


def stale(folder: Path, picture: Picture) -> bool:
    """Whether a figure is missing or shows another result."""
    path, result = folder / picture.file, _result(folder, picture)
    if result is None:
        return path.is_file()
    shown = digest(picture.drawn(result["metrics"]), picture.result)
    return not path.is_file() or shown not in path.read_text(encoding="utf-8")


def _result(folder: Path, picture: Picture) -> dict[str, Any] | None:
    path = folder / picture.result
    if not picture.needed and not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: expected a result of eval.run, got {error!r}") from error


def main(argv: list[str] | None = None) -> int:
    """Writes the figures; with `--check` only says which are stale, by status 1. Bad input: 2."""
    parser = argparse.ArgumentParser(prog="python -m eval.plots", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; status 1 where a figure is stale")
    parser.add_argument("--png", type=Path, metavar="FOLDER", help="also as PNG, to look at")
    parser.add_argument("--results", type=Path, default=FOLDER, help="folder of the results")
    arguments = parser.parse_args(argv)
    status = 0
    try:
        for picture in PICTURES:
            if arguments.check:
                if stale(arguments.results, picture):
                    print(f"{picture.file} is stale; run python -m eval.plots", file=sys.stderr)
                    status = 1
            elif (path := write(arguments.results, picture, arguments.png)) is not None:
                print(path.name)
    except (InputError, OSError) as error:
        print(f"eval.plots: error: {error}", file=sys.stderr)
        return 2
    return status


if __name__ == "__main__":
    raise SystemExit(main())
