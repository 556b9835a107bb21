"""What stands in each slot of a cache, as codes.

A code is `PAD`, a token's position in its row (0 or more), or one entry of a chunk (below `PAD`), counted by chunk and
place within it, so that a code means the same whatever other chunks hold. Key-value pairs have no codes (`pairs.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..types import BASE, Row

PAD = -1
STALE = torch.iinfo(torch.int64).min  # a slot whose token was edited since: equal to no code
STRIDE = 1 << 20  # more entries than a chunk ever has


def entry_codes(chunks: Sequence[int], counts: Sequence[int]) -> torch.Tensor:
    """Codes of the entries of some chunks, so many of each, one after the other."""
    sizes = torch.tensor(counts, dtype=torch.long)
    numbers = torch.tensor(chunks, dtype=torch.long).repeat_interleave(sizes)
    firsts = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    return PAD - 1 - (numbers * STRIDE + torch.arange(len(numbers)) - firsts)


def entry_chunk(codes: torch.Tensor) -> torch.Tensor:
    """Number of the chunk that each entry's code names."""
    return (PAD - 1 - codes) // STRIDE


def entry_place(codes: torch.Tensor) -> torch.Tensor:
    """Place of each entry's code within its chunk."""
    return (PAD - 1 - codes) % STRIDE


def row_layout(length: int, row: Row, *, beside_raw: bool = True) -> torch.Tensor:
    """Codes of one row's slots, `[slots]`: `[prefix | entries of all chunks | retrieved chunks, raw | window]`.

    Entries that are key-value pairs stand before all of these, and have no codes.

    Args:
        length: tokens of the row.
        row: its prefix, chunks and what was retrieved.
        beside_raw: a retrieved chunk's entries stay.
    """
    if not row.chunks:
        return torch.arange(length)
    kept, head = getattr(row, "_head", (None, torch.empty(0)))
    if kept != beside_raw:  # in most steps the row is the one of the step before
        head = _head(row, beside_raw)
        object.__setattr__(row, "_head", (beside_raw, head))
    return torch.cat([head, torch.arange(row.raw_start, length)])


def _head(row: Row, beside_raw: bool) -> torch.Tensor:
    """Codes of a compressed row's slots before its window; see `row_layout`."""
    aside = set() if beside_raw else set(row.retrieved)
    numbers, counts = [], []
    for n, chunk in enumerate(row.chunks):
        if chunk.entries is not None and chunk.entries.embeddings is not None and n not in aside:
            numbers.append(n)
            counts.append(len(chunk.entries))
    raw = [torch.arange(row.chunks[n].start, row.chunks[n].end) for n in row.retrieved]
    return torch.cat([torch.arange(row.prefix or 0), entry_codes(numbers, counts), *raw])


def row_experts(row: Row, codes: torch.Tensor) -> torch.Tensor:
    """Numbers of the adapters that serve a row's slots, `[slots]`; `BASE` for none.

    A chunk's entries, its raw tokens and (of the first chunk) the prefix before it are served by its own expert, the
    rest by the window's.

    Args:
        row: its chunks and routes.
        codes: of its slots, as `row_layout` gives them.
    """
    window = row.routes[-1].route.number if row.routes else BASE
    if not row.chunks or not row.routes:
        return torch.full_like(codes, window)
    numbers = [chunk.route.number if chunk.route is not None else BASE for chunk in row.chunks]
    ends = torch.tensor([chunk.end for chunk in row.chunks])
    where = torch.bucketize(codes, ends, right=True)  # chunk in which a token stands
    entry = codes < PAD
    where[entry] = entry_chunk(codes[entry])
    return torch.tensor([*numbers, window])[where]


def stack_rows(rows: Sequence[torch.Tensor], width: int = 0) -> torch.Tensor:
    """Left-pads rows of codes to `[B, S]`, S the longest row or `width` if that is more."""
    width = max(width, *(len(row) for row in rows))
    return torch.stack([torch.nn.functional.pad(row, (width - len(row), 0), value=PAD) for row in rows])


def stack_experts(rows: Sequence[torch.Tensor], width: int) -> torch.Tensor:
    """Left-pads rows of adapters' numbers to `[B, width]`; padding goes with what comes first in its row."""
    experts = torch.full((len(rows), width), BASE)
    for i, numbers in enumerate(rows):  # so that rows stay uniform where they can
        first = width - len(numbers)
        experts[i, :first] = numbers[0] if len(numbers) else BASE
        experts[i, first:] = numbers
    return experts


def common_columns(cached: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> int:
    """Number of leading columns in which two layouts, each with its adapters (`[B, S]` all), agree in every row."""
    if len(cached[0]) != len(wanted[0]):
        return 0
    width = min(cached[0].shape[1], wanted[0].shape[1])
    same = torch.stack([a[:, :width] == b[:, :width] for a, b in zip(cached, wanted, strict=True)])
    return int(same.flatten(0, 1).all(0).cumprod(0).sum())
