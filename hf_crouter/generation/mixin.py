"""The class mixed in front of a host's own: `generate` with a compressed past, for the calls that ask for it.

A call asks for it by a `HistoryProcessor` among its `logits_processor`, or by an always-on one (`attach`). Everything
else goes to the host's own methods unchanged.
"""

from __future__ import annotations

import contextlib
import functools
from collections import deque
from collections.abc import Iterator
from contextvars import ContextVar
from threading import Lock
from types import MappingProxyType
from typing import Any

import torch
from transformers import LogitsProcessorList, PreTrainedModel

from ..cache.kv_cache import CompressedCache
from ..cache.masks import LayerMasks, over_buffers, window_masks
from ..cache.policy import ContextPolicy
from ..cache.prefill import prefill
from ..errors import InputError
from ..hosts.rope import rope_switch
from ..types import Row
from ..utils.batching import left_pads
from .call import CALLS, Call, EndsNoted, HistoryProcessor, RawScores, active_call, with_raw_scores
from .drafts import trim_drafts
from .opening import open_cache
from .pickling import plain_reduction
from .start import decide, refuse_early

ALWAYS_ON = "_hf_crouter_always_on"
MIXED = "_hf_crouter_mixed"
SKIPPED = "compression was skipped: expected a generate that prepares its inputs by the host, got one that does not"
BATCHES = "generate_batch: expected generate, got continuous batching, which reads every request whole"
_MIXING = Lock()
_LEAVING: deque[tuple[PreTrainedModel, bool]] = deque()
_BATCH: ContextVar[bool] = ContextVar("hf_crouter_batch", default=False)  # its requests were looked at


class CompressedGenerationMixin:
    """Overrides of `generate` and `prepare_inputs_for_generation`, and of the private hooks between them."""

    def generate(self, inputs=None, generation_config=None, logits_processor=None, *args, **kwargs):
        """See the host's own `generate`; with a `HistoryProcessor` for this host the past is compressed."""
        always = self.__dict__.get(ALWAYS_ON) or (None,)
        processor = next(
            (p for p in logits_processor or () if isinstance(p, HistoryProcessor) and p.host is self and p.attached),
            always[-1],
        )
        call = None
        if processor is not None:
            ids = inputs if inputs is not None else kwargs.get("input_ids")
            is_ids = isinstance(ids, torch.Tensor) and ids.ndim == 2 and not ids.is_floating_point()
            call = Call(processor, ids if is_ids else None, kwargs)
            if not any(p is processor for p in logits_processor or ()):  # always on
                logits_processor = LogitsProcessorList([*(logits_processor or ()), processor])
            processor.started()
        token = CALLS.set(MappingProxyType({**CALLS.get(), id(self): call}))
        try:
            with _watched(self, call) if kwargs.get("custom_generate") is not None else contextlib.nullcontext():
                result = super().generate(inputs, generation_config, logits_processor, *args, **kwargs)  # pyright: ignore
        finally:
            CALLS.reset(token)
            if call is not None:
                call.open.close()
                call.processor.policy.serve(None)
        sequences = result if isinstance(result, torch.Tensor) else getattr(result, "sequences", None)
        if call is not None and call.plain and sequences is not None:
            call.processor.left_alone(sequences)
        elif call is not None and sequences is not None:
            if not call.steps and sequences.shape[1] > call.processor.policy.fewest:
                raise InputError(SKIPPED)
            if call.cache is not None:
                call.cache.mark_ends(call.ends())
                steps = (call.steps, sequences.shape[1] - call.read)
                call.processor.finished(call.cache, sequences, call.states or (), steps)
        return result

    def generate_batch(self, inputs, generation_config=None, *args, **kwargs):
        """See the host's own; with a history it is refused where something would be compressed."""
        config = generation_config or self.generation_config  # pyright: ignore[reportAttributeAccessIssue]
        new = kwargs.get("max_new_tokens") or config.max_new_tokens or 0
        policy = _serving_policy(self)
        if policy is not None:
            for row in inputs or ():
                prefix = policy.raw_prefix(torch.as_tensor(row), len(row)) if len(row) + new > policy.fewest else 0
                if len(row) + new - 1 - prefix >= policy.fewest or policy.router is not None:
                    raise InputError(BATCHES)
        token = _BATCH.set(True)
        try:
            return super().generate_batch(inputs, generation_config, *args, **kwargs)  # pyright: ignore
        finally:
            _BATCH.reset(token)

    def init_continuous_batching(self, *args, **kwargs):
        """See the host's own; refused while a history is always on, since the requests are not known yet."""
        if not _BATCH.get() and _serving_policy(self) is not None:
            raise InputError(BATCHES)
        return super().init_continuous_batching(*args, **kwargs)  # pyright: ignore

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

        call = active_call(self)  # pyright: ignore[reportArgumentType]
        if call is None:
            if isinstance(past_key_values, CompressedCache) and past_key_values.has_private_state:
                raise InputError("past_key_values: holds a compressed past; pass its CompressedHistory as well")
            return host_inputs()
        if call.plain:
            return host_inputs()
        policy, first, cache = call.processor.policy, not call.steps, past_key_values
        width = input_ids.shape[1]
        verified = min(width, call.prompt or width)
        call.steps += 1
        if first:
            call.read = verified
            pads = left_pads(attention_mask, input_ids)
            cache = open_cache(self, call, past_key_values, input_ids, pads, verified)
        if call.cache is not None and cache is not call.cache:
            got = type(cache).__name__
            raise InputError(f"host: expected the slots in the cache that it was given, got another one back ({got})")
        if not isinstance(cache, CompressedCache):
            return host_inputs()  # a static cache too small ever to need compression
        call.cache = cache
        main = None if first else width - cache.width
        if not first:
            verified = cache.width + 1  # of the new tokens the first is decided, the others are drafts
        held = cache.layout.shape[1]
        keep = cache.compressed or not call.own_positions
        main, kept = prefill(self, policy, cache, input_ids, verified, main, call.ends, keep=keep)
        policy.serve(cache.experts[:, -main:])
        for state in call.states or ():
            state.ahead(cache, input_ids)
        if not cache.compressed and kept == held:
            inputs = host_inputs(cache=cache)
            call.own_positions |= "position_ids" in kwargs and inputs.get("position_ids") is None
            if inputs.get("past_key_values") is not cache:  # a host that begins anew (longrope past its switch)
                cache.clear()
                if inputs["input_ids"].shape[1] != width:
                    inputs = host_inputs(length=None, cache=cache)
            return {**inputs, "past_key_values": cache}
        mask, positions = window_masks(self, cache, main, input_ids.device)
        if "position_ids" in kwargs:
            kwargs["position_ids"] = positions
        if isinstance(mask, LayerMasks):
            inputs = host_inputs(input_ids[:, -main:], None, cache, None)
            inputs["attention_mask"] = call.given(self, cache, mask)
        else:
            inputs = host_inputs(input_ids[:, -main:], None, cache, over_buffers(self, cache, mask))
        inputs["past_key_values"] = cache
        if "position_ids" in kwargs and inputs.get("position_ids") is None:
            inputs["position_ids"] = positions  # a host that would count slots, padding among them
        return inputs

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, generation_mode, *args, **kwargs):
        """See the host's own; here all is known that decides how a call is read."""
        call = active_call(self)  # pyright: ignore[reportArgumentType]
        if call is not None:
            decide(self, call, generation_config, model_kwargs, generation_mode)
        super()._prepare_cache_for_generation(generation_config, model_kwargs, generation_mode, *args, **kwargs)  # pyright: ignore

    def _validate_generation_mode(self, generation_mode, generation_config, *args, **kwargs):
        """See the host's own; pictures, and ways that transformers loads from a hub, are refused before that work."""
        call = active_call(self)  # pyright: ignore[reportArgumentType]
        if call is not None:
            refuse_early(self, call, generation_config, generation_mode)
        super()._validate_generation_mode(generation_mode, generation_config, *args, **kwargs)  # pyright: ignore

    def _get_logits_processor(self, *args, **kwargs):
        """See the host's own; a history that changes scores must know what others did to them before."""
        processors = super()._get_logits_processor(*args, **kwargs)  # pyright: ignore
        call = active_call(self)  # pyright: ignore[reportArgumentType]
        if call is None or call.plain or not call.processor.changes_scores:
            return processors
        return with_raw_scores(processors, call)

    def _get_stopping_criteria(self, *args, **kwargs):
        """See the host's own; rows of a batch that end early are not read on."""
        criteria = super()._get_stopping_criteria(*args, **kwargs)  # pyright: ignore
        call = active_call(self)  # pyright: ignore[reportArgumentType]
        return EndsNoted(criteria, call) if call is not None and call.ends_apart else criteria

    def __reduce_ex__(self, protocol):
        """A copied or pickled host is the plain one."""
        return plain_reduction(super().__reduce_ex__(protocol))

    def _get_candidate_generator(self, input_ids, model_kwargs, **kwargs):
        """See the host's own; drafts end before the next compaction, and are made without the history's processor."""
        call = active_call(self)  # pyright: ignore[reportArgumentType]
        if call is not None and kwargs.get("logits_processor") is not None:
            # an assistant has its own past; prompt lookup asks for made-up scores
            others = (p for p in kwargs["logits_processor"]
                      if getattr(p, "host", None) is not self and not isinstance(p, RawScores))  # fmt: skip
            kwargs["logits_processor"] = LogitsProcessorList(others)
        generator = super()._get_candidate_generator(input_ids=input_ids, model_kwargs=model_kwargs, **kwargs)  # pyright: ignore
        if call is None or call.plain:
            return generator
        first = Row(left_pads(model_kwargs.get("attention_mask"), input_ids)[0])

        def row() -> Row:
            return call.cache.rows[0] if call.cache else first

        return trim_drafts(generator, call.processor.policy, row, rope_switch(self))


def _serving_policy(host: Any) -> ContextPolicy | None:
    """Of the history that reads the host's past now: of the running call, or always on."""
    call, always = active_call(host), host.__dict__.get(ALWAYS_ON)
    return call.processor.policy if call is not None else always[-1].policy if always else None


@contextlib.contextmanager
def _watched(host: Any, call: Call | None) -> Iterator[None]:
    """A block in which a `custom_generate` may not read a long text before it has its inputs prepared."""

    def check(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        mine = call is not None and active_call(host) is call and not call.plain and not call.steps
        if mine and isinstance(ids, torch.Tensor) and ids.shape[-1] >= call.processor.policy.fewest:  # pyright: ignore
            raise InputError(SKIPPED)

    handle = host.register_forward_pre_hook(check, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def mix_in(host: PreTrainedModel, adapters: bool = False) -> None:
    """Puts the mixin in front of the host's class; counted, so every `mix_in` needs its `mix_out`.

    Args:
        host: the plain host.
        adapters: hooks of adapters are on its layers.
    """
    with _MIXING:
        _count(host, 1, adapters)
    _settle()


def mix_out(host: PreTrainedModel, adapters: bool = False) -> None:
    """Undoes one `mix_in` of the same kind; the last one gives the host its own class back.

    The garbage collector may call it at any point, also inside a `mix_in`: then that one does the work.
    """
    _LEAVING.append((host, adapters))
    _settle()


def _settle() -> None:
    while _LEAVING and _MIXING.acquire(blocking=False):
        try:
            while _LEAVING:
                host, adapters = _LEAVING.popleft()
                _count(host, -1, adapters)
        finally:
            _MIXING.release()


@functools.cache  # compiled graphs are guarded by the class, but not by hooks: a host that has them needs its own
def _mixed(cls: type, adapters: bool) -> type:
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "_hf_crouter_plain": cls}
    return type(cls.__name__, (CompressedGenerationMixin, cls), names)


def _count(host: PreTrainedModel, change: int, adapters: bool) -> None:
    mixed_in, hooked = host.__dict__.get(MIXED, (0, 0))
    mixed_in, hooked = mixed_in + change, hooked + change * adapters
    plain = getattr(type(host), "_hf_crouter_plain", type(host))
    if mixed_in > 0:
        host.__dict__[MIXED] = mixed_in, hooked
    else:
        host.__dict__.pop(MIXED, None)
    host.__class__ = _mixed(plain, hooked > 0) if mixed_in > 0 else plain


def always_on(host: PreTrainedModel, processor: HistoryProcessor, on: bool) -> None:
    """Makes a history active, or no longer, in every `generate` call of its host; of several the newest counts."""
    with _MIXING:
        others = tuple(p for p in host.__dict__.get(ALWAYS_ON, ()) if p is not processor)
        host.__dict__[ALWAYS_ON] = (*others, processor) if on else others
        if not host.__dict__[ALWAYS_ON]:
            del host.__dict__[ALWAYS_ON]
    _settle()
