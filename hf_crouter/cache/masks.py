"""Masks and positions of a cache's slots, as a host's forward wants them.

Without pairs slots are consecutive and the host makes its masks itself. With pairs layers have keys of different
numbers: each gets a mask of its own. A query sees the raw tokens before it (in a sliding layer those that are near)
and the pairs of the chunks before it, but of no chunk that stands raw. In a compact row all pairs stand before the
retrieved chunks, which see them too.
"""

from __future__ import annotations

import contextlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right
from transformers import StaticCache

from ..hosts.attention import EAGER, attention_met, sliding_layers
from ..hosts.devices import input_device
from ..types import Row
from .kv_cache import ROOM, CompressedCache
from .layout import PAD
from .pairs import PairPlaces
from .positions import key_positions, slot_positions

STEP = 64  # most queries of a forward whose masks are kept


class LayerMasks(ABC):
    """Masks of a forward over a cache with pairs, layer by layer."""

    @property
    @abstractmethod
    def queries(self) -> int:
        """T."""

    @property
    @abstractmethod
    def stand_in(self) -> torch.Tensor:
        """What the host is given for a mask: it takes one of four axes as it is and makes none."""

    @abstractmethod
    def of(self, layer: int, keys: int) -> torch.Tensor | None:
        """The mask of a layer with so many keys, `[B, 1, T, keys]`; None where every query sees every key."""

    @abstractmethod
    def stacked(self, sizes: list[int]) -> torch.Tensor:
        """All layers' masks in one, `[B, layers, T, most keys]`, given each layer's number of keys."""


class ForwardMasks(LayerMasks):
    """Masks of one forward, made when they are asked for.

    Args:
        host: the plain host.
        seen: whether a query sees the pairs of a chunk, `[B, T, C]`, bool.
        places: which chunk's pair stands in each column.
        raw: whether a query sees a raw slot, `[B, T, S]`, bool.
        near: the same in a sliding layer; None without such layers.
        device: of the host's inputs.
        fixed: whether layers hold empty slots behind the raw ones (static caches).
    """

    def __init__(
        self,
        host: Any,
        seen: torch.Tensor,
        places: PairPlaces,
        raw: torch.Tensor,
        near: torch.Tensor | None,
        device: torch.device,
        fixed: bool = False,
    ):
        self.slides, self.places, self.fixed, self.window = sliding_layers(host), places, fixed, _window(host)
        step = raw.shape[1] == 1 and not fixed
        self.open = step and bool(raw.all()) and bool(seen.all())
        self.seen, self.raw, self.near = seen.to(device), raw.to(device), near.to(device) if near is not None else None
        self.floats = host.dtype if _implementation(host) == EAGER else None
        self.known: dict[tuple[int, int], torch.Tensor | None] = {}
        self.every: torch.Tensor | None = None  # which pairs are seen, of all layers

    @property
    def queries(self) -> int:
        """See `LayerMasks.queries`."""
        return self.raw.shape[1]

    @property
    def stand_in(self) -> torch.Tensor:
        """See `LayerMasks.stand_in`."""
        return self.raw[:, None, :, -1:]

    def of(self, layer: int, keys: int) -> torch.Tensor | None:
        """See `LayerMasks.of`."""
        owner = self.places.owners[layer] if layer < self.places.layers else None
        slides = layer < len(self.slides) and self.slides[layer]
        key = (-1 if slides else id(owner)), keys
        if key not in self.known:
            if self.queries > STEP:
                self.known.clear()  # large ones are not kept
            self.known[key] = self._made(owner, layer, keys, slides)
        return self.known[key]

    def _made(self, owner: torch.Tensor | None, layer: int, keys: int, slides: bool) -> torch.Tensor | None:
        if slides and self.near is not None:
            mask = self.near[..., self._first_near(keys) :][..., :keys]
        elif self.open and (owner is None or self.places.is_whole(layer)):
            return None
        elif owner is None or not owner.shape[1]:
            mask = self.raw
        else:
            mask = torch.cat([self._pairs(layer, owner.shape[1]), self.raw], 2)
        return _in_dtype(F.pad(mask, (0, keys - mask.shape[2]))[:, None], self.floats)

    def _pairs(self, layer: int, count: int) -> torch.Tensor:
        """Whether a query sees each of a layer's pairs, `[B, T, count]`."""
        columns, numbers = self.places.stacked(self.seen.device)
        number = numbers[layer]
        if self.queries > STEP:
            return self._of_columns(columns[number : number + 1, :, :count])[0]
        if self.every is None:
            self.every = self._of_columns(columns)
        return self.every[number, ..., :count]

    def _of_columns(self, columns: torch.Tensor) -> torch.Tensor:
        """Whether a query sees the pair in each of the columns `[U, B, W]`: `[U, B, T, W]`."""
        places = columns.clamp(min=0)[:, :, None].expand(-1, -1, self.queries, -1)
        return self.seen.expand(len(columns), -1, -1, -1).gather(3, places) & (columns >= 0)[:, :, None]

    def _first_near(self, keys: int) -> int:
        """First raw slot that a sliding layer with so many keys still has."""
        queries, slots = self.raw.shape[1:]
        return max(0, slots - queries - self.window + 1 if self.fixed else slots - keys)

    def stacked(self, sizes: list[int]) -> torch.Tensor:
        """See `LayerMasks.stacked`."""
        most = max(sizes)
        masks = [self.of(layer, keys) for layer, keys in enumerate(sizes)]
        least = torch.finfo(self.floats).min if self.floats is not None else False
        return torch.cat(
            [F.pad(mask, (0, most - mask.shape[3]), value=least) for mask in masks if mask is not None], 1
        )


def cache_masks(
    host: Any, cache: CompressedCache, positions: torch.Tensor, columns: int, device: torch.device
) -> ForwardMasks:
    """Masks of a forward over the last slots of a cache with pairs.

    Args:
        host: the plain host.
        cache: whose `layout` already holds these slots, though its layers do not.
        positions: of all slots, `[B, S]`.
        columns: of the forward.
        device: of the host's inputs.
    """
    places = cache.places
    assert places is not None
    work = device if columns > STEP else cache.layout.device  # a step's are small
    layout, positions = cache.layout.to(work), positions.to(work)
    first = layout.shape[1] - columns
    at, own = cache.layout[:, first:], positions[:, first:]
    order = torch.arange(layout.shape[1], device=work)
    same = order[None] == order[first:, None]
    raw = (layout != PAD)[:, None] & (order[None] <= order[first:, None])[None]
    near = None
    if any(sliding_layers(host)):
        near = (raw & (own[:, :, None] - positions[:, None] < _window(host))) | same
    raw = raw | same  # so that padding sees something
    return ForwardMasks(host, _seen(cache.rows, at), places, raw, near, device, fixed=isinstance(cache, StaticCache))


def _seen(rows: tuple[Row, ...], at: torch.Tensor) -> torch.Tensor:
    """Whether these tokens `[B, T]` of rows see each chunk's pairs, `[B, T, C]`; of no chunk that stands raw."""
    chunks, never = max(1, *(len(row.chunks) for row in rows)), torch.iinfo(torch.long).max
    ends = []
    for row in rows:
        raw = set(row.retrieved)
        own = [never if n in raw else (row.prefix or 0) if row.compact else chunk.end
               for n, chunk in enumerate(row.chunks)]  # fmt: skip
        ends.append(own + [never] * (chunks - len(own)))
    return torch.tensor(ends)[:, None] <= at[:, :, None]


class StepMasks(LayerMasks):
    """Masks and positions of forwards of one token a row, as long as the rows stay as they are: little is made anew.

    A later token sees what the first one sees, and the tokens between.

    Args:
        host: the plain host; without sliding layers.
        cache: whose `layout` already holds the first token's slot.
        device: of the host's inputs.
    """

    def __init__(self, host: Any, cache: CompressedCache, device: torch.device):
        self.rows, self.device, self.first = cache.rows, device, cache.layout.shape[1]
        self.at = self.first  # slots that stand now
        self.floats = host.dtype if _implementation(host) == EAGER else None
        positions = slot_positions(cache.rows, cache.layout, cache.places is not None, key_positions(host))
        self.positions = positions[:, -1:].to(device)
        most = [sys.maxsize if row.end is None else key_positions(host) or sys.maxsize for row in cache.rows]
        self.most = torch.tensor(most, device=device)[:, None] - 1 if min(most) < sys.maxsize else None
        self.leading = (cache.layout == PAD).sum(1)
        self.padded = bool(self.leading.any())
        self.known: dict[int, torch.Tensor] = {}  # by a layer's owners
        self.real: torch.Tensor | None = None
        self.all: torch.Tensor | None = None  # of all layers of a static cache
        if cache.places is not None:
            self.places = cache.places
            self.seen = _seen(cache.rows, cache.layout[:, -1:])
            self.open = not self.padded and bool(self.seen.all())

    def holds(self, cache: CompressedCache) -> bool:
        """Whether the rows are still what they were."""
        return cache.rows is self.rows and cache.layout.shape[1] >= self.first

    def positions_now(self) -> torch.Tensor:
        """Position of each row's last token, `[B, 1]`."""
        found = self.positions + (self.at - self.first)
        return found if self.most is None else torch.minimum(found, self.most)

    def slots(self) -> torch.Tensor | None:
        """The mask `[B, slots]`, int64, of a cache without pairs; None without padding."""
        if not self.padded:
            return None
        if self.real is None or self.real.shape[1] < self.at:
            self.real = self._raw(self.at + ROOM).long()
        return self.real[:, : self.at]

    def _raw(self, slots: int) -> torch.Tensor:
        return torch.arange(slots, device=self.device) >= self.leading.to(self.device)[:, None]

    @property
    def queries(self) -> int:
        """See `LayerMasks.queries`."""
        return 1

    @property
    def stand_in(self) -> torch.Tensor:
        """See `LayerMasks.stand_in`."""
        return torch.ones(len(self.rows), 1, 1, 1, dtype=torch.bool, device=self.device)

    def of(self, layer: int, keys: int) -> torch.Tensor | None:
        """See `LayerMasks.of`; of a dynamic cache."""
        owner = self.places.owners[layer] if layer < self.places.layers else None
        if self.open and (owner is None or self.places.is_whole(layer)):
            return None
        known = self.known.get(id(owner))
        if known is None or known.shape[3] < keys:
            count = owner.shape[1] if owner is not None else 0
            mask = torch.cat([self._pairs_seen(owner), self._raw(keys - count + ROOM)], 1)
            known = self.known[id(owner)] = _in_dtype(mask[:, None, None], self.floats)
        return known[..., :keys]

    def _pairs_seen(self, owner: torch.Tensor | None) -> torch.Tensor:
        """Whether a row's last token sees each pair of a layer, `[B, columns]`."""
        if owner is None:
            return torch.empty(len(self.rows), 0, dtype=torch.bool, device=self.device)
        return (self.seen[:, 0].gather(1, owner.clamp(min=0)) & (owner >= 0)).to(self.device)

    def stacked(self, sizes: list[int]) -> torch.Tensor:
        """See `LayerMasks.stacked`: of a static cache, in whose buffers each step opens one slot more a layer."""
        if self.all is None:
            made = {}
            for owner in self.places.owners:
                if id(owner) not in made:
                    mask = torch.cat([self._pairs_seen(owner), self._raw(self.at)], 1)
                    made[id(owner)] = F.pad(mask, (0, max(sizes) - mask.shape[1]))
            mask = torch.stack([made[id(owner)] for owner in self.places.owners], 1)[:, :, None]
            self.all = _in_dtype(mask, self.floats)
            firsts = [self.places.width(layer) + self.first - 1 for layer in range(len(sizes))]
            self.firsts = torch.tensor(firsts, device=self.device)[None, :, None, None].expand(len(mask), -1, 1, 1)
            self.opened = self.at
        for slots in range(self.opened, self.at):
            seen = True if self.floats is None else 0.0
            self.all.scatter_(3, self.firsts + (slots + 1 - self.first), seen)
        self.opened = self.at
        return self.all


class PieceMasks:
    """Masks of a read of one piece over pairs and raw tokens, all of which it sees, as it sees itself: causally.

    Args:
        host: the plain host.
        before: positions of the raw tokens, `[S]`.
        piece: of its own, `[T]`, behind them.
        device: of the host's inputs.
    """

    def __init__(self, host: Any, before: torch.Tensor, piece: torch.Tensor, device: torch.device):
        self.slides, self.queries, self.device = sliding_layers(host), len(piece), device
        self.floats = host.dtype if _implementation(host) == EAGER else None
        self.implied = masked_by_kernel(host, device)
        self.near: torch.Tensor | None = None
        if any(self.slides):
            at, own = torch.cat([before, piece]).to(device), piece.to(device)[:, None]
            self.near = (at <= own) & (own - at < _window(host))
        self.known: tuple[tuple[bool, int], torch.Tensor] | None = None

    @property
    def stand_in(self) -> torch.Tensor:
        """What the host is given for a mask: it takes one of four axes as it is and makes none."""
        return torch.ones(1, 1, self.queries, 1, dtype=torch.bool, device=self.device)

    def of(self, layer: int, keys: int) -> torch.Tensor:
        """The mask of a layer with so many keys, `[1, 1, T, keys]`, or what has SDPA's kernels mask it themselves."""
        key = self.slides[layer], keys
        if self.known is None or self.known[0] != key:  # large: layers that follow each other mostly share it
            self.known = key, self._made(self.slides[layer], keys)
        return self.known[1]

    def _made(self, slides: bool, keys: int) -> torch.Tensor:
        if slides and self.near is not None:
            mask = self.near[:, self.near.shape[1] - keys :]
        elif self.implied:
            return causal_lower_right(self.queries, keys)
        else:
            mask = torch.ones(self.queries, keys, dtype=torch.bool, device=self.device).tril(keys - self.queries)
        return _in_dtype(mask[None, None], self.floats)


def masked_by_kernel(host: Any, device: torch.device) -> bool:
    """Whether a causal read needs no mask in memory: a large one would take more than what is read."""
    return _implementation(host) == "sdpa" and device.type == "cuda"


def mask_and_positions(
    host: Any, cache: CompressedCache, columns: int, device: torch.device
) -> tuple[torch.Tensor | LayerMasks | None, torch.Tensor]:
    """What goes with a forward over the last `columns` slots.

    Args:
        host: the plain host.
        cache: whose `layout` already holds these slots, though its layers do not.
        columns: slots of the forward.
        device: of the host's inputs.

    Returns:
        Mask of all slots `[B, S]`, None without padding, or with pairs one a layer; and positions `[B, columns]`.
    """
    pairs = cache.places is not None
    positions = slot_positions(cache.rows, cache.layout, pairs, key_positions(host))
    some = positions[:, positions.shape[1] - columns :]
    some = some.clone(memory_format=torch.contiguous_format).to(device)  # a changing stride would recompile every step
    if pairs:
        return cache_masks(host, cache, positions, columns, device), some
    real = cache.layout != PAD
    return None if bool(real.all()) else real.long().to(device), some


def window_masks(
    host: Any, cache: CompressedCache, columns: int, device: torch.device
) -> tuple[torch.Tensor | LayerMasks | None, torch.Tensor]:
    """The same where the last columns are tokens of the window: of one token little is made anew."""
    if columns > 1 or any(sliding_layers(host)):
        return mask_and_positions(host, cache, columns, device)
    step = cache.step_masks
    if not isinstance(step, StepMasks) or not step.holds(cache):
        step = cache.step_masks = StepMasks(host, cache, device)
    step.at = cache.layout.shape[1]
    return step if cache.places is not None else step.slots(), step.positions_now()


@contextlib.contextmanager
def given_to(host: Any, mask: torch.Tensor | LayerMasks | None) -> Iterator[torch.Tensor | None]:
    """A block in which forwards read by a mask; gives what to pass to them as theirs."""
    if not isinstance(mask, LayerMasks):
        yield mask
        return
    with attention_met(host, mask.of):
        yield mask.stand_in


def over_buffers(host: Any, cache: CompressedCache, mask: Any) -> Any:
    """A mask `[B, S]` as long as the keys of a static cache, for hosts that make their ALiBi of it (BLOOM).

    In decoding such a host's own `prepare_inputs_for_generation` does the same.
    """
    if not isinstance(cache, StaticCache) or not hasattr(host.base_model, "build_alibi_tensor"):
        return mask
    if isinstance(mask, LayerMasks):
        return mask
    if mask is None:
        mask = (cache.layout != PAD).long().to(input_device(host))
    return F.pad(mask, (0, max(0, int(cache.get_max_length()) - mask.shape[1])))


def _window(host: Any) -> int:
    return getattr(host.config.get_text_config(decoder=True), "sliding_window", None) or sys.maxsize // 2


def _implementation(host: Any) -> str:
    return host.config.get_text_config(decoder=True)._attn_implementation


def _in_dtype(mask: torch.Tensor, floats: torch.dtype | None) -> torch.Tensor:
    """A mask as eager attention adds it to the products, in their dtype; None: as it is, bool."""
    if floats is None:
        return mask
    return torch.zeros_like(mask, dtype=floats).masked_fill(~mask, torch.finfo(floats).min)
