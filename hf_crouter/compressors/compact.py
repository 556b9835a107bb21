"""Compacted key-value pairs: of each chunk, layer and head the pairs to which attention to the chunk went.

Attention Matching (arXiv 2602.16284) and KVzip (arXiv 2505.23416) keep a subset of a context's pairs. Here chunks are
compacted one by one as they leave the window, and the queries that decide are the host's own: those of what follows,
and those of the chunk's own block that look far enough back. What a pair is worth is the sum, over these queries, of
the square of its share of all attention, times the square of its value's length: the squared size of what it put into
the layer's output. `eval/LOG.md` has what was tried beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch

from ..types import LayerRead, Pairs

BLOCK = 2048  # tokens
TILE = 1 << 25  # products of queries and keys at once, float32: 128 MiB


class PairSelector:
    """Keeps the pairs of the greatest worth; see `PairCompressor`.

    Args:
        most_by_layer: pairs a chunk and head of each layer; 0 in one that keeps nothing old.
        block: tokens of leaving chunks that are read at once; None: 2,048, or of more than 32k a sixteenth, 8,192 at
            most, so that long prompts are read in fewer forwards.
        far: distance in tokens from which on queries of a chunk's own block count.
        queries: most that count of one read, evenly spaced.
    """

    reads = True
    tile = TILE

    def __init__(self, most_by_layer: tuple[int, ...], block: int | None, far: int = 256, queries: int = 512):
        self.most_by_layer, self.size, self.far, self.queries = most_by_layer, block, far, queries
        kept = [count for count in most_by_layer if count]
        self.most: int = -(-sum(kept) // max(1, len(kept)))
        self.key: object = ("compact", most_by_layer, block, far, queries)

    def block(self, tokens: int) -> int:
        """See `PairCompressor.block`."""
        return self.size or min(max(BLOCK, tokens // 16), 4 * BLOCK)

    def compress(self, read: LayerRead, observed: torch.Tensor | None) -> tuple[Pairs | None, torch.Tensor | None]:
        """See `PairCompressor.compress`.

        What is known of the own chunks: the squared shares that their far queries give their slots, summed,
        `[B, heads, tokens]`, float32; None where every pair stays.
        """
        asked = [chunks and not self._keeps_all(read.layer, chunks) for chunks in (read.chunks, read.own)]
        both = zip((read.chunks, read.own), (0, self.far), asked, strict=True)
        spans = [(chunks[0][0], chunks[-1][1], far) for chunks, far, ask in both if ask]
        shares = squared_shares(read, self.queries, spans)
        pairs = None
        if read.chunks:
            pairs = self._chosen(read, shares[0], observed) if asked[0] else first_pairs(read, None)
        return pairs, shares[-1] if asked[1] else None

    def _keeps_all(self, layer: int, chunks: Sequence[tuple[int, int]]) -> bool:
        return self.most_by_layer[layer] >= max(end - first for first, end in chunks)

    def _chosen(self, read: LayerRead, shares: torch.Tensor, observed: torch.Tensor | None) -> Pairs:
        first, end = read.chunks[0][0], read.chunks[-1][1]
        worth = shares if observed is None else shares + observed
        worth = worth * read.values[:, :, first:end].float().square().sum(-1)
        most = self.most_by_layer[read.layer]
        found: list[tuple[torch.Tensor, torch.Tensor]] = []
        counts: list[int] = []
        for size, chunks in groupby(read.chunks, lambda chunk: chunk[1] - chunk[0]):
            some = list(chunks)
            each = worth[..., some[0][0] - first : some[-1][1] - first].unflatten(-1, (-1, size))
            places = each.topk(min(most, size), -1).indices.sort(-1).values
            starts = torch.arange(some[0][0], some[-1][1], size, device=places.device)
            found.append((places.flatten(2), (places + starts[:, None]).flatten(2)))
            counts += [min(most, size)] * len(some)
        places, slots = _joined([some[0] for some in found]), _joined([some[1] for some in found])
        pick = slots[..., None].expand(-1, -1, -1, read.keys.shape[-1])
        wide = slots[..., None].expand(-1, -1, -1, read.values.shape[-1])
        return Pairs(read.keys.gather(2, pick), read.values.gather(2, wide), places.int(), tuple(counts))


def first_pairs(read: LayerRead, most: int | None) -> Pairs:
    """The first pairs of each chunk, or all; of chunks that are equally long in one copy.

    Args:
        read: with chunks.
        most: of a chunk; None: every one.
    """
    kept: list[list[torch.Tensor]] = []
    counts: list[int] = []
    for size, chunks in groupby(read.chunks, lambda chunk: chunk[1] - chunk[0]):
        some = list(chunks)
        count, span = size if most is None else min(most, size), slice(some[0][0], some[-1][1])
        each = [kind[:, :, span].unflatten(2, (-1, size))[:, :, :, :count] for kind in (read.keys, read.values)]
        order = torch.arange(count, dtype=torch.int32, device=read.keys.device).repeat(len(some))
        kept.append([*(kind.clone().flatten(2, 3) for kind in each), order.expand(*read.keys.shape[:2], -1)])
        counts += [count] * len(some)
    keys, values, places = (_joined([parts[n] for parts in kept]) for n in range(3))
    return Pairs(keys, values, places, tuple(counts))


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat(list(parts), 2) if len(parts) > 1 else parts[0]


def squared_shares(read: LayerRead, most: int, spans: Sequence[tuple[int, int, int]]) -> list[torch.Tensor]:
    """Squares of the shares of attention that queries give each slot of some spans, summed over the queries.

    Args:
        read: of one layer; queries that share a head of the keys count together.
        most: queries that count at most, evenly spaced; the sum is scaled up to all of them.
        spans: slots `(first, end, far)` each; only slots `far` or further from a query count.

    Returns:
        `[B, heads, end - first]` of each span, float32.
    """
    if not spans:
        return []
    (rows, heads, slots, _), asked, device = read.keys.shape, read.queries.shape[2], read.keys.device
    start, step = slots - asked, -(-asked // most)  # slot of the first query, and from one that counts to the next
    groups = read.queries.shape[1] // heads
    queries = read.queries[:, :, ::step].unflatten(1, (heads, groups)).transpose(2, 3).flatten(2, 3)
    at = torch.arange(start, slots, step, device=device).repeat_interleave(groups)[:, None]
    order = torch.arange(slots, device=device)
    wide = torch.promote_types(read.keys.dtype, torch.float32)
    keys = read.keys if _on_tensor_cores(read.keys) else read.keys.to(wide)
    totals = [torch.zeros(rows, heads, end - first, device=device, dtype=wide) for first, end, _ in spans]
    tile = max(1, TILE // (rows * heads * groups * slots)) * groups
    for some, own in zip(at.split(tile), queries.split(tile, 2), strict=True):
        products = _products(own, keys, read.scaling)
        if read.softcap is not None:
            products = read.softcap * (products / read.softcap).tanh()
        products[..., start:].masked_fill_(order[start:] > some, float("-inf"))
        if read.sinks is not None:
            sinks = read.sinks.to(wide).view(1, heads, 1, groups).expand(rows, -1, len(some) // groups, -1)
            products = torch.cat([products, sinks.reshape(rows, heads, -1, 1)], 3)
        shares = products.softmax(-1)
        for total, (first, end, far) in zip(totals, spans, strict=True):
            part = shares[..., first:end]
            if far:
                part.masked_fill_(order[first:end] > some - far, 0.0)
            total += torch.linalg.vector_norm(part, dim=2).square_()
    return [(total * step).float() for total in totals]


def _products(queries: torch.Tensor, keys: torch.Tensor, scaling: float) -> torch.Tensor:
    """Scaled products `[B, heads, queries, keys]`, summed in float32 at least."""
    wide = torch.promote_types(keys.dtype, torch.float32)
    if _on_tensor_cores(keys):  # factors are exact: nothing is lost
        flat = torch.bmm(queries.flatten(0, 1), keys.flatten(0, 1).transpose(1, 2), out_dtype=wide)
        return flat.mul_(scaling).unflatten(0, keys.shape[:2])
    return torch.matmul(queries.to(wide) * scaling, keys.to(wide).transpose(-1, -2))


def _on_tensor_cores(keys: torch.Tensor) -> bool:
    """Whether products of 16-bit numbers can be had in float32; ROCm has none."""
    return keys.is_cuda and torch.version.cuda is not None and keys.dtype in (torch.bfloat16, torch.float16)
