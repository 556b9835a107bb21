"""Compacted key-value pairs: of each chunk, layer and head the pairs to which attention to the chunk went.

Attention Matching (arXiv 2602.16284) and KVzip (arXiv 2505.23416) keep a subset of a context's pairs. Here chunks are
compacted one by one as they leave the window, and the queries that decide are the host's own: those of what follows,
and those of the chunk's own block that look far enough back. What a pair is worth is the sum, over these queries, of
the square of its share of all attention, times the square of its value's length: the squared size of what it put into
the layer's output. `eval/LOG.md` has what was tried beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import torch

from ..types import LayerRead, Pairs

TILE = 1 << 25  # products of queries and keys at once, float32: 128 MiB


class PairSelector:
    """Keeps the pairs of the greatest worth; see `PairCompressor`.

    Args:
        most_by_layer: pairs a chunk and head of each layer; 0 in one that keeps nothing old.
        block: tokens of leaving chunks that are read at once.
        far: distance in tokens from which on queries of a chunk's own block count.
        queries: most that count of one read, evenly spaced.
    """

    def __init__(self, most_by_layer: tuple[int, ...], block: int, far: int = 256, queries: int = 512):
        self.most_by_layer, self.block, self.far, self.queries = most_by_layer, block, far, queries
        kept = [count for count in most_by_layer if count]
        self.most: int = -(-sum(kept) // max(1, len(kept)))
        self.key: object = ("compact", most_by_layer, block, far, queries)

    def observe(self, read: LayerRead) -> torch.Tensor | None:
        """Squared shares that a block's own far queries give its slots, summed, `[B, heads, block]`, float32.

        None where every pair stays.
        """
        return None if self._keeps_all(read) else squared_shares(read, self.queries, self.far)

    def compress(self, read: LayerRead, observed: torch.Tensor | None) -> list[Pairs]:
        """See `PairCompressor.compress`."""
        first, end = read.block
        if observed is None:
            order = torch.arange(end - first, dtype=torch.int32, device=read.keys.device)
            order = order.expand(*read.keys.shape[:2], -1)
            return [(read.keys[:, :, a:b].clone(), read.values[:, :, a:b].clone(), order[..., : b - a])
                    for a, b in read.chunks]  # fmt: skip
        worth = squared_shares(read, self.queries) + observed
        worth = worth * read.values[:, :, first:end].float().square().sum(-1)
        pairs: list[Pairs] = []
        for size, chunks in groupby(read.chunks, lambda chunk: chunk[1] - chunk[0]):
            some = list(chunks)
            pairs += self._kept(read, worth[..., some[0][0] - first : some[-1][1] - first], some[0][0], size)
        return pairs

    def _keeps_all(self, read: LayerRead) -> bool:
        return self.most_by_layer[read.layer] >= max(end - first for first, end in read.chunks)

    def _kept(self, read: LayerRead, worth: torch.Tensor, first: int, size: int) -> Iterator[Pairs]:
        """Pairs of equally long chunks, one behind the other, of the slots from `first` on."""
        count, end = min(self.most_by_layer[read.layer], size), first + worth.shape[-1]
        each = worth.unflatten(-1, (-1, size))
        places = each.topk(count, -1).indices.sort(-1).values
        starts = torch.arange(0, worth.shape[-1], size, device=places.device)
        pick = (places + starts[:, None]).flatten(2)[..., None]
        keys, values = read.keys[:, :, first:end], read.values[:, :, first:end]
        keys = keys.gather(2, pick.expand(-1, -1, -1, keys.shape[-1])).split(count, 2)
        values = values.gather(2, pick.expand(-1, -1, -1, values.shape[-1])).split(count, 2)
        return zip(keys, values, places.int().unbind(2), strict=True)


def squared_shares(read: LayerRead, most: int, far: int = 0) -> torch.Tensor:
    """Squares of the shares of attention that queries give each slot of a block, summed over them.

    Args:
        read: of one layer; queries that share a head of the keys count together.
        most: queries that count at most, evenly spaced; the sum is scaled up to all of them.
        far: only slots at this distance or further from a query count, in slots.

    Returns:
        `[B, heads, block]`, float32.
    """
    (first, end), (rows, heads, slots, _) = read.block, read.keys.shape
    asked, device = read.queries.shape[2], read.keys.device
    start, step = slots - asked, -(-asked // most)  # slot of the first query, and from one that counts to the next
    skip = max(0, -(-(first + far - start) // step)) * step if far else 0
    wide = torch.promote_types(read.keys.dtype, torch.float32)
    total = torch.zeros(rows, heads, end - first, device=device, dtype=wide)
    if skip >= asked:
        return total.float()
    groups = read.queries.shape[1] // heads
    queries = read.queries[:, :, skip::step].unflatten(1, (heads, groups)).transpose(2, 3).flatten(2, 3)
    queries, keys = queries.to(wide) * read.scaling, read.keys.to(wide).transpose(-1, -2)
    at = torch.arange(start + skip, slots, step, device=device).repeat_interleave(groups)[:, None]
    order = torch.arange(slots, device=device)
    tile = max(1, TILE // (rows * heads * groups * slots)) * groups
    for some, own in zip(at.split(tile), queries.split(tile, 2), strict=True):
        products = torch.matmul(own, keys)
        if read.softcap is not None:
            products = read.softcap * (products / read.softcap).tanh()
        products[..., start:].masked_fill_(order[start:] > some, float("-inf"))
        whole = products.logsumexp(-1, keepdim=True)
        if read.sinks is not None:
            sinks = read.sinks.to(wide).view(1, heads, 1, groups).expand(-1, -1, len(some) // groups, -1)
            whole = torch.logaddexp(whole, sinks.flatten(2)[..., None])
        squares = (products[..., first:end] - whole).mul_(2).exp_()
        if far:
            squares.masked_fill_(order[first:end] > some - far, 0.0)
        total += squares.sum(2)
    return (total * step).float()
