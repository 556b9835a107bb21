"""Figures of what else could route."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from eval.routing.report.figures import Figures
from hf_crouter.routing.profile import USUAL, distances_across, gaussian, squared_distance

BASELINES = ("ngram", "tfidf", "perplexity", "probe", "arrow")


def pattern_distance(scores: np.ndarray, own: np.ndarray, numbers: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """Least distance of scores `[N, n]` from the pattern of a domain's own, `[N]`: our rule, for a baseline.

    Args:
        scores: of the pieces to judge.
        own: of calibration pieces, `[C, n]`.
        numbers: their domains, `[C]`.
        documents: theirs, `[C]`.
    """
    found = []
    for number in np.unique(numbers):
        rows = numbers == number
        points = own[rows].astype(np.float64)
        across = distances_across(points, documents[rows])
        usual = np.quantile(squared_distance(points, *gaussian(points)) if across is None else across, USUAL)
        found.append(squared_distance(scores.astype(np.float64), *gaussian(points)) / usual)
    return np.min(found, axis=0)


def baseline_figures(figures: Figures, name: str, part: Mapping[str, np.ndarray], prefix: str) -> None:
    """Accuracy, rejection, milliseconds and bytes of a baseline; its scores stand under `prefix`."""
    for what, key in (("chunk", f"baseline.{name}"), ("span", f"baseline.{name}.span128")):
        scores, median = part[f"{prefix}{what}"], part[f"{prefix}{what}.median"]
        figures.accuracy(f"{key}.accuracy", scores.argmin(1))
        figures.accuracy(f"{key}.calibrated.accuracy", (scores - median).argmin(1), interval=False)
        figures.rejection(f"{key}.unseen", (scores - part[f"{prefix}{what}.limit"]).min(1))
        figures.rejection(f"{key}.calibrated.unseen", (scores - median).min(1), interval=False)
        figures.rejection(f"{key}.raw.unseen", scores.min(1), interval=False)
        if f"{prefix}{what}.own" in part:
            own, numbers, documents = (part[f"{prefix}{what}.own{end}"] for end in ("", ".domain", ".document"))
            figures.rejection(f"{key}.pattern.unseen", pattern_distance(scores, own, numbers, documents))
        if f"{prefix}{what}.ms" in part:
            figures.found[f"{key}.ms"] = float(part[f"{prefix}{what}.ms"][0])
    if f"{prefix}bytes" in part:
        figures.found[f"baseline.{name}.bytes"] = float(part[f"{prefix}bytes"][0])
