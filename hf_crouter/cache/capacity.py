"""How much history fits a host's positions."""

from __future__ import annotations

import bisect
import sys
from collections.abc import Sequence
from typing import Any

import torch

from ..errors import CapacityError, InputError
from ..hosts.positions import max_positions
from ..hosts.rotation import KeyRotation
from ..types import Row
from .policy import ContextPolicy
from .positions import key_positions, row_positions


def capacity(host: Any, policy: ContextPolicy, prefix: int) -> int | None:
    """Most tokens a row whose slots fit the positions that the host was trained on; None where any number does.

    Args:
        host: the plain host.
        policy: its rule; where host and crouter do not share their tokens the answer is an estimate.
        prefix: raw tokens kept at the start of the row.
    """
    positions = _positions(host, policy)
    if positions and policy.true_positions:
        return positions if _stuck(host) else max(positions, _compact_capacity(policy, prefix, positions))
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


def _compact_capacity(policy: ContextPolicy, prefix: int, positions: int) -> int:
    """Most tokens of a compact row: in no state, and in no read of its chunks, more slots than positions."""
    chunk, window = policy.chunker.chunk_length, policy.window
    retrieved = policy.retriever.chunks if policy.retriever is not None else 0

    def slots(chunks: int) -> int:
        raw = max(min(chunks, retrieved) * chunk + window + chunk - 1, 2 * chunk, chunk + window)
        return prefix + chunks * policy.most_entries + raw

    chunks = bisect.bisect_right(range(1, positions + 1), positions, key=slots)
    return prefix + chunks * chunk + window + chunk - 1 if chunks else 0


def read_block(policy: ContextPolicy, row: Row, block: int) -> int:
    """Most tokens of a block that is read to make pairs; of two blocks and the window what follows fits as well.

    Args:
        policy: its rule.
        row: with every chunk; one that is not compact has room for any block.
        block: tokens that would be read at once if there were room.
    """
    if policy.positions is None or not row.compact:
        return block
    room = policy.positions - (row.prefix or 0) - len(row.chunks) * policy.most_entries
    return min(block, room // 2, room - policy.window)


def check_length(host: Any, policy: ContextPolicy, prefix: int, prompt: int, new: int) -> None:
    """Refuses a row that will come to need more slots than the positions that the host was trained on.

    Args:
        host: the plain host.
        policy: its rule.
        prefix: raw tokens kept at the start of the row.
        prompt: tokens of its prompt.
        new: tokens that will be read after it.

    Raises:
        CapacityError: names the capacity in host tokens, and why the host's keys cannot be moved where they cannot.
    """
    if policy.true_positions and prompt + new <= (_positions(host, policy) or prompt + new):
        return  # what else fits costs a forward to know
    fits = capacity(host, policy, prefix)
    if fits is not None and prompt + new > fits:
        stuck = _stuck(host) if policy.true_positions else ""
        why = f"; keys stay at their positions: {stuck.removeprefix('host: ')}" if stuck else ""
        expected = _fits(host, policy, prefix, fits)
        raise CapacityError(f"{expected}, got a prompt of {prompt} and {new + 1} new ones{why}")


def check_capacity(
    host: Any, policy: ContextPolicy, prefix: int, rows: Sequence[Row], codes: Sequence[torch.Tensor]
) -> int:
    """Refuses more slots than the positions that the host was trained on; gives how many more tokens a row may have.

    Args:
        host: the plain host.
        policy: its rule.
        prefix: most raw tokens kept at the start of a row.
        rows: one that has ended while others go on does not count.
        codes: of each row's slots.

    Raises:
        CapacityError: names the capacity in host tokens.
    """
    positions = _positions(host, policy)
    if not positions:
        return sys.maxsize
    slots = max(len(row) for row in codes)
    if policy.true_positions:
        own = (row_positions(row, some) for row, some in zip(rows, codes, strict=True) if row.end is None)
        slots = max((int(some[-1]) + 1 for some in own if len(some)), default=0)
    if slots > positions:
        raise _too_many(host, policy, prefix, slots)
    return positions - slots


def check_read(host: Any, policy: ContextPolicy, prefix: int, slots: int) -> None:
    """Refuses to read chunks at positions that the host was not trained on; see `check_capacity`."""
    positions = _positions(host, policy)
    if positions and slots > positions:
        raise _too_many(host, policy, prefix, slots)


def _too_many(host: Any, policy: ContextPolicy, prefix: int, slots: int) -> CapacityError:
    fits = capacity(host, policy, prefix) or _positions(host, policy) or slots
    return CapacityError(f"{_fits(host, policy, prefix, fits)}, got a history of {slots} slots")


def _positions(host: Any, policy: ContextPolicy) -> int | None:
    return key_positions(host) if policy.true_positions else max_positions(host)


def _stuck(host: Any) -> str:
    """Why a host's keys cannot be moved to other positions; empty where they can."""
    try:
        KeyRotation.of(host)
    except InputError as error:
        return str(error)
    return ""


def _fits(host: Any, policy: ContextPolicy, prefix: int, tokens: int) -> str:
    about = "" if policy.chunker.same_tokenizer else "about "
    count = policy.retriever.chunks if policy.retriever is not None else 0
    retrieved = f", {count} retrieved chunks" if count else ""
    return (
        f"history: expected at most {about}{tokens} tokens a row (the host's {_positions(host, policy)} positions, "
        f"{prefix} of them raw prefix, window {policy.window}{retrieved})"
    )
