"""Which key-value pair of which chunk stands where: before the slots of a layer, a row's chunks one after the other.

Each layer keeps a number of pairs of its own, and rows may hold different numbers of chunks: row b of layer l has its
pairs in columns 0 to `count(b, l)`, and what is left up to `width(l)` is empty.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.nn.functional as F

T = TypeVar("T")
Layer = tuple[torch.Tensor, torch.Tensor]
Counts = Mapping[tuple[int, int], tuple[int | None, ...]]
"""Pairs of each layer, by row and chunk; None in a layer that keeps nothing old."""


@dataclass(eq=False)
class MadePairs:
    """Pairs that were made for new chunks and are not in a cache yet.

    Attributes:
        layers: of the host.
        counts: see `Counts`; a row's chunks in order.
        made: of each layer by row, keys and values `[heads, n, D]`, a row's chunks in order; rows of beams share them.
    """

    layers: int
    counts: dict[tuple[int, int], tuple[int | None, ...]] = field(default_factory=dict)
    made: list[dict[int, Layer]] = field(default_factory=list)

    @classmethod
    def none(cls, layers: int) -> MadePairs:
        """No pairs at all."""
        return cls(layers, {}, [{} for _ in range(layers)])

    def take(self, layer: int) -> dict[int, Layer]:
        """A layer's, which are given up here."""
        taken, self.made[layer] = self.made[layer], {}
        return taken


@dataclass(frozen=True, eq=False)
class PairPlaces:
    """Chunk of each column before the slots.

    Attributes:
        owners: of each layer `[B, columns]`, int64 on the CPU; -1 where a column is empty. Layers that keep equal
            numbers share one tensor. None in a layer that keeps nothing old.
    """

    owners: tuple[torch.Tensor | None, ...]

    def __post_init__(self):
        widths = [owner.shape[1] for owner in self.owners if owner is not None]
        object.__setattr__(self, "_mean", -(-sum(widths) // max(1, len(widths))))
        object.__setattr__(self, "_known", {})  # asked at every step

    @classmethod
    def empty(cls, rows: int, layers: int) -> PairPlaces:
        """Of a cache without pairs."""
        return cls((torch.empty(rows, 0, dtype=torch.long),) * layers)

    def __len__(self) -> int:
        """Columns, the mean over the layers that keep some, rounded up."""
        return self._mean  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def layers(self) -> int:
        """Of the host."""
        return len(self.owners)

    def width(self, layer: int) -> int:
        """Columns of a layer."""
        owner = self.owners[layer] if layer < len(self.owners) else None
        return owner.shape[1] if owner is not None else 0

    def count(self, row: int, layer: int) -> int:
        """Columns of a row that are not empty."""
        owner = self.owners[layer]
        return int((owner[row] >= 0).sum()) if owner is not None else 0

    def is_whole(self, layer: int) -> bool:
        """Whether no column of a layer is empty in any row."""
        owner = self.owners[layer]
        return owner is None or self._once(("whole", layer), lambda: bool((owner >= 0).all()))

    def stacked(self, device: torch.device) -> tuple[torch.Tensor, tuple[int, ...]]:
        """Owners that differ, `[U, B, columns]` on a device, -1 behind fewer; and which of them each layer has."""

        def stack() -> tuple[torch.Tensor, tuple[int, ...]]:
            some = {id(owner): owner for owner in self.owners if owner is not None}
            most = max(owner.shape[1] for owner in some.values())
            wide = [F.pad(owner, (0, most - owner.shape[1]), value=-1) for owner in some.values()]
            order = {key: number for number, key in enumerate(some)}
            return torch.stack(wide).to(device), tuple(order.get(id(owner), -1) for owner in self.owners)

        return self._once(("stacked", device), stack)

    def _once(self, key: object, make: Callable[[], T]) -> T:
        known: dict[object, Any] = self._known  # pyright: ignore[reportAttributeAccessIssue]
        if key not in known:
            known[key] = make()
        return known[key]

    def extended(self, counts: Counts, room: Sequence[int] = ()) -> PairPlaces:
        """With the pairs of more chunks.

        Args:
            counts: of new chunks, a row's in order.
            room: columns that each layer has at least.
        """
        known: dict[tuple, torch.Tensor | None] = {}
        found = []
        for layer, owner in enumerate(self.owners):
            added = tuple((row, chunk, some[layer]) for (row, chunk), some in counts.items())
            least = room[layer] if room else 0
            key = id(owner), added, least
            if key not in known:
                known[key] = _extended(owner, added, least)
            found.append(known[key])
        return PairPlaces(tuple(found))

    def cut(self, chunks: Sequence[int]) -> PairPlaces:
        """With so many chunks of each row at most; columns stay."""
        most = torch.tensor(chunks)[:, None]
        return self._each(lambda owner: torch.where(owner < most, owner, -1))

    def selected(self, rows: torch.Tensor) -> PairPlaces:
        """Of these rows."""
        return self._each(lambda owner: owner[rows])

    def _each(self, change) -> PairPlaces:
        known = {id(owner): change(owner) for owner in self.owners if owner is not None}
        return PairPlaces(tuple(None if owner is None else known[id(owner)] for owner in self.owners))

    def joined(
        self, layer: int, before: PairPlaces, old: Layer | None, made: Mapping[int, Layer]
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Keys and values `[B, heads, width, D]` of a layer; None where it keeps none.

        Args:
            layer: its number.
            before: places without the new chunks.
            old: keys and values that stood there.
            made: of the new chunks, by row.
        """
        width, owner = self.width(layer), self.owners[layer]
        if not width or owner is None:
            return None, None
        some = old or next(iter(made.values()), None)
        if some is None:
            return None, None
        joined = []
        for kind in (0, 1):
            like = some[kind]
            size = len(owner), like.shape[-3], width, like.shape[-1]
            whole = like.new_empty(size) if bool((owner >= 0).all()) else like.new_zeros(size)
            if old is not None:
                whole[:, :, : old[kind].shape[2]] = old[kind]
            for row, pairs in made.items():
                new, start = pairs[kind], before.count(row, layer)
                whole[row, :, start : start + new.shape[1]] = new.to(like.device, like.dtype)
            joined.append(whole)
        return joined[0], joined[1]


def _extended(
    owner: torch.Tensor | None, added: Sequence[tuple[int, int, int | None]], least: int
) -> torch.Tensor | None:
    if owner is None or any(count is None for _, _, count in added):
        return None
    rows = [row[row >= 0].tolist() for row in owner]
    for row, chunk, count in added:
        rows[row] += [chunk] * (count or 0)
    width = max(least, owner.shape[1], *(len(row) for row in rows))
    return torch.tensor([row + [-1] * (width - len(row)) for row in rows], dtype=torch.long).view(len(rows), width)
