"""How a host rotates the keys that it caches, found out by trying; and cached keys moved to other positions.

One token alone has the same hidden states in every layer wherever it stands, as long as positions do nothing but
rotate queries and keys: it attends to its own key. So a few tokens, each alone, are read at a few positions, and what
the cache holds of them there is compared with what it holds at position 0.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ..errors import InputError
from .devices import input_device
from .positions import max_positions
from .rope import rope_switch

TOKENS = 5  # each alone at every position; their median counts, as one may be routed otherwise by a rounding
POSITIONS = 2048  # that are tried of a host that names no limit
TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 0.02}  # of a length; coarser dtypes have OTHER
OTHER = 0.05
# Attention sinks take part of a token's own attention, by a product that rounding changes from position to position:
DEEPER = 6  # tolerances by which what is cached after the first layer may differ
CARRIED = 4  # times that difference by which keys may differ more
TINY = 1e-30  # a length that may be divided by

_FOUND: weakref.WeakKeyDictionary[Any, tuple[torch.dtype, KeyRotation | str]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Turn:
    """How one layer rotates: pairs of a key's dimensions, each by an angle of its own.

    Attributes:
        first: the dimensions that come first in their pairs.
        second: their partners, in the same order.
        frequencies: radians a position, `[pairs]` float64 on the CPU; negative where it turns the other way.
    """

    first: slice
    second: slice
    frequencies: Tensor

    def turned(self, keys: Tensor, angles: Tensor) -> Tensor:
        """Keys `[..., D]` rotated by `angles [..., pairs]` (radians), in the keys' dtype."""
        cos, sin = (part.to(keys.device, keys.dtype) for part in (angles.cos(), angles.sin()))
        first, second, turned = keys[..., self.first], keys[..., self.second], keys.clone()
        turned[..., self.first] = first * cos - second * sin
        turned[..., self.second] = second * cos + first * sin
        return turned


@dataclass(frozen=True)
class KeyRotation:
    """Moves keys that a host has cached to other positions.

    Attributes:
        turns: how each layer of the cache rotates; None for one whose keys know no positions, or that caches none.
        limit: slots up to which every text is rotated by these frequencies; None for a host that has no others.
    """

    turns: tuple[Turn | None, ...]
    limit: int | None = None

    @classmethod
    def of(cls, host: Any) -> KeyRotation:
        """How a host rotates its keys, by one forward over about a hundred tokens; found out once a host.

        Args:
            host: the plain host.

        Raises:
            InputError: positions do more, or something else, than rotate its keys: what, and in which layer.
        """
        dtype, found = _FOUND.get(host, (None, None))
        if found is None or dtype != host.dtype:  # casting a host rounds its frequencies
            try:
                found = cls(*_find(host))
            except InputError as error:
                if error.__cause__ is not None:  # it may not have been the host's fault
                    raise
                found = str(error)
            _FOUND[host] = host.dtype, found
        if isinstance(found, str):
            raise InputError(found)
        return found

    def check(self, slots: int) -> None:
        """Refuses a text of so many slots that the host rotates it by other frequencies.

        Raises:
            InputError: names both numbers.
        """
        if self.limit is not None and slots > self.limit:
            raise InputError(
                f"host: expected at most {self.limit} positions, as it rotates longer texts by other frequencies, got "
                f"{slots}"
            )

    def moved(self, keys: Tensor, by: Tensor, layer: int) -> Tensor:
        """Keys as the layer would have stored them at other positions.

        Args:
            keys: `[..., heads, n, D]`, as the layer has stored them, of a text that `check` accepts.
            by: new position minus old one of each, int64, `[n]` or with more of the keys' axes before it.
            layer: number of the layer in the cache.

        Returns:
            float32 (float64 of such keys), of the same shape; not a copy where nothing is to be done.

        Raises:
            InputError: some are moved farther than the positions that `check` accepts.
        """
        turn, keys = self.turns[layer], keys if keys.dtype == torch.float64 else keys.float()
        if turn is None:
            return keys
        if self.limit is not None and by.numel():
            self.check(int(by.abs().max()) + 1)
        place = torch.device("cpu") if keys.device.type == "mps" else keys.device  # which knows no float64
        return turn.turned(keys, by.to(place, torch.float64)[..., None] * turn.frequencies.to(place))


def _find(host: Any) -> tuple[tuple[Turn | None, ...], int | None]:
    name = type(host).__name__
    if getattr(host.config.get_text_config(decoder=True), "kv_lora_rank", None):
        raise InputError(f"host: expected plain keys in its cache, got {name}, whose attention caches latents")
    limit = _limit(host)
    last = max((limit or max_positions(host) or POSITIONS) - 2, 1)  # below the last: there nothing is reset (dynamic)
    powers = [1 << k for k in range(last.bit_length())]
    positions = torch.tensor(sorted({0, *powers, last // 7, last // 3, last}))
    cached = _cached(host, positions)
    frequencies = _frequencies(host)  # after a forward, which sets those of a short text
    most = max(TOLERANCE.get(keys.dtype, OTHER) for keys, _ in cached if keys is not None)
    turns: list[Turn | None] = []
    for layer, (keys, others) in enumerate(cached):
        apart = torch.tensor([0.0, *map(_apart, others)]).max().item()
        if not apart <= most * (DEEPER if layer else 1):
            raise InputError(
                f"host: expected positions that do nothing but rotate keys, got {name}, of which layer {layer} caches "
                "more that depends on them (as with learned positions, or an index)"
            )
        allowed = most + CARRIED * apart
        turn = None if keys is None else _turn_of(keys, positions, frequencies, allowed)
        if keys is not None and not _misfit(keys, positions, turn) <= allowed:
            raise InputError(
                f"host: expected cached keys that are rotated for their positions, got {name}, whose keys of layer "
                f"{layer} depend on positions in another way"
            )
        turns.append(turn)
    return tuple(turns), limit


def _limit(host: Any) -> int | None:
    config = host.config.get_text_config(decoder=True)
    parameters = getattr(config, "rope_parameters", None) or {}
    sets = [parameters, *(value for value in parameters.values() if isinstance(value, Mapping))]
    grows = any("dynamic" in str(some.get("rope_type", some.get("type"))) for some in sets)
    limits = (rope_switch(host), max_positions(host) if grows else None)
    return min((limit for limit in limits if limit), default=None)


@torch.no_grad()
def _cached(host: Any, positions: Tensor) -> list[tuple[Tensor | None, list[Tensor]]]:
    """Of each layer the keys `[positions, tokens, heads, D]` of tokens that are alone, and what else it caches."""
    config = host.config.get_text_config(decoder=True)
    device, name = input_device(host), type(host).__name__
    rows = len(positions) * TOKENS
    ids = (7 + 31 * torch.arange(TOKENS, device=device)) % config.vocab_size
    try:
        cache = DynamicCache(config=config)
        host.base_model(
            input_ids=ids.repeat(len(positions))[:, None],
            position_ids=positions.to(device).repeat_interleave(TOKENS)[:, None],
            past_key_values=cache,
            use_cache=True,
        )
    except Exception as error:  # whatever a host that cannot do it raises
        said = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise InputError(f"host: expected a decoder that reads a token anywhere, got {name} ({said})") from error

    def split(tensors: Iterable[Tensor]) -> list[Tensor]:
        axes = ((tensor, [n for n, size in enumerate(tensor.shape) if size == rows]) for tensor in tensors)
        tensors = [tensor.movedim(axis[0], 0) for tensor, axis in axes if axis and tensor.numel()]
        return [tensor.unflatten(0, (len(positions), TOKENS)).cpu() for tensor in tensors]

    found = []
    common = {name: held for name, held in vars(cache).items() if name != "layers"}  # an index's positions, say
    for layer in cache.layers:
        held = {"cache": common, **vars(layer)}
        keys = split(_tensors(held.pop("keys", None)))
        found.append((keys[0] if keys else None, split(_tensors(held))))
    filled = {keys.shape[-2] for keys, _ in found if keys is not None}
    if filled != {1}:
        raise InputError(
            f"host: expected a decoder that caches one key a token, got {name}, which stored {max(filled, default=0)}"
        )
    return [(None if keys is None else keys.squeeze(-2), others) for keys, others in found]


def _tensors(held: Any) -> Iterator[Tensor]:
    if isinstance(held, Tensor):
        yield held
    elif isinstance(held, Mapping | list | tuple):
        for inner in held.values() if isinstance(held, Mapping) else held:
            yield from _tensors(inner)


def _frequencies(host: Any) -> list[Tensor]:
    """The different sets of inverse frequencies among a host's buffers, its towers' too."""
    found: list[Tensor] = []
    for name, buffer in host.named_buffers():
        if name.endswith("inv_freq") and buffer.ndim == 1 and buffer.device.type != "meta":
            buffer = buffer.cpu().double()
            if not any(torch.equal(buffer, other) for other in found):
                found.append(buffer)
    return found


def _turn_of(keys: Tensor, positions: Tensor, frequencies: list[Tensor], allowed: float) -> Turn | None:
    """What fits keys `[positions, tokens, heads, D]`: nothing, some of the host's frequencies, or measured ones."""

    def best(turns: Iterable[Turn]) -> Turn | None:
        return min(turns, key=lambda turn: _misfit(keys, positions, turn), default=None)

    size, still = keys.shape[-1], _misfits(keys, positions, None)
    if float(still.max()) <= allowed:
        return None
    known = best(
        Turn(*pair, sign * some)
        for some in frequencies
        if 2 * len(some) <= size
        for pair in _pairs(2 * len(some))
        for sign in (1, -1)
    )
    if known is not None and _misfit(keys, positions, known) <= allowed:
        return known
    # none that a buffer holds, as where a host keeps a table of sines (GPT-J)
    rotated = 2 * (int((~(still <= allowed)).nonzero().max()) // 2 + 1)
    sizes = {min(some, size - size % 2) for some in (rotated, size)}
    return best(Turn(*pair, _measured(keys, positions, *pair)) for some in sizes for pair in _pairs(some))


def _pairs(size: int) -> list[tuple[slice, slice]]:
    """Ways to pair the first `size` dimensions: one half with the other, and neighbours."""
    return [(slice(0, size // 2), slice(size // 2, size)), (slice(0, size, 2), slice(1, size, 2))]


def _measured(keys: Tensor, positions: Tensor, first: slice, second: slice) -> Tensor:
    """Radians a position of each pair, by its angles at positions of which none is more than twice the one before."""
    (a, b), (c, d) = ((some[..., first], some[..., second]) for some in (keys[0].double(), keys.double()))
    angles = torch.atan2((a * d - b * c).sum((1, 2)), (a * c + b * d).sum((1, 2)))
    found = torch.zeros_like(angles[0])
    for position, angle in zip(positions.tolist()[1:], angles[1:], strict=True):
        whole = ((found * position - angle) / (2 * torch.pi)).round()  # turns, by what the positions before it say
        found = (angle + 2 * torch.pi * whole) / position
    return found


def _misfit(keys: Tensor, positions: Tensor, turn: Turn | None) -> float:
    return float(_misfits(keys, positions, turn).max())


def _misfits(keys: Tensor, positions: Tensor, turn: Turn | None) -> Tensor:
    """How far keys are from those of position 0 rotated, relative to each pair's length: worst of positions, `[D]`."""
    keys = keys.double()
    start = predicted = keys[0]
    if turn is not None:  # by angles that are rounded as hosts round them
        angles = positions.float()[:, None] * turn.frequencies.float()
        predicted = turn.turned(start.expand_as(keys), angles.double()[:, None, None])
    gap, length = (keys - predicted).square().sum(2), start.square().sum(1)
    if turn is not None:
        for squares in (gap, length):
            both = squares[..., turn.first] + squares[..., turn.second]
            squares[..., turn.first] = squares[..., turn.second] = both
    return (gap / length.clamp(min=TINY)).sqrt().median(1).values.amax(0)


def _apart(cached: Tensor) -> float:
    """How far what is cached at other positions is from what is at position 0, relative to its length; the worst."""
    flat = cached.double().flatten(2)
    gap = (flat - flat[0]).norm(dim=-1) / flat[0].norm(dim=-1).clamp(min=TINY)
    return float(gap.median(1).values.max())
