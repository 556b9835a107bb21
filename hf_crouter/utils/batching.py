"""Ragged texts as batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import MismatchError


def padded(
    pieces: Sequence[torch.Tensor], device: torch.device | str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts of any lengths as one batch: ids and mask, `[N, T]`.

    Args:
        pieces: token ids on one device, `[tokens]` each, padded with zeros behind.
        device: where the batch goes; as the pieces, with a mask on the CPU, by default.
    """
    ids = torch.nn.utils.rnn.pad_sequence(list(pieces), batch_first=True)
    mask = torch.arange(ids.shape[1]) < torch.tensor([[len(piece)] for piece in pieces])
    return (ids, mask) if device is None else (ids.to(device), mask.to(device))


def check_ids(pieces: Sequence[torch.Tensor], vocab_size: int) -> None:
    """Refuses ids that a crouter does not know.

    Raises:
        MismatchError: an id outside its vocabulary.
    """
    most = max((int(ids.max()) for ids in pieces if ids.numel()), default=0)
    if most >= vocab_size:
        raise MismatchError(f"tokenizer: expected ids below {vocab_size} (the crouter's), got {most}")
