"""Fits the gate of copying: by the likelihood of the mixture, on recorded passes of a host.

Axes: `N` positions, `F` features, `K` sources. What was recorded there suffices: neither host nor archive is run.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import InputError
from ..ngram.gate import Gate, GateConfig

_NEVER = 50.0  # nats by which the host outweighs every source in a gate that copies nothing
_LEAST = 1e-30  # probability that stands for none: its logarithm is finite
_BLOCK = 1 << 18  # positions that are evaluated at once


def mixture_log_likelihood(
    gate: nn.Module, features: torch.Tensor, available: torch.Tensor, copied: torch.Tensor, host: torch.Tensor
) -> torch.Tensor:
    """Log-probability `[N]` of what came, in nats.

    Args:
        gate: gives log-weights `[N, 1 + K]`, the host's first.
        features: `[N, F]`, from `gate_features`.
        available: `[N, K]`, bool: the source has candidates.
        copied: `[N, K]`, probability that each source gave to what came.
        host: `[N]`, the host's log-probability of it.
    """
    weights = gate(features.float(), available)
    added = (weights[:, 1:].exp() * copied).sum(-1)
    return torch.logaddexp(weights[:, 0] + host, added.clamp(min=_LEAST).log())


def fit_weights(
    gate: nn.Module,
    features: torch.Tensor,
    available: torch.Tensor,
    copied: torch.Tensor,
    host: torch.Tensor,
    groups: np.ndarray,
    *,
    steps: int = 600,
    batch_size: int = 65_536,
    learning_rate: float = 1e-2,
    held_out: float = 0.1,
    every: int = 25,
    patience: int = 8,
    seed: int = 0,
) -> dict[str, Any]:
    """Fits anything that gives log-weights, in place, and keeps what served the held-out groups best.

    Args:
        gate: on the device of the tensors.
        features: `[N, F]`.
        available: `[N, K]`, bool.
        copied: `[N, K]`.
        host: `[N]`.
        groups: `[N]`, integers; positions of one group (a package, a record) are held out together.
        steps: at most.
        batch_size: positions a step.
        learning_rate: of AdamW at the start; it falls to 0 along a cosine.
        held_out: share of the groups.
        every: steps between two looks at the held-out positions.
        patience: looks without a gain after which it stops.
        seed: of the held-out groups and the batches.

    Returns:
        Counts, and the gain over the host in nats/token on both sides: `train_gain`, `held_out_gain`.

    Raises:
        InputError: fewer than two groups.
    """
    generator = np.random.default_rng(seed)
    names = generator.permutation(np.unique(groups))
    if len(names) < 2:
        raise InputError(f"gate: expected positions of at least two groups, got {len(names)}")
    outside = np.isin(groups, names[: max(1, round(held_out * len(names)))])
    parts = [torch.from_numpy(np.flatnonzero(mask)).to(host.device) for mask in (~outside, outside)]
    data = features, available, copied, host

    @torch.no_grad()
    def gain(rows: torch.Tensor) -> float:
        total = 0.0
        for some in rows.split(_BLOCK):
            total += float((mixture_log_likelihood(gate, *(x[some] for x in data)) - host[some]).double().sum())
        return total / len(rows)

    train, valid = parts
    optimizer = torch.optim.AdamW(gate.parameters(), lr=learning_rate, weight_decay=1e-3)
    shuffle = torch.Generator(device=host.device).manual_seed(seed)
    best, best_step, state = -math.inf, 0, {}
    for step in range(steps + 1):
        if step % every == 0 or step == steps:
            now = gain(valid)
            if now > best:
                best, best_step = now, step
                state = {name: value.detach().clone() for name, value in gate.state_dict().items()}
            if step - best_step > patience * every or step == steps:
                break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        some = train
        if len(train) > batch_size:
            some = train[torch.randint(len(train), (batch_size,), generator=shuffle, device=host.device)]
        loss = -mixture_log_likelihood(gate, *(x[some] for x in data)).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    gate.load_state_dict(state)
    return {"places": len(host), "groups": len(names), "held_out_places": len(valid), "steps": best_step,
            "train_gain": gain(train), "held_out_gain": best}  # fmt: skip


def fit_gate(
    features: torch.Tensor,
    available: torch.Tensor,
    copied: torch.Tensor,
    host: torch.Tensor,
    groups: np.ndarray,
    *,
    config: GateConfig | None = None,
    seed: int = 0,
    **options: Any,
) -> tuple[Gate, dict[str, Any]]:
    """A gate fitted to recorded positions, on the CPU, and the record of the fit, which it carries as well.

    One that does not help the held-out groups is replaced by one that never copies: weight 0 is always there.

    Args:
        features: `[N, F]`, from `gate_features`; float16 will do.
        available: `[N, K]`, bool: the source has candidates.
        copied: `[N, K]`, probability that each source gave to the token that came.
        host: `[N]`, the host's log-probability of it, float32.
        groups: `[N]`, integers; positions of one group are held out together.
        config: of the gate, with the host that it is for.
        seed: of its weights, the held-out groups and the batches.
        **options: of `fit_weights`.

    Raises:
        InputError: fewer than two groups.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        gate = Gate(config).to(host.device)
    record = fit_weights(gate, features, available, copied, host, groups, seed=seed, **options)
    if record["held_out_gain"] <= 0:
        with torch.no_grad():
            gate.down.weight.zero_()
            gate.down.bias.zero_()[0] = _NEVER
        record |= {"train_gain": 0.0, "held_out_gain": 0.0}
    record["copies"] = record["held_out_gain"] > 0
    gate.config = replace(gate.config, training={**gate.config.training, **record})
    return gate.cpu().eval(), record
