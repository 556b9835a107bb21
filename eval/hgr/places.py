"""What a host says at the scored positions, and what copying adds to it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_crouter.ngram.archive import ORDERS
from hf_crouter.ngram.mixture import Candidates, HostView, gate_features

DENSE = 2048  # places whose whole distribution is held in float32 at once


@dataclass(frozen=True, eq=False)
class Places:
    """What a host says at N positions; what a gate needs comes from here.

    Attributes:
        scores: `[N, V]`, logits.
        targets: `[N]`.
        normaliser: `[N]`, the logits' log-sum-exp.
        best: `[N]`, highest log-probability.
        token: `[N]`, the token that has it.
        entropy: `[N]`, nats.
        host: `[N]`, log-probability of the target.
    """

    scores: torch.Tensor
    targets: torch.Tensor
    normaliser: torch.Tensor
    best: torch.Tensor
    token: torch.Tensor
    entropy: torch.Tensor
    host: torch.Tensor

    @classmethod
    def read(cls, scores: torch.Tensor, targets: torch.Tensor) -> Places:
        """From logits `[N, V]` and targets `[N]`; what `view_host` reads, in fewer and larger steps."""
        parts = []
        for part in scores.split(DENSE):
            normaliser = part.float().logsumexp(-1)
            part = part.float() - normaliser[:, None]
            best, token = part.max(-1)
            parts.append((normaliser, best, token, -(part.exp() * part).sum(-1)))
        normaliser, best, token, entropy = (torch.cat(values) for values in zip(*parts, strict=True))
        host = scores.gather(1, targets[:, None])[:, 0].float() - normaliser
        return cls(scores, targets, normaliser, best, token, entropy, host)

    def beside(self, candidates: Candidates) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Features `[N, F]`, available orders `[N, K]`, and each order's probability of the target `[N, K]`."""
        at = self.scores[candidates.positions, candidates.tokens].float() - self.normaliser[candidates.positions]
        features = gate_features(candidates, HostView(at, self.best, self.token, self.entropy))
        hit = self.targets[candidates.positions] == candidates.tokens
        copied = torch.zeros(candidates.available.numel(), device=at.device)
        copied.index_add_(0, candidates.positions * len(ORDERS) + candidates.orders, candidates.probabilities * hit)
        return features, candidates.available, copied.view_as(candidates.available)

    def greedy(self, candidates: Candidates, weights: torch.Tensor) -> torch.Tensor:
        """The mixture's most probable token, `[N]`.

        Args:
            candidates: of these places.
            weights: `[N, 1 + K]`, log-weights.
        """
        width = self.scores.shape[1]
        added = weights[candidates.positions, candidates.orders + 1].exp() * candidates.probabilities
        choice = []
        for start in range(0, len(self.scores), DENSE):
            part = self.scores[start : start + DENSE].float() - self.normaliser[start : start + DENSE, None]
            part = (part + weights[start : start + DENSE, :1]).exp()
            low, high = torch.searchsorted(
                candidates.positions, torch.tensor([start, start + len(part)], device=part.device)
            ).tolist()
            cells = (candidates.positions[low:high] - start) * width + candidates.tokens[low:high]
            choice.append(part.flatten().index_add_(0, cells, added[low:high]).view_as(part).argmax(-1))
        return torch.cat(choice)
