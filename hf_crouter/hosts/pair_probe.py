"""A host whose pairs nobody compacted yet: do its layers attend to what they show, and to what they cache?"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any, cast

import torch
from transformers import DynamicCache

from ..errors import InputError
from .attention import EAGER, Attention, attention_met, sliding_layers
from .devices import input_device
from .families import check_compact, is_tested
from .probe import LENGTH, OTHER, TOLERANCE

_SHOWN: weakref.WeakSet[Any] = weakref.WeakSet()  # hosts whose layers do


def check_pairs(host: Any) -> None:
    """Refuses a host whose key-value pairs cannot be compacted; one of an unknown family is tried, once.

    Raises:
        InputError: what is known of it, or what its layers do otherwise.
    """
    check_compact(host)
    if is_tested(host) or host in _SHOWN:
        return
    why = next(_found_by_trying(host), "")
    if why:
        raise InputError(
            f"host: expected one whose key-value pairs can be compacted, got {type(host).__name__}, which {why}"
        )
    _SHOWN.add(host)


@torch.no_grad()
def _found_by_trying(host: Any) -> Iterator[str]:
    """Why not: of a short text read by masks that equal the host's own, but are given as those of pairs are."""
    config, device = host.config.get_text_config(decoder=True), input_device(host)
    ids = (7 + 31 * torch.arange(LENGTH, device=device))[None] % config.vocab_size
    positions = torch.arange(LENGTH, device=device)
    back = positions[:, None] - positions
    seen = [(back >= 0) & (back < (config.sliding_window if slides else LENGTH)) for slides in sliding_layers(host)]
    cache, shown = DynamicCache(config=config), cast(list[Attention], [])
    whole = host(input_ids=ids, use_cache=False).logits[0].float()
    try:
        with attention_met(host, lambda layer, keys: _given(host, seen[layer]), shown.append):
            read = host(input_ids=ids, past_key_values=cache, attention_mask=seen[0][None, None, :, -1:],
                        position_ids=positions[None], use_cache=True).logits[0].float()  # fmt: skip
    except InputError:
        raise
    except Exception as error:  # whatever a host that cannot do it raises
        said = f"{type(error).__name__}: {error}".partition("\n")[0]
        yield f"cannot be given masks layer by layer ({said})"
        return
    if [one.layer for one in shown] != list(range(config.num_hidden_layers)):
        yield "attends in some layer not once but more often, or not at all"
        return
    allowed = TOLERANCE.get(host.dtype, OTHER)
    for one in shown:
        held = next(iter(cache.layers[one.layer :]), None)
        stored = getattr(held, "keys", None), getattr(held, "values", None)
        if not (_ends_in(one.keys, stored[0]) and _ends_in(one.values, stored[1])):
            yield f"attends in layer {one.layer} to other keys and values than it caches"
        expected = _attended(one, seen[one.layer])
        apart = float((one.outputs - expected).norm() / expected.norm().clamp(min=1e-9))
        if not apart <= allowed:
            yield f"attends in layer {one.layer} otherwise than its queries and keys say ({apart:.1%} off)"
    spread = (whole - whole.mean(-1, keepdim=True)).norm()
    apart = float((read - whole).norm() / spread.clamp(min=1e-9))
    if not apart <= allowed:
        yield f"reads otherwise by equal masks that are given layer by layer ({apart:.1%} of its logits' spread)"


def _attended(shown: Attention, seen: torch.Tensor) -> torch.Tensor:
    """What a layer's attention should have given, `[B, T, query heads, D]`; `seen [T, S]`: which query sees which."""
    groups = shown.queries.shape[1] // shown.keys.shape[1]
    keys, values = (part.repeat_interleave(groups, 1).float() for part in (shown.keys, shown.values))
    products = shown.queries.float() @ keys.transpose(-1, -2) * shown.scaling
    if shown.softcap is not None:
        products = shown.softcap * (products / shown.softcap).tanh()
    products = products.masked_fill(~seen.to(products.device), float("-inf"))
    if shown.sinks is not None:
        sinks = shown.sinks.float()[:, None, None].expand(*products.shape[:-1], 1)
        products = torch.cat([products, sinks], -1)
    return (products.softmax(-1)[..., : keys.shape[2]] @ values).transpose(1, 2)


def _given(host: Any, seen: torch.Tensor) -> torch.Tensor:
    """A mask as the host's attention takes it, `[1, 1, T, S]`."""
    if host.config.get_text_config(decoder=True)._attn_implementation == EAGER:
        seen = torch.zeros_like(seen, dtype=host.dtype).masked_fill(~seen, torch.finfo(host.dtype).min)
    return seen[None, None]


def _ends_in(whole: torch.Tensor, part: torch.Tensor | None) -> bool:
    """Whether keys or values `[B, heads, S, D]` end in those that are cached: all, or those in a sliding window."""
    if part is None or part.shape[:2] != whole.shape[:2]:
        return False
    return torch.equal(whole[:, :, whole.shape[2] - part.shape[2] :], part)
