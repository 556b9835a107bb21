"""Where pairs and tokens stand: at true positions while these fit the host's, at compact ones beyond.

A row is compact from the first token on that the host has no position for (`ContextPolicy.positions`), and stays so.
Then consecutive positions go to: the prefix; each chunk, so many as it has entries (the mean over layers), over which
a layer spreads its own number of pairs; the retrieved chunks; the window. Where a chunk's pairs stand depends on the
chunks before it alone, so they are moved once.
"""

from __future__ import annotations

from typing import Any

import torch

from ..hosts.positions import max_positions
from ..hosts.rope import rope_switch
from ..types import Row
from .layout import PAD


def key_positions(host: Any) -> int | None:
    """Positions of a host for keys that are made once, so all under one set of rotary factors; None: any number."""
    limits = (max_positions(host), rope_switch(host))
    return min((limit for limit in limits if limit), default=None)


def spread(first: int, span: int, count: int, device: Any = None) -> torch.Tensor:
    """Positions of `count` pairs of a chunk that takes `span` positions from `first` on, int64."""
    return first + torch.arange(count, device=device) * span // max(1, count)


def pair_moves(row: Row, layer: int) -> torch.Tensor:
    """New position minus old one of a row's pairs in a layer, from true positions to compact ones, `[heads, n]`.

    Args:
        row: its pairs have their `places`; chunks without entries are left out.
        layer: one that keeps pairs.
    """
    first, moves = row.prefix or 0, []
    for chunk in row.chunks:
        if chunk.entries is not None and chunk.entries.places is not None:
            places = chunk.entries.places[layer]
            assert places is not None
            new = spread(first, len(chunk.entries), places.shape[-1], places.device)
            moves.append(new - chunk.start - places)
            first += len(chunk.entries)
    return torch.cat(moves, -1)


def row_positions(row: Row, codes: torch.Tensor) -> torch.Tensor:
    """Position of each slot of a row beside pairs, `[slots]`; of padding any (0).

    Args:
        row: with its entries.
        codes: of its slots, as `row_layout` gives them, padding before them.
    """
    if not row.compact:
        return codes.clamp(min=0)
    behind = codes >= (row.prefix or 0)
    return torch.where(behind, row.pairs_end + behind.cumsum(0) - 1, codes.clamp(min=0))


def slot_positions(rows: tuple[Row, ...], layout: torch.Tensor, pairs: bool, limit: int | None = None) -> torch.Tensor:
    """Position of each slot, `[B, S]`; of padding any (0).

    Args:
        rows: B of them.
        layout: their codes, `[B, S]`.
        pairs: whether pairs stand before the slots; without, slots are consecutive.
        limit: positions of the host. Rows that ended while others go on stay below; nobody reads what they give.
    """
    if not pairs:
        return ((layout != PAD).long().cumsum(1) - 1).clamp(min=0)
    most = [limit - 1 if limit and row.end is not None else None for row in rows]
    return torch.stack([row_positions(row, codes).clamp(max=last) if last is not None else row_positions(row, codes)
                        for row, codes, last in zip(rows, layout, most, strict=True)])  # fmt: skip
