"""Compact: of each chunk that leaves the window, the key-value pairs to which attention to it goes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import ClassVar

from ..compressors.compact import PairSelector
from ..compressors.layer_budgets import LayerBudgets, find_layer_budgets
from ..errors import InputError
from ..fitting import HostInUse
from ..hosts.attention import sliding_layers
from ..hosts.families import check_compact
from ..hosts.pair_probe import check_pairs
from ..types import Contribution, Fitted, Parts, Setting


@dataclass(frozen=True)
class Compact:
    """Each chunk's own key-value pairs, reduced to a few a head; nothing is trained and no crouter is needed.

    Attributes:
        slots: pairs that are kept of a chunk and head, the mean over layers: of 512 tokens 8 are 64x, 128 are 4x.
        budgets: how they are divided over the layers: "auto", as it was measured for this host or a twin of it where
            it was, else equally; "equal"; or the file (or `LayerBudgets`) that `hf-crouter budgets` writes.
        block: tokens of leaving chunks that are read at once in a long prompt; two blocks are raw at a time, and a
            forward's own activations grow with it. None: 2,048; on CUDA, by SDPA and without sliding layers, of more
            than 32k that leave a sixteenth, 8,192 at most: the longer, the fewer forwards.

    Raises:
        InputError: options that keep nothing.

    Example:
        >>> history = CompressedHistory(host, modes=[Compact(slots=64)])
    """

    name: ClassVar[str] = "compact"
    gives: ClassVar[tuple[Contribution, ...]] = ("entries",)

    slots: int = 32
    budgets: str | os.PathLike | LayerBudgets = "auto"
    block: int | None = None

    def __post_init__(self):
        for name in ("slots", "block"):
            value = getattr(self, name)
            if not (isinstance(value, int) and value >= 1 or name == "block" and value is None):
                raise InputError(f"Compact({name}=): expected a number, 1 or more, got {value!r}")
        if not isinstance(self.budgets, str | os.PathLike | LayerBudgets):
            raise InputError(
                f"Compact(budgets=): expected 'auto', 'equal', a file or LayerBudgets, got {self.budgets!r}"
            )

    @property
    def needs_crouter(self) -> bool:
        """Whether it can do nothing without a crouter."""
        return False

    @classmethod
    def ready(cls, setting: Setting) -> Compact | None:
        """See `Mode`: with a host whose key-value pairs can be compacted."""
        try:
            check_pairs(setting.host)
        except InputError:
            return None
        return cls()

    def bind(self, setting: Setting) -> Parts:
        """See `Mode.bind`.

        Raises:
            InputError: a file of budgets that is damaged.
            MismatchError: budgets of another host.
        """
        check_compact(setting.host)
        slides = sliding_layers(setting.host)
        budgets, fits = self._budgets(setting)
        if budgets is None:
            kept = tuple(0 if slide else self.slots for slide in slides)
        else:
            kept = budgets.counts(self.slots)
            if [count == 0 for count in kept] != list(slides):
                raise InputError(
                    f"Compact(budgets=): expected budgets of {slides.count(False)} layers that look back, "
                    f"got {sum(map(bool, kept))}"
                )
        return Parts(compressor=PairSelector(kept, self.block), fitted=fits)

    def _budgets(self, setting: Setting) -> tuple[LayerBudgets | None, tuple[Fitted, ...]]:
        if self.budgets == "equal":
            return None, ()
        host = HostInUse.of(setting)
        if isinstance(self.budgets, LayerBudgets):
            budgets = self.budgets
        else:
            budgets = find_layer_budgets(host, None if self.budgets == "auto" else self.budgets)
        return budgets, (budgets.fitted(host),) if budgets is not None else ()
