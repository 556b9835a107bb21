"""Ragged texts as batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def padded(pieces: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts of any lengths as one batch: ids and mask, `[N, T]`, on the CPU."""
    ids = torch.nn.utils.rnn.pad_sequence(list(pieces), batch_first=True)
    return ids, torch.arange(ids.shape[1]) < torch.tensor([[len(piece)] for piece in pieces])
