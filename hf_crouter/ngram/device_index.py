"""The archives of a call's rows on an accelerator: all of them searched at once, and nothing waits for the device.

No sorted index: of every archived position it is known how many tokens before it agree with the row's last ones. One
more token makes each such match longer by one, or ends it. What followed the matches is counted by token.

Axes: `B` rows, `P` archived positions of the longest archive, `U` tokens that may be proposed, `K` sources, `R` raw
tokens.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from ..types import Row
from .archive import ORDERS, Archive
from .gate import SOURCES
from .grid import GridCandidates
from .suffix_index import LATEST, LONGEST, SURE

_NOTHING, _BREAK, _END = -1, -2, -3  # ids of no token: before a text, between its parts, behind a pattern
_BLOCK = 1 << 20  # positions of all rows whose last tokens are compared at once
_ROUND = 8  # sizes are rounded up to an eighth of their power of two, so that shapes change seldom


def searched_there(device: torch.device) -> bool:
    """Whether archives are searched on a device; on a CPU a sorted index is faster."""
    return device.type != "cpu"


class DeviceSearch:
    """Searches a call's archives at one step after the other; what stays the same between two is kept.

    Args:
        device: to search on.
        grows: see `Opening`.
    """

    def __init__(self, device: torch.device, grows: bool):
        self.device, self.grows = device, grows
        self._index: DeviceIndex | None = None
        self._raw: RawTexts | None = None
        self._before: tuple = ()  # what the raw texts are made of
        self._width = 0  # of the latest search

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self._index.nbytes if self._index is not None else 0

    def __call__(self, archives: Sequence[Archive], rows: Sequence[Row], input_ids: torch.Tensor) -> GridCandidates:
        """What follows the last column of `input_ids [B, T]`."""
        known = self._index is not None and len(archives) == len(self._index.archives)
        known = known and all(map(operator.is_, archives, self._index.archives))  # pyright: ignore
        if self._index is None or not known:
            self._index = DeviceIndex(archives, self.device)
        before = tuple((row.pad, row.prefix, row.raw_start, row.retrieved) for row in rows)
        if self._raw is None or not self.grows or before != self._before:
            self._raw, self._before = RawTexts.of(rows, input_ids), before
        one_more = self.grows and known and input_ids.shape[1] == self._width + 1
        self._width = input_ids.shape[1]
        return self._index.search(input_ids, self._raw, one_more)


@dataclass(frozen=True, eq=False)
class RawTexts:
    """What the host reads raw in every row; see `raw_text.RawText`.

    Attributes:
        before: `[B, n]`, int64: each row's beginning and retrieved chunks, a break behind each, from the right.
        pads: `[B, 1]`, int64: padding columns of `input_ids`.
        starts: `[B, 1]`, int64: column at which its window begins.
        first: the first of them.
    """

    before: torch.Tensor
    pads: torch.Tensor
    starts: torch.Tensor
    first: int

    @classmethod
    def of(cls, rows: Sequence[Row], input_ids: torch.Tensor) -> RawTexts:
        """Of the rows of a cache, whose ids begin those in `[B, T]`."""
        device, texts = input_ids.device, []
        seam = torch.full((1,), _BREAK, device=device)
        for row, ids in zip(rows, input_ids, strict=True):
            pieces = [ids[row.pad : row.pad + (row.prefix or 0)], seam]
            for number in row.retrieved:
                pieces += [row.chunks[number].host_ids.to(device), seam]
            texts.append(torch.cat(pieces))
        length = rounded(max(map(len, texts)))
        before = torch.stack([F.pad(text, (length - len(text), 0), value=_NOTHING) for text in texts])
        places = torch.tensor([(row.pad, row.pad + row.raw_start) for row in rows], device=device)
        first = min(row.pad + row.raw_start for row in rows)
        return cls(before, places[:, :1], places[:, 1:], first)

    def upto(self, input_ids: torch.Tensor) -> torch.Tensor:
        """`[B, R]`: the texts behind `input_ids [B, T]`; what is no token is negative."""
        width = input_ids.shape[1]
        first = max(0, width - rounded(width - self.first))
        columns = torch.arange(first, width, device=input_ids.device)
        window = torch.where(columns >= self.starts, input_ids[:, first:], _BREAK)
        return torch.cat([self.before, window], 1)


@dataclass(frozen=True, eq=False)
class _RawMatches:
    """What `raw_text.RawMatch` says, `[B]` each."""

    length: torch.Tensor
    token: torch.Tensor
    occurrences: torch.Tensor
    share: torch.Tensor

    @classmethod
    def of(cls, text: torch.Tensor, pattern: torch.Tensor) -> _RawMatches:
        """The longest match of a pattern `[B, LONGEST]` in texts `[B, R]`, behind each of which something follows."""
        lengths = match_lengths(text, pattern).masked_fill_(text < 0, 0)
        length = lengths.amax(1)
        found = (lengths == length[:, None]) & (lengths > 0)
        count = found.sum(1)
        last = torch.where(found, torch.arange(text.shape[1], device=text.device), 0).amax(1)
        token = torch.where(length > 0, text.gather(1, last[:, None])[:, 0], -1)
        same = (found & (text == token[:, None])).sum(1)
        return cls(length.long(), token, count, same / count.clamp(min=1))


class DeviceIndex:
    """The archives of B rows, and where their last tokens stood in them.

    Args:
        archives: of the rows; equal objects share what is made of them.
        device: to search on.
    """

    def __init__(self, archives: Sequence[Archive], device: torch.device):
        self.archives = tuple(archives)
        made: dict[int, tuple[torch.Tensor, ...]] = {}
        for archive in archives:
            if id(archive) not in made:
                made[id(archive)] = _of_archive(archive, device)
        rows = [made[id(archive)] for archive in archives]
        positions = rounded(max(len(row[0]) for row in rows))
        tokens = rounded(max(len(row[3]) for row in rows))

        def stacked(which: int, size: int, value: int) -> torch.Tensor:
            return torch.stack([F.pad(row[which], (0, size - len(row[which])), value=value) for row in rows])

        self.ids = stacked(0, positions, _NOTHING)  # [B, P]
        self.slots = stacked(1, positions, 0)  # [B, P], where in `tokens` each stands
        self.weights = stacked(2, positions, 0)  # [B, P], 255ths; 0 where nothing may be proposed
        self.tokens = stacked(3, tokens, 0)  # [B, U]
        self.usable = stacked(4, positions, 0)  # [B, P]
        self.sure = all(archive.confidences is None for archive in archives)
        self.sizes = torch.tensor([len(archive) for archive in archives], device=device)
        stops = sorted(archives[0].stop_ids)
        self.stops = torch.zeros(archives[0].vocab_size, dtype=torch.bool)
        self.stops[stops] = True
        self.stops = self.stops.to(device)
        reached = np.searchsorted(np.array(ORDERS), np.arange(LONGEST + 1), side="right")
        self.reached = torch.from_numpy(reached).to(device)  # [LONGEST + 1], orders within a match of each length
        self.lengths: torch.Tensor | None = None  # [B, P], as of the latest search

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        arrays = (self.ids, self.slots, self.weights, self.tokens, self.usable, self.lengths, self.stops)
        return sum(array.nbytes for array in arrays if array is not None)

    def __len__(self) -> int:
        """Archived tokens of the longest archive."""
        return max(map(len, self.archives))

    def search(self, input_ids: torch.Tensor, raw: RawTexts, one_more: bool = False) -> GridCandidates:
        """What follows the rows' last tokens.

        Args:
            input_ids: `[B, T]`.
            raw: what the host reads raw in each row.
            one_more: the ids are those of the latest search and one more token a row.
        """
        pattern = self.pattern(input_ids, raw.pads)
        if one_more and self.lengths is not None:
            self.lengths = self._grown(pattern[:, :1])
        else:
            self.lengths = match_lengths(self.ids, pattern)
        text = raw.upto(input_ids)
        return self._candidates(self.lengths, text, _RawMatches.of(text, pattern))

    def pattern(self, input_ids: torch.Tensor, pads: torch.Tensor) -> torch.Tensor:
        """`[B, LONGEST]`: the rows' last ids, the newest first; those behind a stop id or in the padding are none."""
        recent = input_ids[:, -LONGEST:].flip(1)
        columns = torch.arange(input_ids.shape[1] - 1, input_ids.shape[1] - 1 - recent.shape[1], -1,
                               device=input_ids.device)  # fmt: skip
        ends = (self.stops[recent] | (columns < pads)).cummax(1).values
        return F.pad(recent.masked_fill(ends, _END), (0, LONGEST - recent.shape[1]), value=_END)

    def _grown(self, newest: torch.Tensor) -> torch.Tensor:
        """Lengths once the rows have one more token `[B, 1]`: a match goes on where the archive says the same."""
        assert self.lengths is not None
        longer = torch.where(self.ids == newest, (self.lengths + 1).clamp(max=LONGEST), 0)
        return F.pad(longer[:, :-1], (1, 0))

    def _candidates(self, lengths: torch.Tensor, text: torch.Tensor, raw: _RawMatches) -> GridCandidates:
        rows, slots, orders = len(lengths), self.tokens.shape[1], len(ORDERS)
        lengths = (lengths * self.usable).long()
        cells = self.reached[lengths] * slots + self.slots
        counts = self._by_order(cells, self.usable.int(), rows, slots)
        weights = counts * SURE if self.sure else self._by_order(cells, self.weights, rows, slots)
        occurrences, whole = counts.sum(2), weights.sum(2)
        distinct = (counts > 0).sum(2)
        places = torch.arange(slots, device=lengths.device)
        best = (weights.long() * slots + (slots - 1 - places)).argmax(2)  # of equal ones the smallest token
        available = whole > 0
        shares = weights / whole.clamp(min=1)[..., None]
        length = lengths.amax(1)
        found = (lengths == length[:, None]) & (lengths > 0)
        latest = torch.where(found, torch.arange(lengths.shape[1], device=lengths.device), 0).amax(1)
        latest_slot = self.slots.gather(1, latest[:, None]).long()
        latest_weight = torch.where(length > 0, self.weights.gather(1, latest[:, None])[:, 0] / SURE, 0.0)
        some = available.sum(1)  # orders
        last = (some - 1).clamp(min=0)[:, None]
        tops = self.tokens.gather(1, best)
        chosen = torch.where(some > 0, tops.gather(1, last)[:, 0], -1)
        certain = (latest_weight > 0) & (some > 0)
        one = (places == latest_slot).float() * certain[:, None]
        confidence = whole / (SURE * occurrences.clamp(min=1))
        of_last = shares.gather(1, last[..., None].expand(-1, -1, slots))[:, 0]
        by_order = torch.stack(
            [
                available.float(),
                occurrences.log1p() / 8,
                distinct.log1p() / 8,
                shares.gather(2, best[..., None])[..., 0],
            ],
            2,
        )
        by_order = by_order * available[..., None]
        agree = ((tops == chosen[:, None]) & available).sum(1) / some.clamp(min=1)
        latest_token = self.tokens.gather(1, latest_slot)
        length, matched = length.long(), some > 0
        features = torch.stack(
            [
                (1 + length).log2() / 6,
                agree,
                (length >= 32).float(),
                (raw.length > 0).float(),
                (1 + raw.length).log2() / 6,
                (raw.length >= length).float(),
                ((raw.length - length) / 8).clamp(-1, 1),
                (raw.token == chosen).float(),
                ((raw.length > 0) & (raw.token != chosen)).float(),
                raw.occurrences.log1p() / 6,
                raw.share,
                (text == chosen[:, None]).any(1).float(),
                (latest_token[:, 0] == chosen).float(),
                of_last.gather(1, latest_slot)[:, 0],
                (1 + self.sizes - latest).log2() / 20,
                found.sum(1).clamp(max=LATEST).log1p() / 4,
                (distinct.gather(1, last)[:, 0] > 1).float(),
                torch.where(self.tokens == raw.token[:, None], of_last, 0).sum(1),
                (raw.token == latest_token[:, 0]).float(),
            ],
            1,
        )
        features = torch.cat([by_order.flatten(1), features], 1) * matched[:, None]
        assert confidence.shape[1] == orders == SOURCES - 1
        return GridCandidates(
            self.tokens,
            torch.cat([shares, one[:, None]], 1),
            torch.cat([available, certain[:, None]], 1),
            torch.cat([torch.where(available, confidence, 1.0), torch.where(certain, latest_weight, 1.0)[:, None]], 1),
            torch.cat([best, latest_slot], 1),
            chosen,
            features,
        )

    def _by_order(self, cells: torch.Tensor, values: torch.Tensor, rows: int, slots: int) -> torch.Tensor:
        """`[B, orders, U]`, int32: sums of values `[B, P]` over the matches of at least each order."""
        exact = torch.zeros(rows, (len(ORDERS) + 1) * slots, dtype=torch.int32, device=cells.device)
        exact = exact.scatter_add_(1, cells, values).view(rows, -1, slots)[:, 1:]
        return exact.flip(1).cumsum(1, dtype=torch.int32).flip(1)


def match_lengths(text: torch.Tensor, pattern: torch.Tensor) -> torch.Tensor:
    """How many tokens before each position of texts `[B, P]` agree with patterns `[B, LONGEST]`, uint8 `[B, P]`.

    Args:
        text: ids; negative ones agree with nothing.
        pattern: the newest id first.
    """
    before = F.pad(text, (LONGEST, 0), value=_NOTHING)
    wanted = pattern.flip(1)[:, None]
    back = torch.arange(LONGEST - 1, -1, -1, dtype=torch.uint8, device=text.device)
    size = max(1, _BLOCK // len(text))
    parts = []
    for first in range(0, text.shape[1], size):
        part = before[:, first : min(first + size, text.shape[1]) + LONGEST - 1].unfold(1, LONGEST, 1)
        parts.append(torch.where(part != wanted, back, LONGEST).amin(2))
    return torch.cat(parts, 1)


def rounded(size: int) -> int:
    """A size or somewhat more: one of a few."""
    if size <= 64:
        return 64
    step = 1 << max(0, math.ceil(math.log2(size)) - 1 - int(math.log2(_ROUND)))
    return -(-size // step) * step


def _of_archive(archive: Archive, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Ids, where each stands among the distinct ones, weights, these, and what may be proposed."""
    ids = torch.from_numpy(archive.ids.astype(np.int32)).to(device)
    usable = torch.from_numpy(archive.usable).to(device)
    confidences = archive.confidences
    weights = usable * SURE if confidences is None else torch.from_numpy(confidences).to(device) * usable
    tokens, slots = torch.unique(ids, return_inverse=True)
    return ids, slots.int(), weights.int(), tokens.long(), usable.to(torch.uint8)
