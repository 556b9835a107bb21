"""Rotary factors that depend on how long a text is: slots of one cache must all be rotated under one set."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

KIND = "longrope"  # short factors up to the positions of pretraining, long ones beyond


def rope_switch(host_or_config: Any) -> int | None:
    """Positions up to which a host rotates by its short factors, beyond which by its long ones; None for one set.

    Args:
        host_or_config: a decoder of transformers or its configuration.
    """
    config = getattr(host_or_config, "config", host_or_config)
    config = config.get_text_config(decoder=True)
    parameters = getattr(config, "rope_parameters", None) or {}
    sets = [parameters, *(value for value in parameters.values() if isinstance(value, Mapping))]
    switches = [
        some.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
        for some in sets
        if some.get("rope_type", some.get("type")) == KIND
    ]
    return min((switch for switch in switches if switch), default=None)


@contextlib.contextmanager
def rotated_as_of(host: Any, slots: int) -> Iterator[None]:
    """A block in which forwards over the first of `slots` slots rotate by the factors that all of them call for.

    The rotary modules of transformers choose the set by the largest position that they are shown: they are shown the
    last one as well, and what they make of it is left out.
    """
    switch = rope_switch(host)
    modules = [m for m in host.modules() if _chooses(m)] if switch is not None and slots > switch else []
    handles: list[Any] = []
    for module in modules:

        def show(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            positions = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
            last = torch.full_like(positions[..., :1], slots - 1)
            shown = torch.cat([positions, last], -1)
            if "position_ids" in kwargs:
                return args, {**kwargs, "position_ids": shown}
            return (args[0], shown, *args[2:]), kwargs

        def leave_out(module: nn.Module, args: Any, output: tuple[torch.Tensor, torch.Tensor]) -> Any:
            return tuple(part[..., :-1, :] for part in output)

        handles += [
            module.register_forward_pre_hook(show, with_kwargs=True),
            module.register_forward_hook(leave_out),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _chooses(module: nn.Module) -> bool:
    kind = getattr(module, "rope_type", None)
    return kind == KIND or (isinstance(kind, Mapping) and KIND in kind.values())
