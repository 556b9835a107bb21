"""Bootstrap clustered by group (chunks of one package are not independent), and the area under a ROC curve."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np


def clustered_interval(
    statistic: Callable[[np.ndarray], float], groups: Sequence[str], *, seed: int, draws: int = 2000
) -> tuple[float, float, float]:
    """A statistic with its 95% interval.

    Args:
        statistic: takes document indices (with repeats) and returns the figure.
        groups: each document's cluster; whole clusters are drawn with replacement.
        seed: of the draws.
        draws: bootstrap samples.

    Returns:
        The figure over all documents, and the 2.5% and 97.5% quantiles of the draws.
    """
    names = sorted(set(groups))
    members = {name: np.flatnonzero(np.array(groups) == name) for name in names}
    generator = np.random.default_rng(seed)
    values = [
        statistic(np.concatenate([members[names[i]] for i in generator.integers(0, len(names), len(names))]))
        for _ in range(draws)
    ]
    low, high = np.quantile(values, [0.025, 0.975])
    return statistic(np.arange(len(groups))), float(low), float(high)


def mean_with_interval(key: str, values: Sequence[float], groups: Sequence[str], seed: int) -> dict[str, float]:
    """Mean of `key` with its 95% interval, whole groups drawn together; nothing where there are no values."""
    if not len(values):
        return {}
    array = np.asarray(values, np.float64)
    mean, low, high = clustered_interval(lambda rows: float(array[rows].mean()), groups, seed=seed)
    return {key: mean, f"{key}.lo": low, f"{key}.hi": high}


def ratio_with_interval(
    key: str, hits: Sequence[float], totals: Sequence[float], groups: Sequence[str], seed: int
) -> dict[str, float]:
    """Sum of hits over sum of totals with its 95% interval; for shares of tokens counted by document."""
    top, bottom = np.asarray(hits, np.float64), np.asarray(totals, np.float64)
    if not bottom.sum():
        return {}
    share, low, high = clustered_interval(
        lambda rows: float(top[rows].sum() / max(bottom[rows].sum(), 1e-9)), groups, seed=seed
    )
    return {key: share, f"{key}.lo": low, f"{key}.hi": high}


def auroc(values: np.ndarray, labels: np.ndarray) -> float:
    """Probability that a value with label 1 is above one with label 0; ties count half; nan without both."""
    positive = int(labels.sum())
    negative = len(labels) - positive
    if not positive or not negative:
        return float("nan")
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return float((ranks[labels.astype(bool)].sum() - positive * (positive + 1) / 2) / (positive * negative))
