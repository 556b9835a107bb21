"""A host that reads contexts and hands out, arm by arm, a shortened cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from eval.peers.arms import Arm
from eval.peers.attention import MaskedAttention, decoder, shortened, slides
from eval.peers.presses import Kept, Wanted, Words, prefill, repeated, row_of
from eval.peers.quantised import quantised


@dataclass(frozen=True, eq=False)
class Short:
    """A shortened cache of `B` rows.

    Attributes:
        name: of the arm.
        cache: without the last position that was read; it grows.
        valid: what counts of it, for `MaskedAttention.using`.
        slots: `[B]`, positions that the arm keeps, averaged over KV heads and the layers that see everything.
    """

    name: str
    cache: Any
    valid: dict[int, torch.Tensor]
    slots: np.ndarray


class Host:
    """A model, and what the arms need of it.

    Args:
        model: with `MaskedAttention`.
        attention: that.
        words: of its tokenizer, for methods of kind `repeat`.
        tokens: that are read at once, at least one row.
    """

    def __init__(self, model: Any, attention: MaskedAttention, words: Words | None = None, tokens: int = 32_768):
        self.model, self.attention, self.words, self.tokens = model, attention, words, tokens
        self.slides = [slides(layer) for layer in decoder(model).layers]
        self.forwarded = 0  # tokens of contexts

    def can(self, arm: Arm) -> bool:
        """Whether an arm is for this host: kvpress has KVzip and its kin for none with sliding windows."""
        return arm.how.kind != "repeat" or not any(self.slides)

    def shorten(self, context: torch.Tensor, wanted: Sequence[Wanted]) -> Iterator[Short]:
        """Reads contexts `[B, L]` once, and shortens what was cached in every way."""
        whole, kept = prefill(self.model, context, [w for w in wanted if w.arm.how.kind == "score"])
        self.forwarded += context.numel()
        nothing: Kept = [None] * len(self.slides)
        for w in wanted:
            name, how = w.arm.name, w.arm.how
            if how.kind == "repeat" and name not in kept:
                kept |= self._repeat(context, whole, [v for v in wanted if v.arm.method == w.arm.method])
            keep = kept.pop(name, nothing)
            quantises = how.kind == "quantised"
            short = quantised(whole, how.bits, how.channels) if quantises else shortened(whole, keep)
            yield Short(name, *short, self._slots(keep, context))

    def _repeat(self, context: torch.Tensor, whole: Any, wanted: Sequence[Wanted]) -> dict[str, Kept]:
        """What arms of one method of kind `repeat` keep: each row by itself, as kvpress has it."""
        if all(w.kept >= context.shape[1] for w in wanted):
            return {w.arm.name: [None] * len(self.slides) for w in wanted}
        rows = [(context[i : i + 1], row_of(whole, i)) for i in range(len(context))]
        parts = [repeated(self.model, self.words, row, cache, wanted) for row, cache in rows]
        return {w.arm.name: [torch.cat(same) for same in zip(*(p[w.arm.name] for p in parts), strict=True)]
                for w in wanted}  # fmt: skip

    def _slots(self, keep: Kept, context: torch.Tensor) -> np.ndarray:
        """What is kept, `[B]`."""
        full = torch.full((len(context),), float(context.shape[1]), device=context.device)
        counts = [
            full if layer is None else layer.sum(-1).float().mean(1)
            for layer, slid in zip(keep, self.slides, strict=True)
            if not slid
        ]
        return (torch.stack(counts).mean(0) if counts else full).cpu().numpy().astype(np.float32)
