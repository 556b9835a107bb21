"""What the archive proposes at some positions where each has as many candidates: fixed shapes, for a device.

Axes: `N` positions, `K` sources, `U` tokens that may be proposed, `V` vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True, eq=False)
class GridCandidates:
    """What the archive proposes at N positions; see `candidates.Proposals`. Nothing here waits for the device.

    Attributes:
        tokens: `[N, U]`, int64, each once; behind a position's own ones stand some that nothing proposes.
        probabilities: `[N, K, U]`, float32; they sum to 1 over a position and source that is available, else to 0.
        available: see `Proposals`.
        confidence: likewise.
        best_slot: `[N, K]`, int64, where in `tokens` the source's most probable one stands.
        chosen: see `Proposals`.
        features: likewise.
    """

    tokens: torch.Tensor
    probabilities: torch.Tensor
    available: torch.Tensor
    confidence: torch.Tensor
    best_slot: torch.Tensor
    chosen: torch.Tensor
    features: torch.Tensor

    def __len__(self) -> int:
        """Number of positions N."""
        return len(self.features)

    def at(self, scores: torch.Tensor) -> torch.Tensor:
        """See `Proposals.at`."""
        return scores.gather(1, self.tokens) if scores.ndim == 2 else scores[:, None]

    def expected(self, values: torch.Tensor) -> torch.Tensor:
        """See `Proposals.expected`."""
        return (self.probabilities * values[:, None]).sum(2)

    def of_best(self, values: torch.Tensor) -> torch.Tensor:
        """See `Proposals.of_best`."""
        return torch.where(self.available, values.gather(1, self.best_slot), 0.0)

    def allowed(self, keep: torch.Tensor) -> GridCandidates:
        """See `Proposals.allowed`."""
        allowed = torch.where(keep[:, None], self.probabilities, 0.0)
        kept, lost = allowed.sum(2), ((self.probabilities > 0) & ~keep[:, None]).any(2)
        share = torch.where(lost, kept, 1.0)  # exactly as it was where nothing is left out
        probabilities = allowed / share[..., None].clamp(min=1e-12)
        return replace(self, probabilities=probabilities, available=self.available & (kept > 0))

    def added(self, weights: torch.Tensor) -> torch.Tensor:
        """See `Proposals.added`."""
        return (self.probabilities * weights[..., None]).sum(1)

    def of(self, targets: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """See `Proposals.of`."""
        return torch.where(self.tokens == targets[:, None], values, 0).sum(1)

    def named(self, flags: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Proposals.named`."""
        return flags.nonzero()[:, 0], self.tokens[flags]

    def best(self, own: torch.Tensor, added: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Proposals.best`."""
        highest, slot = torch.where(added > 0, torch.logaddexp(own, added.log()), -torch.inf).max(1)
        return highest, self.tokens.gather(1, slot[:, None])[:, 0]

    def mixed(self, own: torch.Tensor, added: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Proposals.mixed`."""
        copied = added.log()
        both = torch.logaddexp(own.gather(1, self.tokens), copied)
        # never below what stands there, so a token that fills up the grid changes nothing
        return own.scatter_reduce_(1, self.tokens, both, "amax"), copied
