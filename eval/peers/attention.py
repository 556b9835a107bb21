"""Attention over a cache of which every layer and KV head keeps other positions, and as many as it likes.

Axes: `B` rows, `H` heads, `G` KV heads, `P` positions held from before, `Q` positions read now, `K` = `P + Q`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AttentionInterface, DynamicCache

NAME = "peers"  # of this attention among those of transformers


class MaskedAttention:
    """SDPA that makes its masks itself: causal, a layer's sliding window, and what a KV head does not keep.

    kvpress overwrites the keys that a head does not keep by one whose product with all queries is negative. That
    needs a hyperplane below all queries of a pass, which is not always found, and leaves weights that are small,
    not zero. What is masked here has no influence at all.
    """

    def __init__(self) -> None:
        self.valid: dict[int, torch.Tensor] = {}  # by layer `[B, G, P]`, where not all that is held counts

    @contextmanager
    def using(self, valid: dict[int, torch.Tensor]) -> Iterator[None]:
        """What counts of the cache that is read inside."""
        before, self.valid = self.valid, valid
        try:
            yield
        finally:
            self.valid = before

    def mask(
        self, layer: int, queries: int, keys: int, sliding: int | None, like: torch.Tensor
    ) -> torch.Tensor | None:
        """`[1, 1, Q, K]` or `[B, G, Q, K]`, True where seen; None where all is, or all before a query from 0 on."""
        valid = self.valid.get(layer)
        past = keys - queries
        near = sliding is None or keys <= sliding
        if valid is None and near and (queries == 1 or past == 0):
            return None
        at = torch.arange(keys, device=like.device)
        own = at[past:, None]
        seen = at <= own if near else (at <= own) & (at > own - sliding)
        if valid is None:
            return seen[None, None]
        ones = valid.new_ones((*valid.shape[:2], keys - valid.shape[2]))
        return seen & torch.cat([valid, ones], 2)[:, :, None]

    def __call__(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        dropout: float = 0.0,
        scaling: float | None = None,
        sliding_window: int | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """As transformers calls it: query `[B, H, Q, C]`, key and value `[B, G, K, C]` to `[B, Q, H, C]`."""
        mask = self.mask(module.layer_idx, query.shape[2], key.shape[2], sliding_window, query)
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = (part.repeat_interleave(groups, 1) for part in (key, value))
        if mask is not None and mask.shape[1] > 1:
            mask = mask.repeat_interleave(groups, 1)
        causal = mask is None and query.shape[2] > 1
        out = F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal, scale=scaling)
        return out.transpose(1, 2).contiguous(), None


_ATTENTION = MaskedAttention()


def install() -> MaskedAttention:
    """Registers the one of this process as `NAME`, to be named as `attn_implementation`."""
    AttentionInterface.register(NAME, _ATTENTION)
    return _ATTENTION


def decoder(model: Any) -> Any:
    """The part of a model that has its layers."""
    return getattr(model.model, "language_model", model.model)


def slides(layer: Any) -> bool:
    """Whether a layer sees only a window; what it caches is bounded anyway, so it is left as it is."""
    return getattr(layer.self_attn, "sliding_window", None) is not None


def shortened(whole: Any, kept: Sequence[torch.Tensor | None]) -> tuple[DynamicCache, dict[int, torch.Tensor]]:
    """A cache of the kept positions, without the last one: that is read again, as the first of what follows.

    Heads that keep fewer positions than others of the layer are filled up; which ones count is told.

    Args:
        whole: a cache of `L` positions.
        kept: by layer `[B, G, L]`, or None for all.

    Returns:
        The cache, and for `MaskedAttention.using` by layer `[B, G, P]`.
    """
    cache, valid = DynamicCache(), {}
    for index, (layer, keep) in enumerate(zip(whole.layers, kept, strict=True)):
        keys, values = layer.keys[:, :, :-1], layer.values[:, :, :-1]
        if keep is not None:
            keep = keep[..., : keys.shape[2]]
            counts = keep.sum(-1)
            width = int(counts.max())
            order = keep.to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices[..., :width]
            order = order[..., None].expand(-1, -1, -1, keys.shape[3])
            keys, values = keys.gather(2, order), values.gather(2, order)
            if int(counts.min()) < width:
                valid[index] = torch.arange(width, device=keys.device) < counts[..., None]
        cache.update(keys, values, index)
    return cache, valid
