"""A window and a number of slots that fit a budget of memory, or why none does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from ..cache.memory import memory, over_budget
from ..cache.policy import ContextPolicy
from ..types import Mode
from .compact import Compact

WINDOWS = (32768, 16384, 8192, 4096, 2048, 1024, 512, 256)
SLOTS = (128, 64, 32, 16, 8)
USUAL = 512  # a longer window comes with the most slots, a shorter one with the fewest
BLOCK = 512  # tokens read at once where the usual block takes too much

Chosen = tuple[int, Sequence[Mode]]
"""A window, and modes."""


def choices(modes: Sequence[Mode], longest: int, slots: bool) -> Iterator[Chosen]:
    """Windows and modes from the most to the least that they keep.

    Args:
        modes: of the history.
        longest: tokens of a row; a window of as many keeps all of them raw.
        slots: whether the number of pairs that `Compact` keeps is to be chosen.
    """
    yield longest, modes
    windows = [window for window in WINDOWS if window < longest]
    compact = next((mode for mode in modes if isinstance(mode, Compact)), None)
    if compact is None:
        for window in windows:
            yield window, modes
        return
    kept = SLOTS if slots else (compact.slots,)
    ways = [(window, kept[0]) for window in windows if window > USUAL]
    ways += [(USUAL, count) for count in kept if longest > USUAL]
    ways += [(window, kept[-1]) for window in windows if window < USUAL]
    for window, count in ways:
        for block in (compact.block, BLOCK) if compact.block is None else (compact.block,):
            own = replace(compact, slots=count, block=block)
            yield window, [own if mode is compact else mode for mode in modes]


def fitted_choice(
    host: Any,
    policy_of: Callable[[Chosen], ContextPolicy],
    modes: Sequence[Mode],
    budget: int,
    longest: int,
    prefix: int,
    *,
    slots: bool,
) -> tuple[Sequence[Mode], ContextPolicy]:
    """Modes and policy of the choice that keeps the most of those that fit.

    Args:
        host: the plain host.
        policy_of: makes the policy of a choice.
        modes: of the history.
        budget: bytes beyond the weights.
        longest: tokens of a row, those to come counted.
        prefix: raw tokens kept at its start.
        slots: see `choices`.

    Raises:
        CapacityError: none fits; it says how much would, and how many tokens do.
    """
    copies = any("scores" in mode.gives for mode in modes)
    tried: list[tuple[int, ContextPolicy]] = []
    for chosen in choices(modes, longest, slots):
        policy = policy_of(chosen)
        tried.append((memory(host, policy, prefix, longest, 1, copies=copies).peak, policy))
        if tried[-1][0] <= budget:
            return chosen[1], policy
    _, least = min(tried, key=lambda one: one[0])
    raise over_budget(host, least, budget, prefix, longest, 1, copies=copies)
