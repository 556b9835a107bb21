"""Compacted key-value pairs: of each chunk, layer and head the pairs to which attention to the chunk went.

Attention Matching (arXiv 2602.16284) and KVzip (arXiv 2505.23416) keep a subset of a context's pairs. Here chunks are
compacted one by one as they leave the window, and the queries that decide are the host's own: those of what follows,
and those of the chunk's own block that look far enough back. What a pair is worth is the sum, over these queries, of
the square of its share of all attention, times the square of its value's length: the squared size of what it put into
the layer's output. `eval/LOG.md` has what was tried beside it.
"""

from __future__ import annotations

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

    def observe(self, read: LayerRead) -> torch.Tensor:
        """Squared shares that a block's own far queries give its slots, summed, `[B, heads, block]`, float32."""
        return squared_shares(read, self.queries, self.far)

    def compress(self, read: LayerRead, observed: torch.Tensor) -> list[Pairs]:
        """See `PairCompressor.compress`."""
        first, end = read.block
        worth = squared_shares(read, self.queries) + observed
        worth = worth * read.values[:, :, first:end].float().square().sum(-1)
        return [self._kept(read, worth[..., a - first : b - first], a, b) for a, b in read.chunks]

    def _kept(self, read: LayerRead, worth: torch.Tensor, first: int, end: int) -> Pairs:
        count = min(self.most_by_layer[read.layer], end - first)
        places = worth.topk(count, -1).indices.sort(-1).values
        keys, values = read.keys[:, :, first:end], read.values[:, :, first:end]
        return (
            keys.gather(2, places[..., None].expand(-1, -1, -1, keys.shape[-1])),
            values.gather(2, places[..., None].expand(-1, -1, -1, values.shape[-1])),
            places,
        )


def squared_shares(read: LayerRead, most: int, far: int = 0) -> torch.Tensor:
    """Squares of the shares of attention that queries give each slot of a block, summed over them.

    Args:
        read: of one layer; queries that share a head of the keys count together.
        most: queries that count at most, evenly spaced; the sum is scaled up to all of them.
        far: only slots at this distance or further from a query count, in slots.

    Returns:
        `[B, heads, block]`, float32.
    """
    keys, (first, end) = read.keys, read.block
    rows, heads, slots, _ = keys.shape
    asked = read.queries.shape[2]
    step = -(-asked // most)
    at = torch.arange(slots - asked, slots, step, device=keys.device)
    if far:
        at = at[at >= first + far]
    total = torch.zeros(rows, heads, end - first, device=keys.device)
    groups = read.queries.shape[1] // heads
    sinks = None
    if read.sinks is not None:
        sinks = read.sinks.float().view(1, heads, groups, 1, 1).expand(rows, -1, -1, -1, -1)
    order = torch.arange(slots, device=keys.device)
    tile = max(1, TILE // (rows * heads * groups * slots))
    for start in range(0, len(at), tile):
        some = at[start : start + tile]
        queries = read.queries[:, :, some - (slots - asked)].unflatten(1, (heads, groups))
        products = torch.matmul(queries, keys[:, :, None].transpose(-1, -2)).float() * read.scaling
        if read.softcap is not None:
            products = read.softcap * (products / read.softcap).tanh()
        products.masked_fill_(order > some[:, None], float("-inf"))
        whole = products.logsumexp(-1, keepdim=True)
        if sinks is not None:
            whole = torch.logaddexp(whole, sinks.expand_as(whole))
        shares = (products[..., first:end] - whole).exp_()
        if far:
            shares.masked_fill_(some[:, None] - order[first:end] < far, 0.0)
        total += shares.square_().sum((2, 3))
    return total * step
