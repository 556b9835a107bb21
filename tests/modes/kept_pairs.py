"""A mode that lives in the tests: of a chunk it keeps the key-value pairs that what follows attended to most."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from hf_crouter.types import Pairs, Parts

CHUNK = 32


def kept(chunk, layer):
    """Pairs that stay of the chunk of this number: 8 of one and 16 of the next, in odd layers half as many."""
    return (16 if chunk % 2 else 8) // (1 + layer % 2)


@dataclass(frozen=True)
class KeptPairs:
    """Pairs of each head, as many as `kept` says."""

    name: ClassVar[str] = "kept_pairs"
    gives: ClassVar[tuple[str, ...]] = ("entries",)
    needs_crouter: ClassVar[bool] = False

    prefix: int = 3
    block: int = 2 * CHUNK

    def bind(self, setting):
        kinds = getattr(setting.host.config, "layer_types", None) or ["full_attention"] * 2
        most = tuple(kept(1, n) if kind == "full_attention" else 0 for n, kind in enumerate(kinds))
        return Parts(compressor=MostAttended(self.prefix, self.block, most))


class MostAttended:
    key = "kept_pairs"
    reads = True

    def __init__(self, prefix, block, most):
        self.prefix, self.size, self.most_by_layer, self.asked = prefix, block, most, 0
        self.most = -(-sum(most) // sum(count > 0 for count in most))

    def block(self, tokens):
        return self.size

    def compress(self, read, observed):
        own = read.own[-1][1] - read.own[0][0] if read.own else None
        if not read.chunks:
            return None, own
        assert observed == read.chunks[-1][1] - read.chunks[0][0]
        self.asked += len(read.chunks) * len(read.keys) * (read.layer == 1)
        rows, heads, slots = read.keys.shape[:3]
        asked = read.queries.shape[2]
        visible = torch.ones(asked, slots, dtype=torch.bool, device=read.keys.device).tril(slots - asked)
        scores = torch.einsum("bhgfd,bhsd->bhgfs", read.queries.unflatten(1, (heads, -1)), read.keys) * read.scaling
        shares = scores.masked_fill(~visible, float("-inf")).softmax(-1).sum((2, 3))
        pairs, counts = [], []
        for n, (first, end) in enumerate(read.chunks):
            number = self.is_odd(read) + n
            top = shares[..., first:end].topk(kept(number, read.layer)).indices.sort(-1).values
            pick = (top + first)[..., None].expand(-1, -1, -1, read.keys.shape[-1])
            pairs.append((read.keys.gather(2, pick), read.values.gather(2, pick), top))
            counts.append(top.shape[-1])
        return Pairs(*(torch.cat(kind, 2) for kind in zip(*pairs, strict=True)), tuple(counts)), own

    def is_odd(self, read):
        """Whether the block's first chunk has an odd number: told by the pairs before it."""
        first, both = kept(0, read.layer), kept(0, read.layer) + kept(1, read.layer)
        return (read.chunks[0][0] - self.prefix) % both == first
