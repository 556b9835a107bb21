"""Reconstruction measured on held-out chunks: TRA and NLL of code, prose and random ids."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..crouter import CRouterModel


@dataclass(frozen=True)
class ReconstructionScore:
    """Means over real tokens of a set of chunks.

    Attributes:
        accuracy: share of tokens rebuilt exactly at their position (TRA), 0 to 1.
        reconstruction_nll: negative log-likelihood, nats/token.
        chunks: number of chunks.
        chunk_reconstruction_nll: each chunk's own nats/token, `[N]`, float32.
        chunk_accuracy: each chunk's own TRA, `[N]`, float32.
    """

    accuracy: float
    reconstruction_nll: float
    chunks: int
    chunk_reconstruction_nll: torch.Tensor
    chunk_accuracy: torch.Tensor


@torch.inference_mode()
def reconstruction_score(
    crouter: CRouterModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    batch_size: int = 32,
    bf16: bool = False,
) -> ReconstructionScore:
    """Scores chunks `[N, T]`, int64, on the crouter's device.

    Args:
        crouter: in evaluation mode on return.
        input_ids: token ids, right-padded.
        attention_mask: `[N, T]`, 1 where a token stands; all by default.
        batch_size: chunks a pass.
        bf16: bfloat16 autocast.

    Raises:
        ValueError: no chunk.
    """
    if not len(input_ids):
        raise ValueError("expected at least one chunk, got none")
    crouter.eval()
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    nll, accuracy = [], []
    for start in range(0, len(input_ids), batch_size):
        ids = input_ids[start : start + batch_size].to(crouter.device)
        with torch.autocast(crouter.device.type, torch.bfloat16, enabled=bf16):
            out = crouter(ids, mask[start : start + batch_size].to(crouter.device))
        nll.append(out.reconstruction_nll.float().cpu())
        accuracy.append(out.reconstruction_accuracy.float().cpu())
    nll, accuracy, weight = torch.cat(nll), torch.cat(accuracy), mask.sum(-1).double()
    return ReconstructionScore(
        accuracy=float((accuracy * weight).sum() / weight.sum()),
        reconstruction_nll=float((nll * weight).sum() / weight.sum()),
        chunks=len(nll),
        chunk_reconstruction_nll=nll,
        chunk_accuracy=accuracy,
    )
