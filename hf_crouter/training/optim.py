"""Optimisers and schedule: Muon for matrices, AdamW for the rest; warm up, hold, decay to zero."""

from __future__ import annotations

import torch
from torch import nn


def build_optimizers(
    module: nn.Module, learning_rate: float, weight_decay: float = 0.01
) -> list[torch.optim.Optimizer]:
    """Muon for the weights of linear layers, AdamW for embeddings, heads, norms and learned inputs.

    Muon's update is scaled to AdamW's root mean square (`match_rms_adamw`), so one learning rate serves both.

    Args:
        module: only parameters with `requires_grad` are taken.
        learning_rate: peak rate of both.
        weight_decay: Muon's decoupled decay; AdamW's parameters are not decayed.

    Returns:
        One or two optimisers; none of them empty.

    Raises:
        ValueError: nothing is trainable.

    Source: Muon as in torch.optim.Muon; rate matching, arXiv 2502.16982.
    """
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    matrices, rest, seen = [], [], set()
    linear = {id(m.weight) for m in module.modules() if isinstance(m, nn.Linear)} - embeddings
    for parameter in module.parameters():
        if not parameter.requires_grad or id(parameter) in seen:
            continue
        seen.add(id(parameter))
        (matrices if id(parameter) in linear else rest).append(parameter)
    if not seen:
        raise ValueError("expected trainable parameters, got none")
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        optimizers.append(
            torch.optim.Muon(
                matrices, lr=learning_rate, momentum=0.95, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
            )
        )
    if rest:
        fused = all(parameter.is_cuda for parameter in rest)
        optimizers.append(
            torch.optim.AdamW(rest, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=fused or None)
        )
    return optimizers


def learning_rate_factor(step: int, progress: float, warmup_steps: int) -> float:
    """Share of the peak rate at a step: linear warm-up, flat to half the run, then linear to 2%.

    Args:
        step: steps done.
        progress: share of the box used, 0 to 1.
        warmup_steps: steps of the warm-up.
    """
    warmup = min(1.0, (step + 1) / max(1, warmup_steps))
    return warmup * (1.0 if progress < 0.5 else max(0.02, 2.0 * (1.0 - progress)))
