"""The confusion matrix as a picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from eval.drawing import drawing, save
from eval.routing.report.figures import Metrics
from hf_crouter.errors import InputError


def draw_confusion(found: Metrics, path: Path) -> Path:
    """Writes the confusion matrix as a picture (SVG or PNG by suffix), the same bytes from the same figures.

    Args:
        found: metrics of `routing.json`, with keys `confusion.DOMAIN.EXPERT`.
        path: where to.

    Raises:
        InputError: no such figures, or no matplotlib.
    """
    cells = [key.split(".")[1:] for key in found if key.startswith("confusion.")]
    if not cells:
        raise InputError("confusion matrix: expected figures confusion.DOMAIN.EXPERT, got none")
    rows, columns = (list(dict.fromkeys(cell[i] for cell in cells)) for i in (0, 1))
    shares = np.array([[found.get(f"confusion.{row}.{column}", 0.0) for column in columns] for row in rows])
    with drawing("routing"):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7.2, 6.4), dpi=100)
        axes = figure.add_subplot()
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for y, row in enumerate(shares):
            for x, share in enumerate(row):
                if share >= 0.005:
                    axes.text(x, y, f"{100 * share:.0f}", ha="center", va="center", fontsize=8,
                              color="white" if share > 0.5 else "#333333")  # fmt: skip
        axes.set_xticks(range(len(columns)), columns, rotation=40, ha="right", fontsize=8)
        axes.set_yticks(range(len(rows)), rows, fontsize=8)
        known = sum(row in columns for row in rows)
        axes.axhline(known - 0.5, color="#333333", linewidth=1)
        axes.set(xlabel="expert that serves", ylabel="domain of the chunk (unknown ones below the line)")
        axes.set_title("Routes of held-out chunks of 512 tokens, per cent of each domain", fontsize=10)
        figure.tight_layout()
        save(figure, path)
    return path
