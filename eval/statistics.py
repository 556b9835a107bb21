"""Paired bootstrap clustered by group: chunks of one package are not independent."""

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
