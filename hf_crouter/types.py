"""The frozen values that travel between the stages of the flow."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Chunks:
    """Consecutive spans of one row's host tokens, each as at most `chunk_length` crouter tokens.

    Attributes:
        input_ids: crouter token ids `[N, T]`, int64, right-padded with 0.
        attention_mask: `[N, T]`, int64; 1 where `input_ids` holds a token.
        spans: for each chunk its half-open span `(start, end)` of host tokens in the row.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    spans: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        """Number of chunks N."""
        return len(self.spans)


@dataclass(frozen=True)
class Residuals:
    """How far chunks can be rebuilt from their latents.

    Attributes:
        nats: mean negative log-likelihood of the rebuilt chunk, `[N]`, nats/token.
        accuracy: token reconstruction accuracy (TRA), exact token at exact position, `[N]`, 0 to 1.
        token_nats: the same per position, `[N, T]`, nats; 0 at padding.
    """

    nats: torch.Tensor
    accuracy: torch.Tensor
    token_nats: torch.Tensor


@dataclass(frozen=True)
class Route:
    """Which expert serves a chunk, and how clearly.

    Attributes:
        expert: its name; None: the base model.
        number: its place in the set; -1: the base model.
        verdict: `known`; `overlap`: a second expert rebuilds the chunk nearly as well; `unknown`: it looks like the
            texts of none, so the base model serves; `short`: too few tokens to tell, what was before stays.
        nats: residual under every expert that was scored, nats/token, by name.
        margin: mean log residual of a token (0.01 nats added) under the best other expert minus that under this one:
            0.1 is a tenth less; below 0 where hysteresis keeps it, or where the best one does not know the chunk.
            Where the base model serves, the lead of the least one; infinite where only one was compared.
    """

    expert: str | None
    number: int
    verdict: str
    nats: dict[str, float]
    margin: float
