"""Fits a recall scorer to what recalling each chunk gained.

A gain is what the loss of the tokens to come fell by when the chunk stood raw again; only differences within a group
(the chunks of one place in one text) count. Loss: cross-entropy from the softmax of a group's gains to the softmax of
its scores, so that the best chunks come first and the others matter little.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..errors import InputError
from ..ngram.scorers import FEATURES, LearnedScorer, ScorerConfig


def fit(
    features: np.ndarray,
    gains: np.ndarray,
    groups: np.ndarray,
    *,
    sources: np.ndarray | None = None,
    k: int = 2,
    hidden_size: int = 16,
    steps: int = 400,
    learning_rate: float = 1e-2,
    weight_decay: float = 1e-2,
    held_out: float = 0.25,
    seed: int = 0,
    names: Sequence[str] = FEATURES,
    training: dict[str, Any] | None = None,
) -> LearnedScorer:
    """A scorer for chunks; of all steps the one whose top `k` gain most in the groups that are kept out.

    Args:
        features: float32 `[N, F]` of many groups, as `hf_crouter.ngram.scorers.features` gives them.
        gains: nats that recalling each chunk brings, `[N]`.
        groups: which chunks compete, integers `[N]`.
        sources: document or package of each chunk, integers `[N]`: kept out whole; None: each group by itself.
        k: chunks recalled, for the choice of the step.
        hidden_size: width of the hidden layer.
        steps: of AdamW, each on all groups.
        learning_rate: at the start; falls to 0 as a cosine.
        weight_decay: of AdamW.
        held_out: share of the sources kept out, 0 (the last step counts) to below 1.
        seed: of the weights and of the sources kept out.
        names: of the features; a scorer of others than `FEATURES` can be compared but not loaded.
        training: more for the record in the scorer's configuration.

    Raises:
        InputError: shapes that do not belong together, values that are not finite, or nothing to choose from.
    """
    features, gains, groups = np.asarray(features, np.float32), np.asarray(gains, np.float64), np.asarray(groups)
    sources = groups if sources is None else np.asarray(sources)
    if features.ndim != 2 or features.shape[1] != len(names):
        raise InputError(f"features: expected [N, {len(names)}], got {list(features.shape)}")
    if not len(features) == len(gains) == len(groups) == len(sources):
        sizes = [len(values) for values in (features, gains, groups, sources)]
        raise InputError(f"features, gains, groups, sources: expected one length, got {sizes}")
    if not (np.isfinite(features).all() and np.isfinite(gains).all()):
        raise InputError("features and gains: expected finite numbers, got others")
    every = np.unique(sources)
    kept_out = np.random.default_rng(seed).permutation(every)[: int(held_out * len(every))]
    test = np.isin(sources, kept_out)
    if np.unique(groups[~test], return_counts=True)[1].max(initial=0) < 2:
        raise InputError("groups: expected at least one of two chunks or more to fit on, got none")
    inputs, (of, count) = torch.from_numpy(features[~test]), _numbered(groups[~test])
    target = _softmax(torch.from_numpy(gains[~test] / max(_spread(gains[~test], of.numpy()), 1e-9)), of, count)[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        scorer = LearnedScorer(ScorerConfig(hidden_size, tuple(names)))
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    best, weights = -np.inf, copy.deepcopy(scorer.state_dict())
    for step in range(steps):
        loss = -(target * _softmax(scorer(inputs).double(), of, count)[1]).sum() / count
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if test.any() and (step % 20 == 19 or step == steps - 1):
            share = top_share(_scores(scorer, features[test]), gains[test], groups[test], k)
            if share > best:
                best, weights = share, copy.deepcopy(scorer.state_dict())
    if test.any():
        scorer.load_state_dict(weights)
    record = {
        "k": k, "groups": len(np.unique(groups)), "chunks": len(groups), "steps": steps, "seed": seed,
        "share.fitted": top_share(_scores(scorer, features[~test]), gains[~test], groups[~test], k),
        **({"share.held_out": best} if test.any() else {}), **(training or {}),
    }  # fmt: skip
    scorer.config = ScorerConfig(hidden_size, tuple(names), record)
    return scorer.eval()


def top_share(scores: np.ndarray, gains: np.ndarray, groups: np.ndarray, k: int) -> float:
    """What the `k` chunks of highest score gain, of what the best `k` gain; sums over groups of more than `k`."""
    taken = possible = 0.0
    for group in np.unique(groups):
        at = (groups == group).nonzero()[0]
        if len(at) > k:
            taken += gains[at[scores[at].argsort(kind="stable")[-k:]]].sum()
            possible += np.sort(gains[at])[-k:].sum()
    return float(taken / possible) if possible else 0.0


@torch.no_grad()
def _scores(scorer: LearnedScorer, features: np.ndarray) -> np.ndarray:
    return scorer(torch.from_numpy(features)).double().numpy()


def _numbered(groups: np.ndarray) -> tuple[torch.Tensor, int]:
    """Groups as numbers from 0 on, and how many there are."""
    names, numbers = np.unique(groups, return_inverse=True)
    return torch.from_numpy(numbers), len(names)


def _spread(gains: np.ndarray, of: np.ndarray) -> float:
    """Standard deviation of gains within their groups."""
    means = np.bincount(of, gains) / np.bincount(of)
    return float(np.sqrt(np.mean((gains - means[of]) ** 2)))


def _softmax(values: torch.Tensor, of: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax and log-softmax within groups, `[N]` each."""
    top = torch.full((count,), -torch.inf, dtype=values.dtype).scatter_reduce(0, of, values.detach(), "amax")
    shifted = values - top[of]
    total = torch.zeros(count, dtype=values.dtype).index_add(0, of, shifted.exp())
    logs = shifted - total.log()[of]
    return logs.exp(), logs
