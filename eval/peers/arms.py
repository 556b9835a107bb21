"""The arms: which method shortens a cache, and to how many positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from eval.peers.rows import BadInput, budget

ENTRIES = (8, 32, 128)  # kept for each chunk, on average over layers and KV heads


@dataclass(frozen=True)
class Method:
    """A press of kvpress, or nothing of it.

    Attributes:
        kind: `score` (ranks positions as they are cached), `repeat` (has the host repeat the context first),
            `quantised` or `full`.
        module: of kvpress.
        press: its class.
        options: that are not left to their defaults.
        sinks: whether positions at the start are kept by name; those of the prefix then.
        bits: of a quantised cache.
        channels: whether keys that share a scale are of one channel; of one token otherwise.
    """

    kind: str
    module: str = ""
    press: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    sinks: bool = False
    bits: int = 0
    channels: bool = False


METHODS = {
    "kvzip": Method("repeat", "kvzip_press", "KVzipPress", sinks=True),
    "snapkv": Method("score", "snapkv_press", "SnapKVPress"),
    "full_quantised4": Method("quantised", bits=4),
    "full_quantised2": Method("quantised", bits=2),
    "full_quantised4_channels": Method("quantised", bits=4, channels=True),
    "expected_attention": Method("score", "expected_attention_press", "ExpectedAttentionPress", sinks=True),
    "streaming": Method("score", "streaming_llm_press", "StreamingLLMPress", sinks=True),
    "kvgrad": Method("repeat", "kvgrad_press", "KVgradPress", sinks=True),
    "kvzip_plus": Method("repeat", "kvzip_press", "KVzipPress", {"kvzip_plus_normalization": True}, sinks=True),
    "full_peers": Method("full"),
}
STAGES = (
    ("kvzip", "snapkv"),
    ("full_quantised4", "full_quantised2", "full_quantised4_channels"),
    ("expected_attention", "streaming"),
    ("kvgrad", "kvzip_plus"),  # what leads kvpress' leaderboard and needs nothing trained
    ("full_peers",),
)
"""Methods that share a pass over the documents, most needed first: all documents have one stage before the next."""


@dataclass(frozen=True)
class Arm:
    """A method and its budget.

    Attributes:
        name: `<method>.at<entries>`, or the method where it keeps all positions.
        method: of `METHODS`.
        entries: kept for each chunk, or None.
    """

    name: str
    method: str
    entries: int | None

    @property
    def how(self) -> Method:
        """What the method is."""
        return METHODS[self.method]

    def kept(self, prefix: int, window: int, count: int, length: int) -> int:
        """Positions of `length` that are kept on average."""
        return length if self.entries is None else min(length, budget(prefix, window, count, self.entries))


def _all(entries: Sequence[int]) -> list[Arm]:
    arms = []
    for stage in STAGES:
        for method in stage:
            shortens = METHODS[method].kind in ("score", "repeat")
            arms += [Arm(f"{method}.at{e}", method, e) for e in entries] if shortens else [Arm(method, method, None)]
    return arms


ARMS = {arm.name: arm for arm in _all(ENTRIES)}
DEFAULT = tuple(arm.name for arm in _all((8, 128)))


def stages(names: Sequence[str]) -> list[list[Arm]]:
    """Arms in the order in which they are measured, those that share a pass together.

    Raises:
        BadInput: an arm does not exist.
    """
    if unknown := [name for name in names if name not in ARMS]:
        raise BadInput(f"--arms: expected some of {' '.join(ARMS)}, got {unknown[0]}")
    wanted = [[arm for arm in ARMS.values() if arm.method in stage and arm.name in names] for stage in STAGES]
    return [arms for arms in wanted if arms]
