"""How much history fits a host's positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..errors import CapacityError
from ..hosts.positions import max_positions
from ..hosts.rope import rope_switch
from .policy import ContextPolicy


def capacity(host: Any, policy: ContextPolicy, prefix: int) -> int | None:
    """Most tokens a row whose slots fit the positions that the host was trained on; None where any number does.

    Args:
        host: the plain host.
        policy: its rule; where host and crouter do not share their tokens the answer is an estimate.
        prefix: raw tokens kept at the start of the row.
    """
    positions = _positions(host, policy)
    if positions and policy.true_positions:
        return positions
    chunk = policy.chunker.chunk_length
    entries, raw = policy.most_entries, prefix + policy.window + chunk - 1
    retrieved = policy.retriever.chunks if policy.retriever is not None else 0
    if not positions or (raw + retrieved * chunk <= positions and not entries):
        return None
    room, each = max(0, positions - raw), (entries if policy.beside_raw else 0) + chunk
    fitting = min(retrieved, room // each)
    if fitting < retrieved:  # each chunk takes more slots than it frees
        left = room - fitting * each
        return min(positions, raw) + fitting * chunk + max(0, left - entries)
    chunks = fitting + (room - fitting * each) // entries if entries else 0
    return min(positions, raw) + chunks * chunk


def check_length(host: Any, policy: ContextPolicy, prefix: int, prompt: int, new: int) -> None:
    """Refuses a row that will come to need more slots than the positions that the host was trained on.

    Args:
        host: the plain host.
        policy: its rule.
        prefix: raw tokens kept at the start of the row.
        prompt: tokens of its prompt.
        new: tokens that will be read after it.

    Raises:
        CapacityError: names the capacity in host tokens.
    """
    fits = capacity(host, policy, prefix)
    if fits is not None and prompt + new > fits:
        raise CapacityError(f"{_fits(host, policy, prefix, fits)}, got a prompt of {prompt} and {new + 1} new ones")


def check_capacity(host: Any, policy: ContextPolicy, prefix: int, codes: Sequence[torch.Tensor]) -> None:
    """Refuses more slots than the positions that the host was trained on.

    Args:
        host: the plain host.
        policy: its rule.
        prefix: most raw tokens kept at the start of a row.
        codes: of each row's slots.

    Raises:
        CapacityError: names the capacity in host tokens.
    """
    positions = _positions(host, policy)
    slots = max(len(row) for row in codes)
    if positions and policy.true_positions:
        slots = max(slots, *(int(row[-1]) + 1 for row in codes if len(row)))
    if positions and slots > positions:
        fits = capacity(host, policy, prefix) or positions
        raise CapacityError(f"{_fits(host, policy, prefix, fits)}, got a history of {slots} slots")


def _positions(host: Any, policy: ContextPolicy) -> int | None:
    """Positions that slots may take; keys at true ones are made once, so all under one set of rotary factors."""
    positions = max_positions(host)
    switch = rope_switch(host) if policy.true_positions else None
    return min(positions, switch) if positions and switch else positions or switch


def _fits(host: Any, policy: ContextPolicy, prefix: int, tokens: int) -> str:
    about = "" if policy.chunker.same_tokenizer else "about "
    count = policy.retriever.chunks if policy.retriever is not None else 0
    retrieved = f", {count} retrieved chunks" if count else ""
    return (
        f"history: expected at most {about}{tokens} tokens a row (the host's {_positions(host, policy)} positions, "
        f"{prefix} of them raw prefix, window {policy.window}{retrieved})"
    )
