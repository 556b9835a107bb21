"""Ragged texts as batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import InputError, MismatchError


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


def left_pads(attention_mask: torch.Tensor | None, input_ids: torch.Tensor) -> list[int]:
    """Padding columns at the left of each row.

    Args:
        attention_mask: `[B, T]`; None: no padding.
        input_ids: `[B, T]`.

    Raises:
        InputError: a mask that is not the ids' shape, is padded at the right, has holes or an empty row.
    """
    if attention_mask is None:
        return [0] * len(input_ids)
    if attention_mask.shape != input_ids.shape:
        raise InputError(
            f"attention_mask: expected the shape of input_ids {list(input_ids.shape)} (the whole conversation), "
            f"got {list(attention_mask.shape)}"
        )
    mask = attention_mask.bool().cpu()
    if not mask[:, -1].all():
        raise InputError("attention_mask: expected padding at the left, got padding at the right or an empty row")
    if (mask[:, :-1] & ~mask[:, 1:]).any():
        raise InputError("attention_mask: expected one run of ones a row, got holes")
    return (~mask).sum(1).tolist()
