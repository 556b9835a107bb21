"""The queries of a host's layers, caught where they meet the keys: in the attention function that all families share.

transformers' attention modules look their function up by name at every call (`ALL_ATTENTION_FUNCTIONS`). For the time
of a block the host's entry there is wrapped; other threads and other models pass through it unchanged.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import InputError

EAGER = "eager"  # of each modeling file its own; not in the table


@dataclass
class Caught:
    """Queries of one forward, by number of the layer.

    Attributes:
        queries: `[B, query heads, T, D]`, rotated where the host rotates them.
        scaling: factor on their products with the keys.
        modules: attention modules whose queries are wanted.
    """

    modules: frozenset[int] = frozenset()
    queries: dict[int, torch.Tensor] = field(default_factory=dict)
    scaling: dict[int, float] = field(default_factory=dict)


_CAUGHT: ContextVar[Caught | None] = ContextVar("hf_crouter_caught", default=None)
_LOCK = Lock()
_WRAPPED: dict[str, tuple[int, Callable | None]] = {}  # blocks that are open, and what stood in the local table


@contextlib.contextmanager
def caught_queries(host: Any) -> Iterator[Caught]:
    """A block in which this thread's forwards of the host leave their queries; of several the last one's.

    Raises:
        InputError: after a block in which no layer left any: the host's attention does not pass through the common
            function.
    """
    caught = Caught(frozenset(id(module) for module in host.modules()))
    token = _CAUGHT.set(caught)
    name = host.config.get_text_config(decoder=True)._attn_implementation
    _wrap(name)
    try:
        yield caught
    finally:
        _unwrap(name)
        _CAUGHT.reset(token)
    if not caught.queries:
        raise InputError(
            f"host: expected attention through transformers' common interface, got {type(host).__name__}, whose own "
            "hides its queries"
        )


def _wrap(name: str) -> None:
    with _LOCK:
        count, before = _WRAPPED.get(name, (0, None))
        if not count:
            before = ALL_ATTENTION_FUNCTIONS._local_mapping.get(name)
            ALL_ATTENTION_FUNCTIONS[name] = _catching(before if name == EAGER else ALL_ATTENTION_FUNCTIONS[name])
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


def _catching(plain: Callable | None) -> Callable:
    def attention(module: Any, query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any):
        caught = _CAUGHT.get()
        if caught is not None and id(module) in caught.modules:
            scaling = kwargs.get("scaling")
            caught.queries[module.layer_idx] = query
            caught.scaling[module.layer_idx] = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        function = plain or sys.modules[type(module).__module__].eager_attention_forward
        return function(module, query, key, *args, **kwargs)

    return attention
