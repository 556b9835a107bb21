"""Compact: of each chunk that leaves the window, the key-value pairs to which attention to it goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..cache.masks import sliding_layers
from ..compressors.compact import PairSelector
from ..errors import InputError
from ..types import Contribution, Parts, Setting


@dataclass(frozen=True)
class Compact:
    """Each chunk's own key-value pairs, reduced to a few a head; nothing is trained and no crouter is needed.

    Attributes:
        slots: pairs that are kept of a chunk and head, the mean over layers: of 512 tokens 8 are 64x, 128 are 4x.
        block: tokens of leaving chunks that are read at once in a long prompt; two blocks are raw at a time.

    Raises:
        InputError: options that keep nothing.

    Example:
        >>> history = CompressedHistory(host, modes=[Compact(slots=64)])
    """

    name: ClassVar[str] = "compact"
    gives: ClassVar[tuple[Contribution, ...]] = ("entries",)

    slots: int = 32
    block: int = 2048

    def __post_init__(self):
        for name, least in (("slots", 1), ("block", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise InputError(f"Compact({name}=): expected a number, {least} or more, got {value!r}")

    @property
    def needs_crouter(self) -> bool:
        """Whether it can do nothing without a crouter."""
        return False

    def bind(self, setting: Setting) -> Parts:
        """See `Mode.bind`."""
        kept = tuple(0 if slides else self.slots for slides in sliding_layers(setting.host))
        return Parts(compressor=PairSelector(kept, self.block))
