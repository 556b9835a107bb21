"""Where a host's inputs must stand."""

from __future__ import annotations

from typing import Any

import torch


def input_device(host: Any) -> torch.device:
    """Device of input ids and embeddings: the embedding's own, or where its hook runs it if it is offloaded.

    Args:
        host: the plain host; all in memory, dispatched or offloaded by accelerate.
    """
    embedding = host.get_input_embeddings()
    hook = getattr(embedding, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    if device is not None:
        return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    weight = embedding.weight
    if weight.device.type != "meta":
        return weight.device
    first = next((p.device for p in host.parameters() if p.device.type != "meta"), None)
    return first or torch.device("cpu")
