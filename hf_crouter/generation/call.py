"""One running `generate` call: what it is recognised by, and what is known of it."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, StaticCache, StoppingCriteriaList

from ..cache.kv_cache import CompressedCache
from ..cache.masks import LayerMasks
from ..cache.policy import ContextPolicy
from ..hosts.attention import attention_met
from ..types import ScoreState


class HistoryProcessor(LogitsProcessor):
    """What a `generate` call is recognised by.

    Attributes:
        host: the plain host that it belongs to.
        policy: what a row's tokens call for.
        attached: whether it still belongs to the host; a detached one asks for nothing.
        changes_scores: whether a mode has a say in the scores.
    """

    host: PreTrainedModel
    policy: ContextPolicy
    attached: bool = False
    changes_scores: bool = False

    def started(self) -> None:
        """Called when a `generate` call begins."""

    def finished(
        self, cache: CompressedCache, sequences: torch.Tensor, states: Sequence[ScoreState], steps: tuple[int, int]
    ) -> None:
        """Called when a `generate` call has ended well.

        Args:
            cache: of the call.
            sequences: the ids that it gave, `[rows, T]`.
            states: changes of the scores in the call.
            steps: how many of the host there were, and how many tokens a row they gave.
        """

    def left_alone(self, sequences: torch.Tensor) -> None:
        """Called when a call has ended that the host read as if alone; `sequences` `[rows, T]` are what it gave."""


@dataclass
class Call:
    """One running `generate` call of one host.

    Attributes:
        processor: the history that it was called with.
        ids: `input_ids [B, T]` of the prompt; None where there are none.
        options: what else it was called with, by name.
        plain: nothing can be compressed in it and it is out of the ordinary: the host reads it as if alone.
        compresses: it is long enough for something to be compressed.
        grows: every step's ids are those of the step before and one more token a row.
        ends_apart: its rows end one by one, and are padded behind their ends.
        own_positions: the host gives its slots positions of its own before anything is compressed.
        columns: most columns of ids that the host will read; None where that is not known.
        cache: the compressed cache, once there is one.
        steps: of the host, prepared so far.
        read: columns that the first of them read, drafts left out.
        states: changes of the scores, once something is compressed.
        raw_scores: of the step in hand, before any processor, `[B, V]`; None where none comes before the history's.
        ended: columns at which each row met its end, `[B]`, 0 while it goes on; None where rows end together.
        open: what ends with the call.
        masks: of the forward in hand, layer by layer; None where the host makes its own.
    """

    processor: HistoryProcessor
    ids: torch.Tensor | None
    options: Mapping[str, Any] = field(default_factory=dict)
    plain: bool = False
    compresses: bool = True
    grows: bool = False
    ends_apart: bool = False
    own_positions: bool = False
    columns: int | None = None
    cache: CompressedCache | None = None
    steps: int = 0
    read: int = 0
    states: Sequence[ScoreState] | None = None
    raw_scores: torch.Tensor | None = None
    ended: torch.Tensor | None = None
    open: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    masks: LayerMasks | None = None

    @property
    def prompt(self) -> int | None:
        """Columns of the prompt; what comes after them in the first step is drafted."""
        return self.ids.shape[1] if self.ids is not None else None

    @property
    def rows(self) -> int:
        """Prompts in the batch; beams and several sequences make more rows of them."""
        return len(self.ids) if self.ids is not None else 1

    def given(self, host: Any, cache: CompressedCache, masks: LayerMasks) -> torch.Tensor:
        """What the host is given so that its next forward reads by these masks.

        One step over a static cache gets them stacked in one: it may be compiled, where nothing can be asked for.
        """
        if self.masks is None:
            self.open.enter_context(attention_met(host, self._mask_of))
        self.masks = masks
        if isinstance(cache, StaticCache) and masks.queries == 1:
            return masks.stacked([int(layer.max_cache_len) for layer in cache.layers])  # pyright: ignore
        return masks.stand_in

    def _mask_of(self, layer: int, keys: int) -> torch.Tensor | None:
        return self.masks.of(layer, keys) if self.masks is not None else None

    def ends(self) -> list[int]:
        """The same as `ended`; asking waits for the device."""
        return self.ended.tolist() if self.ended is not None else []


CALLS: ContextVar[Mapping[int, Call | None]] = ContextVar("hf_crouter_calls", default=MappingProxyType({}))


def active_call(host: PreTrainedModel) -> Call | None:
    """The `generate` call of this host that is running in this context with a history."""
    return CALLS.get().get(id(host))


class RawScores(LogitsProcessor):
    """Keeps a step's scores before any other processor sees them; the same scores come back."""

    def __init__(self, call: Call):
        self.call = call

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """See `Call.raw_scores`."""
        self.call.raw_scores = scores.clone()  # others may write into theirs
        return scores


class EndsNoted(StoppingCriteriaList):
    """A call's stopping criteria, which also tell it at which length each row ended."""

    def __init__(self, criteria: StoppingCriteriaList, call: Call):
        super().__init__(criteria)
        self.call = call

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        """Which rows end, `[B]`."""
        done = super().__call__(input_ids, scores, **kwargs)  # pyright: ignore[reportArgumentType]
        before = self.call.ended
        before = torch.zeros_like(done, dtype=torch.long) if before is None else before
        self.call.ended = torch.where(done & (before == 0), input_ids.shape[1], before)
        return done


def with_raw_scores(processors: LogitsProcessorList, call: Call) -> LogitsProcessorList:
    """The processors of a call, behind one that keeps the raw scores for its history where others come before it."""
    if processors and processors[0] is call.processor:
        return processors
    return LogitsProcessorList([RawScores(call), *processors])
