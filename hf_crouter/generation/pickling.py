"""A host that is copied or pickled while a history reads it is its plain self in the copy."""

from __future__ import annotations

import copy
import copyreg
from typing import Any

from torch import nn

OURS = "of_hf_crouter"  # an attribute of hooks that a history has put on a host's modules
PRIVATE = "_hf_crouter_"


def plain_reduction(reduction: Any) -> Any:
    """What `object.__reduce_ex__` gives for a host, with its own class and without a history's traces.

    Args:
        reduction: of a host with the mixin in front of its class.
    """
    _, (cls, *_), state, *more = reduction
    state = {key: value for key, value in state.items() if not key.startswith(PRIVATE)}
    seen: dict[int, nn.Module] = {}
    state["_modules"] = {name: _without_hooks(module, seen) for name, module in state["_modules"].items()}
    # `pickle` itself insists on an object's own class in `__newobj__`
    return copyreg._reconstructor, (cls._hf_crouter_plain, object, None), state, *more  # pyright: ignore


def _without_hooks(module: nn.Module | None, seen: dict[int, nn.Module]) -> nn.Module | None:
    """The module; where it or one below it has hooks of a history, a twin with the same weights and without them."""
    if module is None or not any(_is_ours(hook) for m in module.modules() for hook in m._forward_hooks.values()):
        return module
    if id(module) not in seen:
        twin = seen[id(module)] = copy.copy(module)
        twin._forward_hooks = type(module._forward_hooks)(
            (key, hook) for key, hook in module._forward_hooks.items() if not _is_ours(hook)
        )
        twin._modules = {name: _without_hooks(child, seen) for name, child in module._modules.items()}
    return seen[id(module)]


def _is_ours(hook: Any) -> bool:
    return getattr(hook, OURS, False)
