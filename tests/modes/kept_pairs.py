"""A mode that lives in the tests: of a chunk it keeps the key-value pairs that what follows attended to most."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from hf_crouter.types import Entries, Parts

CHUNK = 32


def kept(chunk):
    """Pairs that stay of the chunk of this number: 8 of one and 16 of the next."""
    return 16 if chunk % 2 else 8


@dataclass(frozen=True)
class KeptPairs:
    """Pairs of each head at their true positions, as many as `kept` says."""

    name: ClassVar[str] = "kept_pairs"
    gives: ClassVar[tuple[str, ...]] = ("entries",)
    needs_crouter: ClassVar[bool] = False

    prefix: int = 3
    block: int = 2 * CHUNK

    def bind(self, setting):
        return Parts(compressor=MostAttended(self.prefix, self.block))


class MostAttended:
    key, most, positions, beside_raw, ids_decide = "kept_pairs", 16, "true", False, False

    def __init__(self, prefix, block):
        self.prefix, self.block, self.asked = prefix, block, 0

    def compress(self, reads):
        self.asked += len(reads)
        return [self.pairs(read) for read in reads]

    def pairs(self, read):
        first, end = read.slots
        visible, keys, values = read.visible(), [], []
        for layer in read.layers:
            if layer is None:
                keys.append(None)
                values.append(None)
                continue
            heads = layer.keys.shape[0]
            queries = layer.queries.unflatten(0, (heads, -1))
            scores = torch.einsum("hgfd,hsd->hgfs", queries, layer.keys) * layer.scaling
            shares = scores.masked_fill(~visible, float("-inf")).softmax(-1)[..., first:end]
            top = shares.sum((1, 2)).topk(kept((read.chunk.start - self.prefix) // CHUNK)).indices.sort(-1).values
            pick = (top + first)[..., None].expand(-1, -1, layer.keys.shape[-1])
            keys.append(layer.keys.gather(1, pick))
            values.append(layer.values.gather(1, pick))
        return Entries(keys=tuple(keys), values=tuple(values))
