"""Collects figures of routing with their intervals.

Accuracies are means of the domains' means. Rejection is by one number a piece, the lower the better known. Intervals
are bootstraps clustered by document.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from eval.routing.windows import FAR, NEAR, TestWindows
from eval.statistics import auroc, clustered_interval

UNSEEN = {"near": NEAR, "far": FAR}
DRAWS = 400
Metrics = dict[str, float]


def rejection_auroc(known: np.ndarray, unknown: np.ndarray) -> float:
    """Probability that an unknown piece has the higher number than a known one; ties count half."""
    return auroc(np.concatenate([known, unknown]), np.repeat([0, 1], [len(known), len(unknown)]))


def false_accepts(known: np.ndarray, unknown: np.ndarray, accepted: float = 0.95) -> float:
    """Share of unknown pieces under the number that this share of known ones stays under."""
    return float((unknown <= np.quantile(known, accepted)).mean())


def macro(values: np.ndarray, domains: np.ndarray) -> float:
    """Mean of the domains' means."""
    return float(np.mean([values[domains == name].mean() for name in np.unique(domains)]))


class Figures:
    """Collects metrics with their intervals.

    Args:
        windows: the test windows.
        names: known domains in the experts' order.
        seed: of the draws.
        draws: bootstrap samples.
    """

    def __init__(self, windows: TestWindows, names: Sequence[str], seed: int, draws: int = DRAWS):
        self.names, self.seed, self.draws = tuple(names), seed, draws
        self.found: Metrics = {}
        self._domains, self._documents = windows.domains, np.array(windows.documents)

    def domains(self, each: int) -> np.ndarray:
        """Domain of every piece where a window has `each`."""
        return np.repeat(self._domains, each)

    def truth(self, each: int) -> np.ndarray:
        """Number of every piece's domain; -1: unknown."""
        numbers = {name: i for i, name in enumerate(self.names)}
        return np.array([numbers.get(name, -1) for name in self.domains(each)])

    def documents(self, each: int) -> np.ndarray:
        """Cluster of every piece."""
        return np.repeat(self._documents, each)

    def add(self, key: str, statistic: Callable[[np.ndarray], float], groups: Sequence[str] | np.ndarray) -> None:
        """A figure with its 95% interval."""
        value, low, high = clustered_interval(statistic, list(groups), seed=self.seed, draws=self.draws)
        self.found |= {key: value, f"{key}.lo": low, f"{key}.hi": high}

    def accuracy(self, key: str, choices: np.ndarray, interval: bool = True) -> None:
        """Of choices over all pieces; unknown domains are left out."""
        each = len(choices) // len(self._domains)
        rows = self.truth(each) >= 0
        right, domains = (choices == self.truth(each))[rows], self.domains(each)[rows]
        if interval:
            self.add(key, lambda index: macro(right[index], domains[index]), self.documents(each)[rows])
        else:
            self.found[key] = macro(right, domains)

    def rejection(self, key: str, numbers: np.ndarray, interval: bool = True) -> None:
        """AUROC and false accepts near and far, of one number a piece."""
        each = len(numbers) // len(self._domains)
        domains, documents, known = self.domains(each), self.documents(each), self.truth(each) >= 0
        for name, members in UNSEEN.items():
            rows = known | np.isin(domains, members)
            if known.all() or rows.sum() == known.sum():
                continue
            values, own = numbers[rows], known[rows]
            for suffix, function in (("auroc", rejection_auroc), ("false_accepts", false_accepts)):

                def statistic(index: np.ndarray, function: Any = function, v: Any = values, o: Any = own) -> float:
                    some, kept = v[index], o[index]
                    return function(some[kept], some[~kept]) if kept.any() and not kept.all() else float("nan")

                if interval:
                    self.add(f"{key}.{name}.{suffix}", statistic, documents[rows])
                else:
                    self.found[f"{key}.{name}.{suffix}"] = statistic(np.arange(len(values)))
