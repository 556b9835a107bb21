"""Borders between domains, as what tokens cost under each expert shows them, beside the true ones.

Axes: `P` pieces with a border, `n` experts, `T` tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from eval.routing.setting import Arrays, Setting
from hf_crouter.routing.spans import Span, find_spans

SWITCHES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)  # nats that a border costs, tried on calibration documents
SMOOTHS = (1, 8, 16, 32)


def nearest_border(spans: Sequence[Span], border: int, length: int) -> int:
    """Tokens from a true border to the nearest found one; the piece's length where none was found."""
    return min((abs(span.start - border) for span in spans[1:]), default=length)


def tuned(costs: np.ndarray, borders: Sequence[np.ndarray] | np.ndarray) -> tuple[float, int]:
    """The switch and smoothing with the least mean error on calibration pieces; costs `[P, n, T]`, borders of each.

    The mean, with missed and superfluous borders: the median alone would take many borders for free.
    """
    length, best = costs.shape[-1], (np.inf, SWITCHES[0], SMOOTHS[0])
    for smooth in SMOOTHS:
        for switch in SWITCHES:
            errors = []
            for row, true in zip(costs, borders, strict=True):
                spans = find_spans(torch.from_numpy(row), switch=switch, smooth=min(smooth, length // 8 or 1))
                mean = np.mean([nearest_border(spans, int(border), length) for border in true])
                errors.append(mean + length // 8 * max(0, len(spans) - 1 - len(true)))
            if np.mean(errors) < best[0]:
                best = (float(np.mean(errors)), switch, smooth)
    return best[1], best[2]


def measure_borders(setting: Setting, costs: Mapping[str, np.ndarray]) -> Arrays:
    """Errors of borders in spliced and in real mixed pieces.

    Args:
        setting: the texts.
        costs: `[P, n, T]`, what each token of the pieces of `Setting.bordered` costs under each expert.
    """
    switch, smooth = tuned(costs["fit"], setting.fit().borders[:, None])
    smooth = min(smooth, setting.chunk // 8 or 1)
    known, test = setting.known, setting.spliced()
    errors, counts, right = [], [], []
    for row, border, first, second in zip(costs["spliced"], test.borders, test.first, test.second, strict=True):
        spans = find_spans(torch.from_numpy(row), switch=switch, smooth=smooth)
        errors.append(nearest_border(spans, int(border), setting.chunk))
        counts.append(len(spans) - 1)
        names = [setting.windows.records[known[i]].domain for i in (first, second)]
        numbers = [setting.domains.index(name) for name in names]
        labels = np.repeat([span.number for span in spans], [len(span) for span in spans])
        truth = np.where(np.arange(setting.chunk) < border, numbers[0], numbers[1])
        right.append(float((labels == truth).mean()))
    found = {
        "switch": np.array([switch]), "smooth": np.array([smooth]), "spliced.error": np.array(errors),
        "spliced.found": np.array(counts), "spliced.tokens": np.array(right),
        "spliced.first": known[test.first], "spliced.second": known[test.second],
    }  # fmt: skip
    both = {"mixed": (switch, smooth)}
    fitting = setting.mixed_fit
    if fitting is not None:
        true = [fitting.borders(piece) for piece in range(len(fitting.ids))]
        own, least = tuned(costs["mixed_fit"], true)
        both["mixed_own"] = (own, min(least, setting.chunk // 8 or 1))
    for name, (switch, smooth) in both.items():
        errors, pieces, counts = [], [], []
        for piece, row in enumerate(costs["mixed"]):
            spans = find_spans(torch.from_numpy(row), switch=switch, smooth=smooth)
            true = setting.mixed.borders(piece)
            errors += [nearest_border(spans, int(border), setting.chunk) for border in true]
            pieces += [piece] * len(true)
            counts.append((len(spans) - 1, len(true)))
        found |= {f"{name}.error": np.array(errors), f"{name}.piece": np.array(pieces)}
        found |= {f"{name}.found": np.array(counts), f"{name}.setting": np.array([switch, smooth], np.float64)}
    return found
