"""The class mixed in front of a host's own: `generate` with a compressed past, for the calls that ask for it.

A call asks for it by a `HistoryProcessor` among its `logits_processor`, or by an always-on one (`attach`). Everything
else goes to the host's own methods unchanged.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from threading import Lock
from types import MappingProxyType
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, StaticCache

from ..cache.kv_cache import CompressedCache, CompressedDynamicCache, CompressedStaticCache, is_recording
from ..cache.masks import mask_and_positions
from ..cache.policy import ContextPolicy
from ..cache.prefill import prefill
from ..errors import InputError
from ..types import Row, ScoreState
from .drafts import trim_drafts

DRAFTS = 64  # slots of a static cache kept free for drafted tokens
ALWAYS_ON = "_hf_crouter_always_on"
_MIXING = Lock()


class HistoryProcessor(LogitsProcessor):
    """What a `generate` call is recognised by.

    Attributes:
        host: the plain host that it belongs to.
        policy: what a row's tokens call for.
        attached: whether it still belongs to the host; a detached one asks for nothing.
    """

    host: PreTrainedModel
    policy: ContextPolicy
    attached: bool = False

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


@dataclass
class Call:
    """One running `generate` call of one host.

    Attributes:
        processor: the history that it was called with.
        prompt: columns of its `input_ids` at the start; all that comes later in the first step is drafted.
        cache: the compressed cache, once there is one.
        steps: of the host, prepared so far.
        read: columns that the first of them read, drafts left out.
        states: changes of the scores, once something is compressed.
        rows: prompts in the batch; beams and several sequences make more rows of them.
    """

    processor: HistoryProcessor
    prompt: int | None
    cache: CompressedCache | None = None
    steps: int = 0
    read: int = 0
    states: Sequence[ScoreState] | None = None
    rows: int = 1


_CALLS: ContextVar[Mapping[int, Call | None]] = ContextVar("hf_crouter_calls", default=MappingProxyType({}))


def active_call(host: PreTrainedModel) -> Call | None:
    """The `generate` call of this host that is running in this context with a compressed past."""
    return _CALLS.get().get(id(host))


class CompressedGenerationMixin:
    """Overrides of `generate` and `prepare_inputs_for_generation`, and of the private hook that makes drafts."""

    def generate(self, inputs=None, generation_config=None, logits_processor=None, *args, **kwargs):
        """See the host's own `generate`; with a `HistoryProcessor` for this host the past is compressed."""
        always = self.__dict__.get(ALWAYS_ON) or (None,)
        processor = next(
            (p for p in logits_processor or () if isinstance(p, HistoryProcessor) and p.host is self and p.attached),
            always[-1],
        )
        call = None
        if processor is not None:
            configs = (generation_config, self.generation_config)  # pyright: ignore[reportAttributeAccessIssue]
            if kwargs.get("prefill_chunk_size") or any(getattr(c, "prefill_chunk_size", None) for c in configs):
                raise InputError(
                    "prefill_chunk_size: expected none, got one; a compressed past is prefilled in chunks"
                )
            ids, mask = inputs if inputs is not None else kwargs.get("input_ids"), kwargs.get("attention_mask")
            if ids is not None and mask is not None and mask.shape != ids.shape:
                raise InputError(
                    f"input_ids: expected the whole conversation, as long as its mask {list(mask.shape)}, "
                    f"got {list(ids.shape)}"
                )
            call = Call(processor, ids.shape[1] if ids is not None else None)
            call.rows = len(ids) if ids is not None else 1
            if not any(p is processor for p in logits_processor or ()):  # always on
                logits_processor = LogitsProcessorList([*(logits_processor or ()), processor])
            processor.started()
        token = _CALLS.set(MappingProxyType({**_CALLS.get(), id(self): call}))
        try:
            result = super().generate(inputs, generation_config, logits_processor, *args, **kwargs)  # pyright: ignore
        finally:
            _CALLS.reset(token)
            if call is not None:
                call.processor.policy.serve(None)
        if call is not None:
            sequences = result if isinstance(result, torch.Tensor) else result.sequences
            if not call.steps and sequences.shape[1] > call.processor.policy.fewest:
                raise InputError(
                    "compression was skipped: this way to generate does not prepare its inputs by the host"
                )
            if call.cache is not None:
                steps = (call.steps, sequences.shape[1] - call.read)
                call.processor.finished(call.cache, sequences, call.states or (), steps)
        return result

    def prepare_inputs_for_generation(
        self,
        input_ids,
        next_sequence_length=None,
        past_key_values=None,
        attention_mask=None,
        inputs_embeds=None,
        is_first_iteration=False,
        **kwargs,
    ):
        """See the host's own; swaps in a compressed cache and the slots, mask and positions that go with it."""

        def host_inputs(
            ids=input_ids, length=next_sequence_length, cache=past_key_values, mask=attention_mask, **more
        ):
            return super(CompressedGenerationMixin, self).prepare_inputs_for_generation(  # pyright: ignore
                ids,
                next_sequence_length=length,
                past_key_values=cache,
                attention_mask=mask,
                inputs_embeds=inputs_embeds,
                is_first_iteration=is_first_iteration,
                **{**kwargs, **more},
            )

        call = _CALLS.get().get(id(self))
        if call is None:
            if isinstance(past_key_values, CompressedCache) and past_key_values.has_private_state:
                raise InputError("past_key_values: holds a compressed past; pass its CompressedHistory as well")
            return host_inputs()
        if inputs_embeds is not None or past_key_values is None or kwargs.get("use_cache") is False:
            raise InputError("a compressed past: expected input_ids and use_cache=True, got inputs_embeds or no cache")
        policy, first, cache = call.processor.policy, not call.steps, past_key_values
        width = input_ids.shape[1]
        verified = min(width, call.prompt or width)
        call.steps += 1
        if first:
            call.read = verified
            pads = row_pads(attention_mask, input_ids)
            cache = open_cache(self, policy, past_key_values, input_ids, pads, verified)
        if not isinstance(cache, CompressedCache):
            return host_inputs()  # a static cache too small ever to need compression
        call.cache = cache
        main = None if first else width - cache.width
        if not first:
            verified = cache.width + 1  # of the new tokens the first is decided, the others are drafts
        held = cache.layout.shape[1]
        main, kept = prefill(self, policy, cache, input_ids, verified, main)
        policy.serve(cache.experts[:, -main:])
        if not cache.compressed and kept == held:
            return host_inputs(cache=cache)
        mask, positions = mask_and_positions(self, cache, main, input_ids.device)
        if "position_ids" in kwargs:
            kwargs["position_ids"] = positions
        if not isinstance(mask, dict):
            return host_inputs(input_ids[:, -main:], None, cache, mask)
        inputs = host_inputs(input_ids[:, -main:], None, cache, None)
        masks = {kind: some if some is None else some.contiguous() for kind, some in mask.items()}
        return {**inputs, "attention_mask": masks}

    def _get_candidate_generator(self, input_ids, model_kwargs, **kwargs):
        """See the host's own; drafts end before the next compaction, and are made without the history's processor."""
        call = _CALLS.get().get(id(self))
        if call is not None and kwargs.get("logits_processor") is not None:
            # an assistant has its own past; prompt lookup asks for made-up scores
            others = (p for p in kwargs["logits_processor"] if getattr(p, "host", None) is not self)
            kwargs["logits_processor"] = LogitsProcessorList(others)
        generator = super()._get_candidate_generator(input_ids=input_ids, model_kwargs=model_kwargs, **kwargs)  # pyright: ignore
        if call is None:
            return generator
        first = Row(row_pads(model_kwargs.get("attention_mask"), input_ids)[0])
        return trim_drafts(generator, call.processor.policy, lambda: call.cache.rows[0] if call.cache else first)


def mix_in(host: PreTrainedModel, adapters: bool = False) -> None:
    """Puts the mixin in front of the host's class; counted, so every `mix_in` needs its `mix_out`.

    Args:
        host: the plain host.
        adapters: hooks of adapters are on its layers.
    """
    _count(host, "_hf_crouter_mixed", 1, adapters)


@functools.cache  # compiled graphs are guarded by the class, but not by hooks: a host that has them needs its own
def _mixed(cls: type, adapters: bool) -> type:
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "_hf_crouter_plain": cls}
    return type(cls.__name__, (CompressedGenerationMixin, cls), names)


def mix_out(host: PreTrainedModel, adapters: bool = False) -> None:
    """Undoes one `mix_in` of the same kind; the last one gives the host its own class back."""
    _count(host, "_hf_crouter_mixed", -1, adapters)


def _count(host: PreTrainedModel, key: str, change: int, adapters: bool) -> None:
    with _MIXING:
        mixed_in, hooked = host.__dict__.pop(key, (0, 0))
        mixed_in, hooked = mixed_in + change, hooked + change * adapters
        if mixed_in > 0:
            host.__dict__[key] = mixed_in, hooked
        plain = getattr(type(host), "_hf_crouter_plain", type(host))
        host.__class__ = _mixed(plain, hooked > 0) if mixed_in > 0 else plain


def always_on(host: PreTrainedModel, processor: HistoryProcessor, on: bool) -> None:
    """Makes a history active, or no longer, in every `generate` call of its host; of several the newest counts."""
    with _MIXING:
        others = tuple(p for p in host.__dict__.get(ALWAYS_ON, ()) if p is not processor)
        host.__dict__[ALWAYS_ON] = (*others, processor) if on else others
        if not host.__dict__[ALWAYS_ON]:
            del host.__dict__[ALWAYS_ON]


def row_pads(attention_mask: torch.Tensor | None, input_ids: torch.Tensor) -> list[int]:
    """Padding columns at the left of each row.

    Raises:
        InputError: a mask that is not the ids' shape, is padded at the right, has holes or an empty row.
    """
    if attention_mask is None:
        return [0] * len(input_ids)
    if attention_mask.shape != input_ids.shape:
        raise InputError(
            f"attention_mask: expected the shape of input_ids {list(input_ids.shape)} (the whole conversation), "
            f"got {list(attention_mask.shape)}"
        )
    mask = attention_mask.bool().cpu()
    if not mask[:, -1].all():
        raise InputError("attention_mask: expected padding at the left, got padding at the right or an empty row")
    if (mask[:, :-1] & ~mask[:, 1:]).any():
        raise InputError("attention_mask: expected one run of ones a row, got holes")
    return (~mask).sum(1).tolist()


def open_cache(
    host: Any, policy: ContextPolicy, given: Any, input_ids: torch.Tensor, pads: list[int], verified: int
) -> Any:
    """The cache that a call starts on: the compressed one of an earlier turn, or a new one in place of `given`.

    Raises:
        InputError: a cache that already holds uncompressed history, or one of another batch.
    """
    width = input_ids.shape[1]
    if isinstance(given, CompressedCache):
        if len(given.rows) != len(pads):
            raise InputError(f"past_key_values: expected {len(pads)} rows, got {len(given.rows)}")
        if given.has_private_state and given.made_by != policy.key:
            raise InputError(
                "past_key_values: compressed by another crouter, projector or experts than this history's"
            )
        given.made_by, given.true_positions = policy.key, policy.true_positions
        given.follow(input_ids, pads, [verified - pad - policy.window for pad in pads])
        given.rows = tuple(replace(row, prompt=verified - row.pad) for row in given.rows)
        given.discard_partial()
        return given
    if int(given.get_seq_length()):
        raise InputError("past_key_values: expected an empty or a compressed cache, got one with uncompressed history")
    config = host.config.get_text_config(decoder=True)
    if isinstance(given, StaticCache):
        retrieved = policy.retriever.chunks if policy.retriever is not None else 0
        full = int(given.get_max_length())
        longest = full - min(pads)
        if longest < policy.fewest and policy.router is None:
            return given
        room = most = full + retrieved * policy.most_entries  # retrieved chunks may stand beside their entries
        if policy.chunker.same_tokenizer:
            length = policy.chunker.chunk_length
            chunks = max(0, longest - policy.window) // length
            # the prefix is at most what the prompt holds beside its chunks
            prefix = max(
                (policy.prefix(row[pad:].tolist()) or width for row, pad in zip(input_ids, pads, strict=True))
            )
            entries, raw = chunks * policy.most_entries, min(chunks, retrieved) * length
            room = min(pads) + prefix + entries + raw + policy.window + length + DRAFTS
        cache = CompressedStaticCache(config=config, max_cache_len=min(most, room))
    else:
        cache = CompressedDynamicCache(config=config)
        if is_recording(given):
            cache.activate_past_recording()  # assisted decoding armed the cache that this one replaces
    cache.start([Row(pad, prompt=verified - pad) for pad in pads], input_ids, policy.key, policy.true_positions)
    return cache
