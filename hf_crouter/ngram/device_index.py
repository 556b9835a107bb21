"""The archives of a call's rows on an accelerator: all of them searched at once, and nothing waits for the device.

No sorted index: of every archived position it is known how many tokens before it agree with the row's last ones. One
more token makes each such match longer by one, or ends it. What followed the matches is counted by token.

Axes: `B` rows, `P` archived positions of the longest archive, `U` tokens that may be proposed, `K` sources, `R` raw
tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F

from ..types import Row
from .archive import ORDERS, Archive
from .gate import ARCHIVE_FEATURES, FROM_ORDER, INDEX_FEATURES
from .grid import GridCandidates
from .suffix_index import LATEST, LONGEST, SURE

_NOTHING, _BREAK, _END = -1, -2, -3  # ids of no token: around a text, between its parts, behind a pattern
_BLOCK = 1 << 20  # positions of all rows whose last tokens are compared at once
_ROUND = 8  # sizes are rounded up to an eighth of their power of two, so that shapes change seldom
_STEPS = 64  # tokens that a raw text has room for beside those that it holds, at least


def searched_there(device: torch.device) -> bool:
    """Whether archives are searched on a device; on a CPU a sorted index is faster."""
    return device.type != "cpu"


@dataclass(frozen=True, eq=False)
class _Tables:
    """What stands on the device, written in place.

    Attributes:
        ids: `[B, P]`, int32, of the archives.
        slots: `[B, P]`, int32: where in `tokens` each stands.
        usable: `[B, P]`, uint8: 1 where it may be proposed.
        weights: `[B, P]`, int32: confidence in 255ths where it may be.
        tokens: `[B, U]`, int64: distinct ids of each archive, ascending.
        sizes: `[B, 1]`, int64: tokens of each archive.
        lengths: `[B, P]`, uint8: tokens before each position that agree with the row's last ones.
        pattern: `[B, LONGEST]`, int64: the row's last ids, the newest first, those behind a stop id are none.
        text: `[B, R]`, int64: what the host reads raw, a break behind each part before the window.
        ends: `[B, 1]`, int64: tokens of that text.
    """

    ids: torch.Tensor
    slots: torch.Tensor
    usable: torch.Tensor
    weights: torch.Tensor
    tokens: torch.Tensor
    sizes: torch.Tensor
    lengths: torch.Tensor
    pattern: torch.Tensor
    text: torch.Tensor
    ends: torch.Tensor

    @classmethod
    def empty(cls, rows: int, positions: int, tokens: int, text: int, device: torch.device) -> _Tables:
        """Tables of nothing, of some sizes."""

        def full(*shape: int, dtype: torch.dtype = torch.long, value: int = 0) -> torch.Tensor:
            return torch.full(shape, value, dtype=dtype, device=device)

        return cls(
            ids=full(rows, positions, dtype=torch.int32, value=_NOTHING),
            slots=full(rows, positions, dtype=torch.int32),
            usable=full(rows, positions, dtype=torch.uint8),
            weights=full(rows, positions, dtype=torch.int32),
            tokens=full(rows, tokens),
            sizes=full(rows, 1),
            lengths=full(rows, positions, dtype=torch.uint8),
            pattern=full(rows, LONGEST, value=_END),
            text=full(rows, text, value=_NOTHING),
            ends=full(rows, 1),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all."""
        return sum(getattr(self, f.name).nbytes for f in fields(self))

    def set_archive(self, row: int, made: tuple[torch.Tensor, ...], size: int) -> None:
        """Writes what `_of_archive` made, and how far each position matches the row's pattern."""
        ids, slots, usable, weights, tokens = made
        for table, values, rest in ((self.ids, ids, _NOTHING), (self.slots, slots, 0), (self.usable, usable, 0),
                                    (self.weights, weights, 0), (self.tokens, tokens, 0)):  # fmt: skip
            table[row, : len(values)] = values
            table[row, len(values) :] = rest
        self.sizes[row] = size
        self.lengths[row] = match_lengths(self.ids[row : row + 1], self.pattern[row : row + 1])[0]

    def set_text(self, row: int, text: torch.Tensor) -> None:
        """Writes a row's raw text."""
        self.text[row, : len(text)] = text
        self.text[row, len(text) :] = _NOTHING
        self.ends[row] = len(text)

    def advance(self, newest: torch.Tensor, stops: torch.Tensor) -> None:
        """Every row has one more token `[B]`: a match goes on where its archive says the same.

        Args:
            newest: `[B]`.
            stops: `[V]`, bool: no match reaches over these.
        """
        stopped = stops[newest][:, None]
        older = self.pattern[:, :-1].masked_fill(stopped, _END)
        first = newest[:, None].masked_fill(stopped, _END)
        self.pattern.copy_(torch.cat([first, older], 1))
        longer = torch.where(self.ids == first, (self.lengths + 1).clamp(max=LONGEST), 0)
        self.lengths.copy_(F.pad(longer[:, :-1], (1, 0)))
        self.text.scatter_(1, self.ends, newest[:, None])
        self.ends.add_(1)


class DeviceSearch:
    """Searches a call's archives at one step after the other; only what has changed is written anew.

    Args:
        device: to search on.
        grows: see `Opening`.
    """

    def __init__(self, device: torch.device, grows: bool):
        self.device, self.grows = device, grows
        self._constants = _Constants(device)
        self._stops: torch.Tensor | None = None
        self._tables: _Tables | None = None
        self._archives: list[Archive] = []
        self._made: dict[int, tuple[torch.Tensor, ...]] = {}  # of an archive, which several rows may share
        self._raw: list[tuple] = []  # what each row's raw text is made of
        self._ends: list[int] = []  # tokens of it
        self._ends_at = 0  # at how many columns
        self._room = 0  # tokens for which every text has room
        self._rows: tuple[Row, ...] = ()  # of the latest search
        self._width = 0  # columns of the ids at the latest search
        self._sure = True  # all that is archived is certain

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self._tables.nbytes if self._tables is not None else 0

    def __call__(self, archives: Sequence[Archive], rows: tuple[Row, ...], input_ids: torch.Tensor) -> GridCandidates:
        """What follows the last column of `input_ids [B, T]`.

        Args:
            archives: of the rows.
            rows: of the cache; the same object as before says that neither they nor their archives have changed.
            input_ids: what stands there.
        """
        self._follow(archives, rows, input_ids)
        assert self._tables is not None
        return _candidates(self._tables, self._constants, self._sure)

    def _follow(self, archives: Sequence[Archive], rows: tuple[Row, ...], input_ids: torch.Tensor) -> None:
        """Brings the tables behind the last column."""
        if self._stops is None:
            ids = torch.arange(archives[0].vocab_size)
            self._stops = torch.isin(ids, torch.tensor(sorted(archives[0].stop_ids), dtype=torch.long)).to(self.device)
        width, tables = input_ids.shape[1], self._tables
        if tables is not None and self.grows and rows is self._rows and width == self._width + 1 and self._room:
            tables.advance(input_ids[:, -1], self._stops)  # nothing else has changed
            self._width, self._room = width, self._room - 1
            return
        raw = [(row.pad, row.prefix, row.raw_start, row.retrieved) for row in rows]
        on = tables is not None and self.grows and width == self._width + 1 and len(raw) == len(self._raw)
        if on:
            self._ends = [end + width - self._ends_at for end in self._ends]
        wanted = [n for n, archive in enumerate(archives) if not on or archive is not self._archives[n]]
        texts = {n: _raw_text(rows[n], input_ids[n]) for n, key in enumerate(raw) if not on or key != self._raw[n]}
        ends = [len(texts[n]) if n in texts else self._ends[n] for n in range(len(rows))]
        longest = max([*ends, *(self._ends if on else ())])  # a text grows before it is written anew
        tokens = max((len(self._of(archives[n])[4]) for n in wanted), default=0)
        need = [max(map(len, archives)), tokens, longest]
        have = [tables.ids.shape[1], tables.tokens.shape[1], tables.text.shape[1]] if tables is not None else [0] * 3
        if tables is None or len(tables.ids) != len(rows) or any(a > b for a, b in zip(need, have, strict=True)):
            need[2] += _STEPS
            positions, tokens, text = (max(old, rounded(new)) for new, old in zip(need, have, strict=True))
            tables = self._tables = _Tables.empty(len(rows), positions, tokens, text, self.device)
            on, wanted = False, list(range(len(rows)))
            texts = {n: texts[n] if n in texts else _raw_text(rows[n], input_ids[n]) for n in wanted}
        if on:
            tables.advance(input_ids[:, -1], self._stops)
        else:
            pads = torch.tensor([[row.pad] for row in rows]).to(self.device)
            tables.pattern.copy_(_pattern(input_ids, pads, self._stops))
        if wanted:
            self._sure = all(archive.confidences is None for archive in archives)
        for n in wanted:
            tables.set_archive(n, self._of(archives[n]), len(archives[n]))
        for n, text in texts.items():
            tables.set_text(n, text)
        self._archives, self._raw, self._ends, self._width = list(archives), raw, ends, width
        self._rows, self._ends_at, self._room = rows, width, tables.text.shape[1] - max(ends)
        kept = set() if self.grows else set(map(id, archives))  # rows that go on have theirs in the tables
        self._made = {key: of for key, of in self._made.items() if key in kept}

    def _of(self, archive: Archive) -> tuple[torch.Tensor, ...]:
        if id(archive) not in self._made:
            self._made[id(archive)] = _of_archive(archive, self.device)
        return self._made[id(archive)]


@dataclass(frozen=True, eq=False)
class _RawMatches:
    """What `raw_text.RawMatch` says, `[B, 1]` each."""

    length: torch.Tensor
    token: torch.Tensor
    occurrences: torch.Tensor
    share: torch.Tensor

    @classmethod
    def of(cls, text: torch.Tensor, pattern: torch.Tensor) -> _RawMatches:
        """The longest match of a pattern `[B, LONGEST]` in texts `[B, R]`, behind each of which something follows."""
        lengths = match_lengths(text, pattern).masked_fill_(text < 0, 0)
        length = lengths.amax(1, keepdim=True)
        found = (lengths == length) & (lengths > 0)
        count = found.sum(1, keepdim=True)
        last = torch.where(found, torch.arange(text.shape[1], device=text.device), 0).amax(1, keepdim=True)
        token = torch.where(length > 0, text.gather(1, last), -1)
        same = (found & (text == token)).sum(1, keepdim=True)
        return cls(length.long(), token, count, same / count.clamp(min=1))


def _candidates(tables: _Tables, constants: _Constants, sure: bool) -> GridCandidates:
    """What follows the rows' last tokens; features as `candidates.collect` gives them.

    Args:
        tables: behind the last token.
        constants: on their device.
        sure: all that is archived is certain.
    """
    text, raw = tables.text, _RawMatches.of(tables.text, tables.pattern)
    rows, slots = len(text), tables.tokens.shape[1]
    lengths = (tables.lengths * tables.usable).long()
    cells = constants.reached[lengths] * slots + tables.slots
    counts = _by_order(cells, tables.usable.int(), rows, slots)
    weights = counts * SURE if sure else _by_order(cells, tables.weights, rows, slots)
    occurrences, whole, distinct = counts.sum(2), weights.sum(2), (counts > 0).sum(2)
    places = torch.arange(slots, device=lengths.device)
    best = (weights.long() * slots + (slots - 1 - places)).argmax(2)  # of equal ones the smallest token
    available = whole > 0
    shares = weights / whole.clamp(min=1)[..., None]
    length = lengths.amax(1, keepdim=True)
    found = (lengths == length) & (lengths > 0)
    latest = torch.where(found, torch.arange(lengths.shape[1], device=lengths.device), 0).amax(1, keepdim=True)
    latest_slot = tables.slots.gather(1, latest).long()
    some = available.sum(1, keepdim=True)  # orders
    matched, last = some > 0, (some - 1).clamp(min=0)
    latest_weight = tables.weights.gather(1, latest) / SURE * matched
    certain = latest_weight > 0
    tops = tables.tokens.gather(1, best)
    chosen = torch.where(matched, tops.gather(1, last), -1)
    latest_token = tables.tokens.gather(1, latest_slot)
    of_last = shares.gather(1, last[..., None].expand(-1, -1, slots))[:, 0]
    logs = torch.cat([occurrences, distinct, raw.occurrences, found.sum(1, keepdim=True).clamp(max=LATEST)], 1)
    powers = torch.cat([length, raw.length, tables.sizes - latest], 1)
    same = torch.cat([raw.token, latest_token, raw.token], 1) == torch.cat([chosen, chosen, latest_token], 1)
    flags = [available, same, raw.length > 0, raw.length >= length, length >= 32, distinct.gather(1, last) > 1,
             (text == chosen).any(1, keepdim=True)]  # fmt: skip
    features = torch.cat(
        [
            torch.cat(flags, 1).float(),
            logs.log1p() * constants.logs,
            (1 + powers).log2() * constants.powers,
            shares.gather(2, best[..., None])[..., 0],
            ((tops == chosen) & available).sum(1, keepdim=True) / some.clamp(min=1),
            ((raw.length - length) / 8).clamp(-1, 1),
            raw.share,
            of_last.gather(1, latest_slot),
            torch.where(tables.tokens == raw.token, of_last, 0).sum(1, keepdim=True),
        ],
        1,
    )[:, constants.order]
    # told apart by where they stand: an order that is not available, and rows without a match, have none
    features[:, : FROM_ORDER * len(ORDERS)] *= available[..., None].expand(-1, -1, FROM_ORDER).flatten(1)
    features[:, DISAGREES] -= features[:, AGREES]
    confidence = torch.where(available, whole / (SURE * occurrences.clamp(min=1)), 1.0)
    return GridCandidates(
        tables.tokens,
        torch.cat([shares, ((places == latest_slot) * certain)[:, None]], 1),
        torch.cat([available, certain], 1),
        torch.cat([confidence, torch.where(certain, latest_weight, 1.0)], 1),
        torch.cat([best, latest_slot], 1),
        chosen[:, 0],
        features * matched,
    )


class _Constants:
    """What every search needs on the device.

    Attributes:
        reached: `[LONGEST + 1]`, how many orders a match of each length reaches.
        logs: factors of natural logarithms.
        powers: of binary ones.
        order: where each feature stands among the parts of `_candidates`.
    """

    def __init__(self, device: torch.device):
        orders = len(ORDERS)
        reached = np.searchsorted(np.array(ORDERS), np.arange(LONGEST + 1), side="right")
        self.reached = torch.from_numpy(reached).to(device)
        self.logs = torch.tensor([1 / 8] * (2 * orders) + [1 / 6, 1 / 4], device=device)
        self.powers = torch.tensor([1 / 6, 1 / 6, 1 / 20], device=device)
        sizes = {"available": orders, "raw_top": 1, "latest_top": 1, "raw_latest": 1, "raw": 1, "raw_longer": 1,
                 "long": 1, "differ": 1, "raw_holds": 1, "occurrences": orders, "distinct": orders, "raw_count": 1,
                 "positions": 1, "length": 1, "raw_length": 1, "distance": 1, "top": orders, "agree": 1, "beyond": 1,
                 "raw_share": 1, "latest_share": 1, "raw_token_share": 1}  # fmt: skip
        starts = dict(zip(sizes, np.cumsum([0, *sizes.values()]).tolist(), strict=False))
        wanted = [starts[name] + k for k in range(orders) for name in ("available", "occurrences", "distinct", "top")]
        wanted += [starts[name] for name in (
            "length", "agree", "long", "raw", "raw_length", "raw_longer", "beyond", "raw_top", "raw", "raw_count",
            "raw_share", "raw_holds", "latest_top", "latest_share", "distance", "positions", "differ",
            "raw_token_share", "raw_latest",
        )]  # fmt: skip
        assert len(wanted) == ARCHIVE_FEATURES
        self.order = torch.tensor(wanted, device=device)


AGREES = INDEX_FEATURES + 4  # feature: the raw text goes on with the chosen token
DISAGREES = AGREES + 1  # with another one


def _by_order(cells: torch.Tensor, values: torch.Tensor, rows: int, slots: int) -> torch.Tensor:
    """`[B, orders, U]`, int32: sums of values `[B, P]` over the matches of at least each order."""
    exact = torch.zeros(rows, (len(ORDERS) + 1) * slots, dtype=torch.int32, device=cells.device)
    exact = exact.scatter_add_(1, cells, values).view(rows, -1, slots)[:, 1:]
    return exact.flip(1).cumsum(1, dtype=torch.int32).flip(1)


def _raw_text(row: Row, ids: torch.Tensor) -> torch.Tensor:
    """What the host reads raw of a row with ids `[T]`, see `raw_text.RawText`."""
    seam = torch.full((1,), _BREAK, dtype=torch.long, device=ids.device)
    pieces = [ids[row.pad : row.pad + (row.prefix or 0)], seam]
    for number in row.retrieved:
        pieces += [row.chunks[number].host_ids.to(ids.device), seam]
    return torch.cat([*pieces, ids[row.pad + row.raw_start :]])


def _pattern(input_ids: torch.Tensor, pads: torch.Tensor, stops: torch.Tensor) -> torch.Tensor:
    """`[B, LONGEST]`: the rows' last ids, the newest first; those behind a stop id or in the padding are none."""
    recent, width = input_ids[:, -LONGEST:].flip(1), input_ids.shape[1]
    columns = torch.arange(width - 1, width - 1 - recent.shape[1], -1, device=input_ids.device)
    ends = (stops[recent] | (columns < pads)).cummax(1).values
    return F.pad(recent.masked_fill(ends, _END), (0, LONGEST - recent.shape[1]), value=_END)


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
    """Ids, where each stands among the distinct ones, what may be proposed, weights, and these."""
    ids = torch.from_numpy(archive.ids.astype(np.int32)).to(device)
    usable = torch.from_numpy(archive.usable).to(device)
    confidences = archive.confidences
    weights = usable * SURE if confidences is None else torch.from_numpy(confidences).to(device) * usable
    tokens, slots = torch.unique(ids, return_inverse=True)
    return ids, slots.int(), usable.to(torch.uint8), weights.int(), tokens.long()
