"""A host's attention, met where all families pass: in the function that transformers' modules look up by name.

For the time of a block the host's entry in that table (`ALL_ATTENTION_FUNCTIONS`) is wrapped: what stands before a
layer's attention can be looked at, and its mask replaced by one of that layer's own. Other threads and other models
pass through it unchanged.

A mask of one step in which all layers' masks are stacked, `[B, layers, 1, S]`, needs no block around it but the
wrapper alone: so compiled decoding, which must not look anything up, reads its layer's share of it.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
from torch.nn.attention.bias import CausalBias
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import InputError

EAGER = "eager"  # of each modeling file its own; not in the table


@dataclass(frozen=True, eq=False)
class Attention:
    """What one layer's attention gets in one forward.

    Attributes:
        layer: its number.
        queries: `[B, query heads, T, D]`, rotated where the host rotates them.
        keys: of all slots, `[B, heads, S, D]`; of the last `T` as well.
        values: likewise.
        outputs: what it gave, `[B, T, query heads, D]`.
        scaling: factor on the products of queries and keys.
        softcap: a product s becomes `softcap * tanh(s / softcap)`; None: it stays.
        sinks: a logit beside the products that takes attention but has no value, `[query heads]`; None: there is none.
    """

    layer: int
    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    outputs: torch.Tensor
    scaling: float
    softcap: float | None = None
    sinks: torch.Tensor | None = None


def sliding_layers(host: Any) -> tuple[bool, ...]:
    """Which layers of a host attend to a sliding window alone; one a layer."""
    config = host.config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return (getattr(config, "sliding_window", None) is not None,) * config.num_hidden_layers
    return tuple(kind == "sliding_attention" for kind in kinds)


MaskOf = Callable[[int, int], torch.Tensor | None]
"""Mask `[B, 1, T, keys]` of a layer's number and of so many keys; None: every query sees every key."""


@dataclass(frozen=True, eq=False)
class _Block:
    modules: frozenset[int]
    mask_of: MaskOf | None
    seen: Callable[[Attention], None] | None


_BLOCK: ContextVar[_Block | None] = ContextVar("hf_crouter_attention", default=None)
_LOCK = Lock()
_WRAPPED: dict[str, tuple[int, Callable | None]] = {}  # blocks that are open, and what stood in the local table


@contextlib.contextmanager
def attention_met(
    host: Any, mask_of: MaskOf | None = None, seen: Callable[[Attention], None] | None = None
) -> Iterator[None]:
    """A block in which this thread's forwards of the host take their masks from `mask_of` and show `seen` each layer.

    Args:
        host: the plain host.
        mask_of: None: the masks that the host makes.
        seen: called after a layer's attention; None: nobody looks.

    Raises:
        InputError: at the end, if `seen` was never called: the host's attention does not pass here.
    """
    count = 0

    def counted(attention: Attention) -> None:
        nonlocal count
        count += 1
        if seen is not None:
            seen(attention)

    block = _Block(frozenset(id(module) for module in host.modules()), mask_of, counted if seen else None)
    token = _BLOCK.set(block)
    try:
        with attention_wrapped(host):
            yield
    finally:
        _BLOCK.reset(token)
    if seen is not None and not count:
        raise InputError(
            f"host: expected attention through transformers' common interface, got {type(host).__name__}, whose own "
            "hides its queries"
        )


@contextlib.contextmanager
def attention_wrapped(host: Any) -> Iterator[None]:
    """A block in which stacked masks are read; others stay what they are."""
    name = host.config.get_text_config(decoder=True)._attn_implementation
    _wrap(name)
    try:
        yield
    finally:
        _unwrap(name)


def _wrap(name: str) -> None:
    with _LOCK:
        count, before = _WRAPPED.get(name, (0, None))
        if not count:
            before = ALL_ATTENTION_FUNCTIONS._local_mapping.get(name)
            plain = before if name == EAGER else ALL_ATTENTION_FUNCTIONS[name]
            ALL_ATTENTION_FUNCTIONS[name] = _meeting(plain, name == EAGER)
        _WRAPPED[name] = count + 1, before


def _unwrap(name: str) -> None:
    with _LOCK:
        count, before = _WRAPPED.pop(name)
        if count > 1:
            _WRAPPED[name] = count - 1, before
        elif before is not None:
            ALL_ATTENTION_FUNCTIONS[name] = before
        else:
            del ALL_ATTENTION_FUNCTIONS[name]  # of the local table, where the wrapper stood before the shared one


def _meeting(plain: Callable | None, eager: bool) -> Callable:
    def attention(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any = None,
        *args: Any,
        **kwargs: Any,
    ):
        function = plain or sys.modules[type(module).__module__].eager_attention_forward
        if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 4 and attention_mask.shape[1] > 1:
            number = module.layer_idx  # a stack: transformers' own masks have one for all
            attention_mask = attention_mask[:, number : number + 1, :, : key.shape[2]]
            return function(module, query, key, value, attention_mask, *args, **kwargs)
        block = _BLOCK.get()
        if block is None or id(module) not in block.modules:
            return function(module, query, key, value, attention_mask, *args, **kwargs)
        if block.mask_of is not None:
            attention_mask = block.mask_of(module.layer_idx, key.shape[2])
            if attention_mask is None:
                if eager:  # some families' own expect one
                    attention_mask = query.new_zeros(1, 1, query.shape[2], key.shape[2])
            elif not isinstance(attention_mask, CausalBias):  # which lies on no device
                attention_mask = attention_mask.to(query.device)  # of a host spread over several
        result = function(module, query, key, value, attention_mask, *args, **kwargs)
        if block.seen is not None:
            scaling = kwargs.get("scaling")
            scaling = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
            # which eager attention alone knows of; sdpa is given them by some families, and leaves them out
            softcap, sinks = (kwargs.get(name) if eager else None for name in ("softcap", "s_aux"))
            block.seen(Attention(module.layer_idx, query, key, value, result[0], scaling, softcap, sinks))
        return result

    return attention
