"""Copying: what followed earlier occurrences of the last tokens, mixed into a host's own distribution.

`p = w_0 p_host + sum_k w_k p_k`, with `p_k` what followed the last `k` tokens in the archive, and a last `p_k` that is
certain of what followed the latest occurrence of the longest match. A small gate gives the weights from what is known
before the token: counts, agreement, the host's certainty, what the raw text says. Where tokens were rebuilt, a source
counts as much as their confidence.
Axes: `N` positions (rows of a step, or tokens of a text), `K` sources (the orders, and the latest occurrence), `E`
candidates of all positions, `C` their shape (see `candidates.Proposals`), `V` vocabulary.

Source of the mixture: kNN-LM (arXiv 1911.00172) and the infinity-gram (arXiv 2401.17377); gate and features are ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .candidates import Proposals
from .gate import SOURCES, Gate

_SEEN = math.log(0.01)
_LOWEST = torch.finfo(torch.float32).min
BLOCK = 64  # positions whose whole distribution is held in float32 at once


@dataclass(frozen=True, eq=False)
class HostView:
    """What the gate sees of the host's distribution at N positions.

    Attributes:
        candidates: `C`, log-probability of each candidate.
        best: `[N]`, highest log-probability.
        token: `[N]`, int64, the token that has it.
        entropy: `[N]`, nats.
    """

    candidates: torch.Tensor
    best: torch.Tensor
    token: torch.Tensor
    entropy: torch.Tensor


def view_host(scores: torch.Tensor, candidates: Proposals) -> tuple[HostView, torch.Tensor]:
    """Reads logits `[N, V]` (or log-probabilities) at the candidates; also gives the normaliser `[N]`."""
    parts: list[tuple[torch.Tensor, ...]] = []
    for start in range(0, len(scores), BLOCK):
        part = scores[start : start + BLOCK].float()
        best, token = part.max(-1)
        shares = part.softmax(-1)
        log_best = shares.gather(1, token[:, None])[:, 0].log()
        normaliser = best - log_best
        entropy = normaliser - (shares * part.clamp(min=_LOWEST)).sum(-1)  # 0 times -inf is 0
        parts.append((normaliser, log_best, token, entropy))
    normaliser, best, token, entropy = (torch.cat(values) for values in zip(*parts, strict=True))
    at = candidates.at(scores).float() - candidates.at(normaliser)
    return HostView(at, best, token, entropy), normaliser


def gate_features(candidates: Proposals, host: HostView) -> torch.Tensor:
    """`[N, ARCHIVE_FEATURES + HOST_FEATURES]`, float32: all that a gate sees."""
    orders, probability = SOURCES - 1, host.candidates.exp()
    agrees = candidates.chosen == host.token
    rest = torch.stack([host.entropy / 8, host.best.exp(), agrees.float()], dim=1)
    expected, top = candidates.expected(probability), candidates.of_best(probability)
    return torch.cat([candidates.features, expected[:, :orders], top[:, :orders], rest], dim=1)


@dataclass(frozen=True, eq=False)
class Mixture:
    """A host's distribution at N positions with the archive's mixed in.

    Attributes:
        candidates: of the archive.
        host: the host's log-probabilities at them.
        normaliser: `[N]`, what the host's scores are above its log-probabilities.
        weights: `[N, 1 + K]`, log-weights, the host's first.
        vocab_size: V.
    """

    candidates: Proposals
    host: HostView
    normaliser: torch.Tensor
    weights: torch.Tensor
    vocab_size: int

    @property
    def share(self) -> torch.Tensor:
        """`[N]`, the weight of copying, 0 to 1."""
        return -torch.expm1(self.weights[:, 0])

    def added(self) -> torch.Tensor:
        """`C`, probability that each candidate gets from the archive."""
        return self.candidates.added(self.weights[:, 1:].exp())

    def log_probabilities(self, scores: torch.Tensor) -> torch.Tensor:
        """The whole mixture, `[N, V]`, float32; positions without candidates keep the host's."""
        return self.with_sources(scores)[0]

    def with_sources(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The whole mixture, and `C`, bool: the archive brings the candidate, to 1 in 100 or more."""
        own = scores.float() - (self.normaliser - self.weights[:, 0])[:, None]
        whole, copied = self.candidates.mixed(own, self.added())
        kept = self.host.candidates + self.candidates.at(self.weights[:, 0])
        return whole, (copied > kept) & (copied > _SEEN)

    def of(self, targets: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Log-probability of one token a position, `[N]`."""
        own = scores.gather(1, targets[:, None])[:, 0].float() - self.normaliser + self.weights[:, 0]
        return torch.logaddexp(own, self.copied(targets).log())

    def copied(self, targets: torch.Tensor) -> torch.Tensor:
        """Probability that a token a position gets from the archive, `[N]`."""
        return self.candidates.of(targets, self.added())

    def greedy(self) -> torch.Tensor:
        """The most probable token, `[N]`: the host's own or a candidate."""
        own = self.host.candidates + self.candidates.at(self.weights[:, 0])
        highest, token = self.candidates.best(own, self.added())
        return torch.where(highest > self.host.best + self.weights[:, 0], token, self.host.token)


def mix(scores: torch.Tensor, candidates: Proposals, gate: Gate, strength: float = 1.0) -> Mixture:
    """Weighs host and archive.

    Args:
        scores: `[N, V]`, logits or log-probabilities; what is -inf stays forbidden.
        candidates: of the same N positions, on the same device.
        gate: gives the weights.
        strength: factor on every source's weight, 0 to 1. What a source is not confident of goes to the host as well.
    """
    host, normaliser = view_host(scores, candidates)
    candidates = candidates.allowed(host.candidates > -math.inf)
    weights = gate(gate_features(candidates, host), candidates.available)
    own, copied = weights[:, :1], weights[:, 1:]
    factor = strength * candidates.confidence
    back = (copied.exp() * (1 - factor)).sum(1, keepdim=True)  # to the host
    weights = torch.cat([torch.logaddexp(own, back.log()), copied + factor.log()], dim=1)
    return Mixture(candidates, host, normaliser, weights, scores.shape[-1])
