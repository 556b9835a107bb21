"""The README's figure, made from `eval/results/hgr-qwen1.5b.json`: `python -m eval.plots [--check]`.

Needs matplotlib.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

from eval.drawing import drawing, save
from eval.results import FOLDER
from hf_crouter.errors import InputError

FIGURE = "hgr.svg"
RESULT = "hgr-qwen1.5b.json"
PANELS = {"young.n8": "one file, 4,096 older tokens", "repo.n40": "a repository, 20,480 older tokens"}
FIGURES = {"hgr": "history gain recovered", "lines": "whole lines right"}
WIDTH, HEIGHT, DPI = 9.2, 7.0, 100  # inches


class Way(NamedTuple):
    """A series of the figure.

    Attributes:
        label: its name.
        arms: keys of the result, from few slots to many.
        color: of line and points.
        marker: of the points.
    """

    label: str
    arms: tuple[str, ...]
    color: str
    marker: str


WAYS = (
    Way("retrieval of 2, 4 and 8", ("retrieve2", "retrieve4", "retrieve8"), "#1b6ca8", "o"),
    Way("copying, a gate fitted to the host", ("copy_fitted",), "#c44e00", "v"),
    Way("copying, the generic gate", ("copy",), "#e0a030", "v"),
    Way("soft prompts, fitted to the host", ("soft",), "#8a5a00", "P"),
    Way("a longer raw window", ("window", "longer_same_slots", "longer_same_slots_retrieve2",
                                "longer_same_slots_retrieve4"), "#777777", "s"),
    Way("KVzip, 8 and 128 a chunk", ("kvzip.at8", "kvzip.at128"), "#2e7d32", "^"),
    Way("SnapKV, 8 and 128 a chunk", ("snapkv.at8", "snapkv.at128"), "#6a3d9a", "D"),
    Way("full history", ("full",), "#222222", "*"),
)  # fmt: skip
LOWEST = -0.3  # HGR below which a point stands at the edge with its value beside it


def drawn(metrics: dict[str, float]) -> dict[str, list[list[float]]]:
    """Every point: slots, then HGR and share of lines with the ends of their intervals, by panel and arm.

    Raises:
        InputError: an arm that was not measured.
    """
    points = {}
    for panel in PANELS:
        for way in WAYS:
            rows = []
            for arm in way.arms:
                key = f"{panel}.{arm}"
                if f"{key}.hgr" in metrics:
                    ends = [f"{key}.{figure}{end}" for figure in FIGURES for end in ("", ".lo", ".hi")]
                    rows.append([metrics[f"{key}.slots"], *(metrics[end] for end in ends)])
                elif arm != "retrieve8":  # of one file that is everything
                    raise InputError(f"{RESULT}: expected {key}.hgr, got nothing")
            points[f"{panel}.{way.label}"] = rows
    return points


def digest(points: dict[str, list[list[float]]]) -> str:
    """What the figure says about the result that it was made from."""
    return f"{RESULT} " + hashlib.sha256(json.dumps(points).encode()).hexdigest()[:16]


def draw(points: dict[str, list[list[float]]], result: dict[str, Any]) -> Any:
    """The matplotlib figure: HGR above, exact lines below, one file on the left, a repository on the right."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MultipleLocator

    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, facecolor="white")
    grid = figure.subplots(2, 2, sharex="col")
    for column, (panel, title) in enumerate(PANELS.items()):
        for row, (name, label) in enumerate(FIGURES.items()):
            axes, at = grid[row][column], 1 + 3 * row
            for way in WAYS:
                rows = points[f"{panel}.{way.label}"]
                slots = [point[0] for point in rows]
                values = [max(point[at], LOWEST) if name == "hgr" else point[at] for point in rows]
                bars = [[max(value - point[at + 1], 0) if value == point[at] else 0
                         for value, point in zip(values, rows, strict=True)],
                        [max(point[at + 2] - value, 0) if value == point[at] else 0
                         for value, point in zip(values, rows, strict=True)]]  # fmt: skip
                axes.errorbar(slots, values, yerr=bars, color=way.color, marker=way.marker, linewidth=1.2,
                              markersize=9 if way.marker == "*" else 5, elinewidth=0.8, capsize=2,
                              label=way.label)  # fmt: skip
                for slot, value, point in zip(slots, values, rows, strict=True):
                    if value != point[at]:
                        text = f"{100 * point[at]:.0f}%".replace("-", "−")
                        axes.annotate(text, (slot, value), (7, 2), textcoords="offset points", fontsize=8,
                                      color=way.color)  # fmt: skip
            axes.set(xscale="log", facecolor="white")
            axes.minorticks_off()
            ticks = (516, 1540, 2564, 4612) if panel.startswith("young") else (516, 1540, 5636, 20996)
            axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=8)
            axes.grid(axis="y", color="#dddddd", linewidth=0.6)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
            axes.yaxis.set_major_locator(MultipleLocator(0.2 if name == "hgr" else 0.05))
            axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}%")
            if name == "hgr":
                axes.set_title(title, fontsize=10)
                axes.set_ylim(LOWEST - 0.06, 1.06)
            else:
                axes.set_xlabel("KV slots (log)", fontsize=9)
            if column == 0:
                axes.set_ylabel(label, fontsize=9)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=4, fontsize=8, frameon=False, bbox_to_anchor=(0.5, 0.055))
    documents = [result["metrics"][f"{panel}.documents"] for panel in PANELS]
    figure.text(
        0.01, 0.01,
        f"Host: Qwen2.5-Coder-1.5B-Instruct. Code younger than the host, {documents[0]:.0f} files and "
        f"{documents[1]:.0f} places in repositories. HGR: 0% as good as the raw window\nof 512 tokens alone, 100% as "
        f"good as full history. Bars: 95% intervals, clustered by package. {result['device']}, {result['date']}.",
        fontsize=7.5, color="#333333",
    )  # fmt: skip
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    return figure


def write(folder: Path, png: Path | None = None) -> Path:
    """Makes the figure anew, the same bytes from the same result; `png` takes another copy, to look at.

    Raises:
        InputError: no result, or no matplotlib.
    """
    result = _result(folder)
    points = drawn(result["metrics"])
    with drawing("hgr"):
        figure = draw(points, result)
        save(figure, folder / FIGURE, Title="Quality against KV slots", Description=digest(points))
        if png is not None:
            figure.savefig(png, format="png", dpi=2 * DPI)
    return folder / FIGURE


def stale(folder: Path) -> bool:
    """Whether the figure is missing or shows another result."""
    path = folder / FIGURE
    return not path.is_file() or digest(drawn(_result(folder)["metrics"])) not in path.read_text(encoding="utf-8")


def _result(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / RESULT}: expected a result of eval.run, got {error!r}") from error


def main(argv: list[str] | None = None) -> int:
    """Writes the figure; with `--check` only says whether it is stale, by status 1. Bad input: 2."""
    parser = argparse.ArgumentParser(prog="python -m eval.plots", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; status 1 where the figure is stale")
    parser.add_argument("--png", type=Path, help="also as PNG, to look at")
    parser.add_argument("--results", type=Path, default=FOLDER, help="folder of the results")
    arguments = parser.parse_args(argv)
    try:
        if arguments.check:
            if old := stale(arguments.results):
                print(f"{FIGURE} is stale; run python -m eval.plots", file=sys.stderr)
            return int(old)
        print(write(arguments.results, arguments.png).name)
    except (InputError, OSError) as error:
        print(f"eval.plots: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
