"""Bytes of weights that do not change with the dtype they are loaded in."""

from __future__ import annotations

import torch

from ..errors import InputError


def bfloat16_bytes(weight: torch.Tensor) -> bytes:
    """Bytes of a weight, cast to bfloat16.

    Raises:
        InputError: it is not in memory.
    """
    if weight.is_meta:
        raise InputError("fingerprint: expected weights in memory, got a model whose weights are offloaded")
    return weight.detach().to(torch.bfloat16).cpu().contiguous().view(torch.int16).numpy().tobytes()
