"""The ways of reading that are measured: one list for likelihood, lines, questions, near matches and RULER."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hf_crouter import Compact, CompressedHistory, Copy, Retrieve, SoftPrompts
from hf_crouter.compressors.projector import Projector, find_projector
from hf_crouter.errors import InputError, MismatchError
from hf_crouter.ngram.gate import Gate, find_gate, general_gate
from hf_crouter.ngram.scorers import Bm25Scorer, RandomScorer, RecencyScorer
from hf_crouter.types import Mode


@dataclass(frozen=True)
class Arm:
    """What a host reads of its past.

    Attributes:
        modes: of `CompressedHistory`; None: the plain host on the whole text.
        longer: by how many tokens the raw window is longer: a number, or so many for each chunk of the past.
        each: whether `longer` is for each chunk.
        crouter: whether a crouter is passed: chunks are cut by its tokens.
        special: what no modes make: "oracle", the best pair of chunks by the loss itself; "full_copy", the whole text
            and copying beside it; "shuffled", soft prompts of another text; "mean_pool", means of token embeddings in
            their place.
    """

    modes: tuple[Mode, ...] | None = ()
    longer: int = 0
    each: bool = False
    crouter: bool = False
    special: str = ""

    @property
    def soft(self) -> bool:
        """Whether it needs the host's projector."""
        return self.special == "shuffled" or any(isinstance(mode, SoftPrompts) for mode in self.modes or ())

    def extra(self, chunks: int) -> int:
        """Tokens by which the raw window is longer, with so many chunks in the past."""
        return self.longer * chunks if self.each else self.longer


FITTED = "fitted"  # stands for the gate that the command names
ARMS = {
    "window": Arm(),
    "full": Arm(None),
    "copy": Arm((Copy(),)),
    "retrieve2": Arm((Retrieve(2),)),
    "retrieve2_copy": Arm((Retrieve(2), Copy())),
    "retrieve4": Arm((Retrieve(4),)),
    "compact8": Arm((Compact(8),)),
    "compact32": Arm((Compact(32),)),
    "compact128": Arm((Compact(128),)),
    "compact64": Arm((Compact(64),)),
    "compact32_retrieve2": Arm((Compact(32), Retrieve(2))),
    "compact64_retrieve2": Arm((Compact(64), Retrieve(2))),
    "compact8_retrieve2": Arm((Compact(8), Retrieve(2))),
    "compact32_copy": Arm((Compact(32), Copy())),
    "longer_same_slots": Arm(longer=8, each=True),
    "longer_same_slots_at32": Arm(longer=32, each=True),
    "longer_same_slots_at128": Arm(longer=128, each=True),
    "longer_same_slots_retrieve2": Arm(longer=1024),
    "longer_same_slots_retrieve4": Arm(longer=2048),
    "copy_fitted": Arm((Copy(gate=FITTED),)),
    "retrieve2_copy_fitted": Arm((Retrieve(2), Copy(gate=FITTED))),
    "compact32_copy_fitted": Arm((Compact(32), Copy(gate=FITTED))),
    "compact32_retrieve2_copy": Arm((Compact(32), Retrieve(2), Copy())),
    "compact60": Arm((Compact(60),)),
    "compact160": Arm((Compact(160),)),
    "compact96_retrieve1": Arm((Compact(96), Retrieve(1))),
    "compact8_equal": Arm((Compact(8, budgets="equal"),)),
    "compact32_equal": Arm((Compact(32, budgets="equal"),)),
    "compact128_equal": Arm((Compact(128, budgets="equal"),)),
    "soft": Arm((SoftPrompts(),), crouter=True),
    "shuffled": Arm(crouter=True, special="shuffled"),
    "retrieve8": Arm((Retrieve(8),)),
    "retrieve4_copy": Arm((Retrieve(4), Copy())),
    "retrieve4_copy_fitted": Arm((Retrieve(4), Copy(gate=FITTED))),
    "full_copy": Arm(None, special="full_copy"),
    "copy_general": Arm((Copy(gate="general"),)),
    "copy_rebuilt": Arm((Copy(source="rebuilt"),), crouter=True),
    "longer_same_slots_retrieve2_copy": Arm((Copy(),), longer=1024),
    "retrieve2_last": Arm((Retrieve(2, scorer=RecencyScorer()),)),
    "retrieve2_bm25": Arm((Retrieve(2, scorer=Bm25Scorer()),)),
    "retrieve2_random": Arm((Retrieve(2, scorer=RandomScorer(0)),)),
    "mean_pool": Arm(special="mean_pool"),
    "soft_copy": Arm((SoftPrompts(), Copy()), crouter=True),
    "soft_retrieve2_copy": Arm((SoftPrompts(), Retrieve(2), Copy()), crouter=True),
    "retrieve2_oracle": Arm(special="oracle"),
    "copy_half": Arm((Copy(strength=0.5),)),
    "copy_generated": Arm((Copy(generated=True),)),
}
"""By name, in the order in which they are needed: a lease that ends early has measured the first ones."""
SCORED = tuple(name for name in ARMS if name not in ("copy_half", "copy_generated"))
"""Arms of which teacher-forced likelihood says something of its own."""
GENERATING = tuple(name for name, arm in ARMS.items() if not arm.special and not arm.longer)
"""Arms that can write: `model.generate` with a history, or without one."""


@dataclass(eq=False)
class Reader:
    """A host, and what its arms need.

    Attributes:
        host: the decoder.
        tokenizer: of the host.
        crouter: None where there is none.
        gate: folder of a gate that was fitted for this host; None where there is none.
        window: fewest raw tokens at the end.
        keep_first: raw tokens at the start, or "auto".
        projector: of the host; found beside the crouter where none is given.
    """

    host: Any
    tokenizer: Any
    crouter: Any = None
    gate: Any = None
    window: int = 512
    keep_first: int | Literal["auto"] = 4
    projector: Projector | None = None

    def __post_init__(self):
        if self.crouter is not None and self.projector is None:
            with contextlib.suppress(MismatchError):
                self.projector = find_projector(self.crouter, self.host, tokenizer=self.tokenizer)

    def lacks(self, name: str) -> str:
        """What an arm needs and is not there; empty where it can be read."""
        arm = ARMS[name]
        if arm.crouter and self.crouter is None:
            return "a crouter"
        if arm.soft and self.projector is None:
            return "a projector for this host"
        if self.gate is None and any(getattr(mode, "gate", None) == FITTED for mode in arm.modes or ()):
            return "a gate that was fitted for this host (--gate)"
        return ""

    def readable(self, names: Sequence[str]) -> list[str]:
        """The arms among these that can be read; says of the others what they lack."""
        found = []
        for name in names:
            if lack := self.lacks(name):
                print(f"{name}: left out, expected {lack}", flush=True)
            else:
                found.append(name)
        return found

    def history(self, name: str, chunks: int = 0, modes: Sequence[Mode] | None = None) -> CompressedHistory | None:
        """What an arm passes to `generate`; None for the plain host.

        Args:
            name: of `ARMS`.
            chunks: of the past, where a window is longer for each.
            modes: instead of the arm's own.

        Raises:
            InputError: the arm needs something that is not there.
        """
        arm = ARMS[name]
        if lack := self.lacks(name):
            raise InputError(f"{name}: expected {lack}, got none")
        wanted: Any = arm.modes if modes is None else list(modes)
        if wanted is None:
            return None
        return CompressedHistory(
            self.host,
            # beside the host's own projector the crouter's folder holds its gate
            self.crouter if arm.crouter or self._same_tokens() else None,
            modes=[self._made(mode) for mode in wanted],
            window=self.window + arm.extra(chunks),
            keep_first=self.keep_first,
            tokenizer=self.tokenizer,
        )

    def own_gate(self) -> Gate:
        """The gate that `copy` reads with: of this host where there is one, else the general one."""
        return find_gate(self.crouter if self._same_tokens() else None, self.host, tokenizer=self.tokenizer)

    def _same_tokens(self) -> bool:
        config = self.projector.config if self.projector is not None else None
        return config is not None and config.host_tokenizer == config.crouter_tokenizer

    def _made(self, mode: Mode) -> Mode:
        if isinstance(mode, SoftPrompts):
            return dataclasses.replace(mode, projector=self.projector)
        if isinstance(mode, Copy) and mode.gate in (FITTED, "general"):
            return dataclasses.replace(mode, gate=self.gate if mode.gate == FITTED else general_gate())
        return mode
