"""What stands in each slot of a cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..types import BASE, Row

PAD = -1


STALE = torch.iinfo(torch.int64).min  # a slot whose token was edited since: equal to no code


def row_layout(
    length: int,
    prefix: int,
    spans: Sequence[tuple[int, int]],
    num_latents: int,
    retrieved: Sequence[tuple[int, int]] = (),
) -> torch.Tensor:
    """Codes of one row's slots, `[slots]`.

    Args:
        length: tokens of the row.
        prefix: tokens kept raw at the start.
        spans: compressed spans `(start, end)`, contiguous from `prefix` on.
        num_latents: slots a compressed chunk takes, M; 0 drops them.
        retrieved: those of the spans that stand raw as well, in order.
    """
    if not spans:
        return torch.arange(length)
    soft = PAD - 1 - torch.arange(len(spans) * num_latents)
    raw = [torch.arange(start, end) for start, end in (*retrieved, (spans[-1][1], length))]
    return torch.cat([torch.arange(prefix), soft, *raw])


def row_experts(row: Row, codes: torch.Tensor, num_latents: int) -> torch.Tensor:
    """Numbers of the adapters that serve a row's slots, `[slots]`; `BASE` for none.

    A chunk's soft prompts, its recalled tokens and (of the first chunk) the prefix before it are served by its own
    expert, the rest by the window's.

    Args:
        row: its chunks and routes.
        codes: of its slots, as `row_layout` gives them.
        num_latents: slots a compressed chunk takes, M.
    """
    window = row.routes[-1].route.number if row.routes else BASE
    if not row.chunks or not row.routes:
        return torch.full_like(codes, window)
    numbers = [chunk.route.number if chunk.route is not None else BASE for chunk in row.chunks]
    ends = torch.tensor([chunk.end for chunk in row.chunks])
    where = torch.bucketize(codes, ends, right=True)  # chunk in which a token stands
    soft = codes < PAD
    where[soft] = soft_index(codes[soft]) // max(num_latents, 1)
    return torch.tensor([*numbers, window])[where]


def soft_index(codes: torch.Tensor) -> torch.Tensor:
    """Chunk times M plus latent for codes of soft prompts."""
    return PAD - 1 - codes


def stack_rows(rows: Sequence[torch.Tensor], width: int = 0) -> torch.Tensor:
    """Left-pads rows of codes to `[B, S]`, S the longest row or `width` if that is more."""
    width = max(width, *(len(row) for row in rows))
    return torch.stack([torch.nn.functional.pad(row, (width - len(row), 0), value=PAD) for row in rows])


def common_columns(cached: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> int:
    """Number of leading columns in which two layouts, each with its adapters (`[B, S]` all), agree in every row."""
    if len(cached[0]) != len(wanted[0]):
        return 0
    width = min(cached[0].shape[1], wanted[0].shape[1])
    same = torch.stack([a[:, :width] == b[:, :width] for a, b in zip(cached, wanted, strict=True)])
    return int(same.flatten(0, 1).all(0).cumprod(0).sum())
