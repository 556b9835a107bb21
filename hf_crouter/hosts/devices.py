"""Where a host's inputs must stand, and what brings in weights that are elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


def input_device(host: Any) -> torch.device:
    """Device of input ids and embeddings: the embedding's own, or where its hook runs it if it is offloaded.

    Args:
        host: the plain host; all in memory, dispatched or offloaded by accelerate.
    """
    embedding = plain_module(host.get_input_embeddings())
    if embedding.weight.device.type != "meta":
        return embedding.weight.device
    path = next((name for name, module in host.named_modules() if module is embedding), "")
    devices = (getattr(hook, "execution_device", None) for _, hook in offload_hooks(host, path))
    device = next((device for device in devices if device is not None), None)
    if device is not None:
        return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    first = next((p.device for p in host.parameters() if p.device.type != "meta"), None)
    return first or torch.device("cpu")


def plain_module(module: Any) -> Any:
    """The host's own module inside what adapters have put around it."""
    while (inner := getattr(module, "base_layer", getattr(module, "original_module", None))) is not None:
        module = inner
    return module


def offload_hooks(host: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Accelerate's hooks of a module and of those around it, innermost first, each with the path from there.

    Args:
        host: the plain host.
        path: of the module in it.
    """
    parts = path.split(".") if path else []
    for depth in range(len(parts), -1, -1):
        for hook in _hooks(host.get_submodule(".".join(parts[:depth]))):
            yield ".".join(parts[depth:]), hook


def _hooks(module: Any) -> list[Any]:
    """A module's own hooks; those in line nest."""
    pending, found = [getattr(module, "_hf_hook", None)], []
    while pending:
        hook = pending.pop(0)
        pending[:0] = getattr(hook, "hooks", ())
        found += [hook] if hook is not None and not hasattr(hook, "hooks") else []
    return found
