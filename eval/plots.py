"""The README's figure, made from `eval/results/hgr-smollm2-135m.json`: `python -m eval.plots [--check]`.

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
RESULT = "hgr-smollm2-135m.json"
SET = "young"
CHUNKS = (2, 4, 8)
WIDTH, HEIGHT, DPI = 9.2, 5.2, 100  # inches


class Way(NamedTuple):
    """A line of the figure.

    Attributes:
        arm: key of the result.
        label: its name.
        color: of line, points and label.
        right: in the right panel.
        at: where the label stands, (slots, HGR).
        align: side of the label that stands there.
        numbers: offset of each point's chunk count, in points; None leaves them out.
    """

    arm: str
    label: str
    color: str
    right: bool
    at: tuple[float, float]
    align: str = "left"
    numbers: tuple[float, float] | None = (0, 7)


WAYS = (
    Way("soft_copy", "soft prompts + copying", "#1b6ca8", False, (592, 0.815), numbers=(0, 10)),
    Way(
        "longer_same_slots_copy_fitted",
        "as many more raw tokens\n+ copying",
        "#777777",
        False,
        (592, 0.725),
        numbers=(7, -7),
    ),
    Way("copy", "copying\n(no slots)", "#c44e00", False, (511, 0.69), "right", (6, -3)),
    Way("copy_rebuilt", "copying, from\nrebuilt latents", "#8a5a00", False, (511, 0.565), "right", (6, -3)),
    Way("soft", "soft prompts", "#1b6ca8", False, (592, 0.11), numbers=(0, 6)),
    Way("longer_same_slots", "as many more raw tokens", "#777777", False, (592, 0.045), numbers=(0, -12)),
    Way("snapkv_window.at8", "SnapKV, window kept", "#6a3d9a", False, (592, -0.045), numbers=None),
    Way("streaming.at8", "StreamingLLM", "#2e7d32", False, (592, -0.12), numbers=None),
    Way("expected_attention.at8", "ExpectedAttention", "#a0522d", False, (592, -0.24), numbers=None),
    Way("full_copy", "full history + copying", "#333333", True, (3600, 1.105), "right", (8, -9)),
    Way("full", "full history", "#333333", True, (3900, 1.022), "right", (-7, 5)),
    Way(
        "soft_retrieve2_bm25_copy",
        "soft prompts + copying + retrieval of 2",
        "#1b6ca8",
        True,
        (1690, 0.967),
        numbers=(7, -3),
    ),
    Way("retrieve2_bm25_copy", "copying + retrieval of 2", "#c44e00", True, (1452, 0.85), numbers=(-9, -3)),
    Way(
        "longer_same_slots_retrieve2_copy_fitted",
        "a window longer by as much, + copying",
        "#777777",
        True,
        (1690, 0.912),
        numbers=(7, -5),
    ),
    Way("longer_same_slots_retrieve2", "a window longer by as much", "#777777", True, (1690, 0.588), numbers=(7, -5)),
    Way("streaming.at8_retrieve2", "StreamingLLM", "#2e7d32", True, (1690, 0.528), numbers=None),
    Way("snapkv_window.at8_retrieve2", "SnapKV, window kept", "#6a3d9a", True, (1690, 0.474), numbers=None),
    Way("expected_attention.at8_retrieve2", "ExpectedAttention", "#a0522d", True, (1690, 0.399), numbers=None),
)


def drawn(metrics: dict[str, float]) -> dict[str, list[list[float]]]:
    """Every point by arm: chunks, slots, HGR, ends of its interval.

    Raises:
        InputError: an arm without a point.
    """
    points = {}
    for way in WAYS:
        keys = {n: f"{SET}.n{n}.{way.arm}" for n in CHUNKS}
        names = (".slots", ".hgr", ".hgr.lo", ".hgr.hi")
        found = [[n, *(metrics[key + name] for name in names)] for n, key in keys.items() if f"{key}.hgr" in metrics]
        if not found:
            raise InputError(f"{RESULT}: expected {SET}.n8.{way.arm}.hgr, got nothing")
        points[way.arm] = found
    return points


def digest(points: dict[str, list[list[float]]]) -> str:
    """What the figure says about the result that it was made from."""
    return f"{RESULT} " + hashlib.sha256(json.dumps(points).encode()).hexdigest()[:16]


def draw(points: dict[str, list[list[float]]], result: dict[str, Any]) -> Any:
    """The matplotlib figure: few slots on the left, many on the right, each with its own scale of HGR."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, facecolor="white")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.05))
    for way in WAYS:
        axes, rows = (right if way.right else left), points[way.arm]
        slots, gain = [row[1] for row in rows], [row[2] for row in rows]
        bars = [[row[2] - row[3] for row in rows], [row[4] - row[2] for row in rows]]
        axes.errorbar(slots, gain, yerr=bars, color=way.color, marker="o", markersize=4.5, linewidth=1.3, elinewidth=1,
                      capsize=2)  # fmt: skip
        axes.text(*way.at, way.label, color=way.color, ha=way.align, va="center", fontsize=9)
        for n, x, y in ((row[0], row[1], row[2]) for row in rows):
            if way.numbers is not None:
                axes.annotate(f"{n:.0f}", (x, y), way.numbers, textcoords="offset points", ha="center", fontsize=7,
                              color=way.color)  # fmt: skip
    left.plot([516], [0], "o", color="black", markersize=4.5)
    left.text(511, 0.0, "raw window", ha="right", va="center", fontsize=9)
    for axes, ticks, limits in ((left, (516, 548, 580), (452, 735)), (right, (1540, 2564, 4612), (1420, 5100))):
        axes.set(xscale="log", xlim=limits, xlabel="KV slots (log)", facecolor="white")
        axes.minorticks_off()
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=8)
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    left.set(ylim=(-0.36, 1.04), ylabel="history gain recovered (HGR)")
    left.set_title("few slots", fontsize=10)
    right.set_ylim(0.36, 1.14)
    right.set_title("many slots (another scale of HGR)", fontsize=10)
    knorm = [result["metrics"][f"{SET}.n{CHUNKS[-1]}.{arm}.hgr"] for arm in ("knorm.at8", "knorm.at8_retrieve2")]
    documents = result["metrics"][f"{SET}.n{CHUNKS[-1]}.documents"]
    figure.text(
        0.01, 0.012,
        f"Host: SmolLM2-135M-Instruct. {documents:.0f} files of code younger than the host. HGR: 0 as good as "
        "forgetting, 1 as good as keeping everything.\nSmall digits: chunks of 512 tokens behind the raw window. "
        "Bars: 95% intervals, clustered by package. Retrieval by BM25.\nStreamingLLM, SnapKV and ExpectedAttention "
        f"are kvpress' with 8 chunks; its Knorm lies below, at {knorm[0]:.1f} and {knorm[1]:.1f}. "
        f"{result['device']}, {result['date']}.",
        fontsize=7.5, color="#333333",
    )  # fmt: skip
    figure.tight_layout(rect=(0, 0.09, 1, 1))
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
