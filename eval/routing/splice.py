"""Texts that are spliced from test windows of two known domains, with the border in tokens.

Inside one chunk at a random offset, and as a longer document that changes once.

Axes: `P` pieces, `T` tokens, `W` windows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

CHUNK = 512


@dataclass(frozen=True)
class Spliced:
    """Pieces of two known domains.

    Attributes:
        ids: `[P, T]`, int64.
        borders: `[P]`, first token of the second domain.
        first: `[P]`, row of the test windows.
        second: `[P]`.
    """

    ids: np.ndarray
    borders: np.ndarray
    first: np.ndarray
    second: np.ndarray


def splice(ids: np.ndarray, domains: np.ndarray, count: int, seed: int) -> Spliced:
    """Chunks of 512 tokens that change at a random offset, 64 tokens or more from both ends.

    Args:
        ids: test windows `[W, T]`.
        domains: `[W]`, known ones alone.
        count: chunks wanted.
        seed: of pairs and offsets.
    """
    generator = np.random.default_rng([seed, 1])
    chunk = min(CHUNK, ids.shape[1] // 2)
    edge = chunk // 8
    rows, borders, firsts, seconds = [], [], [], []
    for _ in range(count):
        first, second = _pair(domains, generator)
        border = int(generator.integers(edge, chunk - edge + 1))
        start, other = (int(generator.integers(0, ids.shape[1] - chunk + 1)) for _ in range(2))
        rows.append(np.concatenate([ids[first, start : start + border], ids[second, other : other + chunk - border]]))
        borders.append(border)
        firsts.append(first)
        seconds.append(second)
    return Spliced(np.stack(rows).astype(np.int64), np.array(borders), np.array(firsts), np.array(seconds))


def changing(ids: np.ndarray, domains: np.ndarray, count: int, seed: int) -> Spliced:
    """Documents of `2.5` windows that change once, in the second half of their first window.

    Args:
        ids: test windows `[W, T]`.
        domains: `[W]`, known ones alone.
        count: documents wanted.
        seed: of pairs and offsets.
    """
    generator = np.random.default_rng([seed, 2])
    length = ids.shape[1]
    rows, borders, firsts, seconds = [], [], [], []
    for _ in range(count):
        first, second = _pair(domains, generator)
        same = np.flatnonzero(domains == domains[second])
        third = int(generator.choice(same))
        border = int(generator.integers(length // 2, length))
        row = np.concatenate([ids[first, :border], ids[second], ids[third]])
        rows.append(row[: 5 * length // 2])
        borders.append(border)
        firsts.append(first)
        seconds.append(second)
    return Spliced(np.stack(rows).astype(np.int64), np.array(borders), np.array(firsts), np.array(seconds))


def _pair(domains: np.ndarray, generator: np.random.Generator) -> tuple[int, int]:
    one, other = generator.choice(np.unique(domains), 2, replace=False)
    return tuple(int(generator.choice(np.flatnonzero(domains == name))) for name in (one, other))  # type: ignore
