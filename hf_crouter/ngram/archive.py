"""What a row's earlier tokens say about its next one: where its last tokens stood before, and what came then."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..errors import InputError
from .suffix_index import LATEST, LONGEST, SURE, Followers, SuffixIndex, match_lengths

ORDERS = (1, 2, 3, 4, 6, 8, 12, 16, 24)
TAIL = 4096  # tokens that are searched one by one rather than sorted
SMALL = 128  # occurrences that are read anew for each query; what followed more of them is remembered

_NO_ROWS = np.empty(0, np.int64)
_NO_TOKENS, _NO_WEIGHTS = np.empty(0, np.int64), np.empty(0, np.float32)


@dataclass(frozen=True, eq=False)
class Matches:
    """What followed earlier occurrences of a text's last tokens; one entry an order in the last three.

    Orders may share an array: write to none.

    Attributes:
        length: tokens of the longest match; 0 without one.
        positions: positions in the archive of what followed the longest match, ascending, the latest 64 at most.
        latest: id that stands at the last of them; -1 without a match.
        latest_weight: of that one, 0 to 1.
        tokens: ids that followed the last k tokens, int64, each once, in no order.
        weights: for each of them the sum of the weights of its occurrences, float32.
        occurrences: how often the last k tokens stood there.
    """

    length: int
    positions: np.ndarray
    latest: int
    latest_weight: float
    tokens: tuple[np.ndarray, ...]
    weights: tuple[np.ndarray, ...]
    occurrences: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Archive:
    """A row's earlier tokens: an immutable value whose versions share memory.

    Most of it is sorted into a `SuffixIndex`; what came since is searched token by token until it is more than 4,096
    tokens and more than a 64th of the rest, and is then sorted with it.

    Attributes:
        vocab_size: ids are below it; up to 65,536 they take 2 bytes each, else 4.
        stop_ids: special tokens: never proposed, and no match reaches over one.
        tail_limit: tokens that are never sorted.
    """

    vocab_size: int
    stop_ids: frozenset[int]
    tail_limit: int
    _tail: np.ndarray = field(repr=False)  # behind the `LONGEST` ids that stand before it
    _static: SuffixIndex | None = field(default=None, repr=False)
    _weights: np.ndarray | None = field(default=None, repr=False)
    _proposable: np.ndarray | None = field(default=None, repr=False)

    @classmethod
    def empty(cls, vocab_size: int, stop_ids: Iterable[int] = frozenset(), tail_limit: int = TAIL) -> Archive:
        """An archive of no tokens.

        Args:
            vocab_size: number of token ids.
            stop_ids: ids of special tokens.
            tail_limit: tokens up to which nothing is sorted.

        Raises:
            InputError: `vocab_size` is not positive or more than 2^32.
        """
        if not 0 < vocab_size <= 1 << 32:
            raise InputError(f"archive: expected a vocabulary of 1 to 2^32 ids, got {vocab_size}")
        dtype = np.uint16 if vocab_size <= 1 << 16 else np.uint32
        return cls(int(vocab_size), frozenset(map(int, stop_ids)), tail_limit, np.zeros(LONGEST, dtype))

    def __deepcopy__(self, memo: dict) -> Archive:
        """The same value: a cache that is copied shares its archive."""
        return self

    def __len__(self) -> int:
        """Tokens."""
        return self._sorted + len(self._tail) - LONGEST

    @property
    def _sorted(self) -> int:
        return len(self._static) if self._static else 0

    @property
    def ids(self) -> np.ndarray:
        """The token ids `[tokens]`, uint16 or uint32; a copy once a part is sorted."""
        tail = self._tail[LONGEST:]
        if self._static:
            return np.concatenate([self._static.ids[LONGEST:], tail])
        tail.flags.writeable = False
        return tail

    @property
    def usable(self) -> np.ndarray:
        """Which tokens may be proposed, bool `[tokens]`."""
        early, late = self._static.proposable if self._static else None, len(self) - self._sorted
        flags = _joined(early, self._sorted, self._proposable, late, True, np.bool_)
        return np.ones(len(self), bool) if flags is None else flags

    @property
    def confidences(self) -> np.ndarray | None:
        """Weight of each token in 255ths, uint8 `[tokens]`; None: all are certain."""
        early, late = self._static.weights if self._static else None, len(self) - self._sorted
        return _joined(early, self._sorted, self._weights, late, SURE, np.uint8)

    @property
    def nbytes(self) -> int:
        """Bytes of ids, weights and flags, without the index."""
        arrays = [self._tail, self._weights, self._proposable]
        if self._static:
            arrays += [self._static.ids, self._static.weights]
        return sum(array.nbytes for array in arrays if array is not None)

    @property
    def index_bytes(self) -> int:
        """Bytes of the index and of what it remembers of earlier queries."""
        return self._static.nbytes if self._static else 0

    @property
    def bytes_per_token(self) -> float:
        """`nbytes` over the number of tokens; 0 for an empty archive."""
        return self.nbytes / len(self) if len(self) else 0.0

    def extended(
        self, ids: Any, weights: Sequence[float] | np.ndarray | None = None, copyable: Any | None = None
    ) -> Archive:
        """An archive with more tokens at its end; this one stays as it is.

        Args:
            ids: token ids `[n]`.
            weights: confidence of each token, 0 to 1, `[n]`, kept to 1/255; None: all 1.
            copyable: bool `[n]`, False where a token may be read but never proposed; None: all may.

        Raises:
            InputError: an id outside the vocabulary, or a shape or weight that does not fit.
        """
        new = self._checked(ids)
        if not len(new):
            return self
        flags = ~np.isin(new, np.fromiter(self.stop_ids, np.int64))
        if copyable is not None:
            flags &= _of_length(copyable, len(new), "copyable").astype(bool)
        confidence = None
        if weights is not None:
            values = _of_length(weights, len(new), "weights").astype(np.float64)
            if not ((values >= 0) & (values <= 1)).all():  # catches nan as well
                raise InputError(f"archive: expected weights of 0 to 1, got {values.min()} to {values.max()}")
            confidence = np.rint(values * SURE).astype(np.uint8)
        old = len(self._tail) - LONGEST
        tail = np.concatenate([self._tail, new])
        confidence = _joined(self._weights, old, confidence, len(new), SURE, np.uint8)
        proposable = _joined(self._proposable, old, None if flags.all() else flags, len(new), True, np.bool_)
        if old + len(new) <= max(self.tail_limit, self._sorted // 64):
            return replace(self, _tail=tail, _weights=confidence, _proposable=proposable)
        return self._merged(tail, confidence, proposable)

    def _merged(self, tail: np.ndarray, weights: np.ndarray | None, proposable: np.ndarray | None) -> Archive:
        """All tokens sorted anew, and no tail."""
        ids, count = tail, len(tail) - LONGEST
        if self._static:
            ids = np.concatenate([self._static.ids, tail[LONGEST:]])
            weights = _joined(self._static.weights, self._sorted, weights, count, SURE, np.uint8)
            proposable = _joined(self._static.proposable, self._sorted, proposable, count, True, np.bool_)
        static = SuffixIndex.build(ids, weights, proposable)
        return replace(self, _static=static, _tail=ids[-LONGEST:].copy(), _weights=None, _proposable=None)

    def match(self, suffix: Any, orders: Sequence[int] = ORDERS, longest: int = LONGEST) -> Matches:
        """Every earlier occurrence of a text's last tokens that is followed by a token that may be proposed.

        Args:
            suffix: the text's last ids, the newest at the end; only what stands after its last stop id is matched.
            orders: numbers of last tokens to match, ascending, 1 to 64.
            longest: tokens up to which the longest match is followed back, 1 to 64.

        Raises:
            InputError: an id outside the vocabulary, or an order or length outside 1 to 64.
        """
        reach = max([*orders, longest])
        if not orders or reach > LONGEST or min([*orders, longest]) < 1 or list(orders) != sorted(set(orders)):
            raise InputError(
                f"archive: expected ascending orders and a length of 1 to {LONGEST}, got {orders}, {longest}"
            )
        pattern = self.pattern(suffix, reach)
        common, early, early_lengths = self._sorted_occurrences(pattern)
        late, late_lengths = self._tail_occurrences(pattern)
        rows, lengths = np.concatenate([early, late]), np.concatenate([early_lengths, late_lengths])
        length = min(longest, max(len(common), int(lengths.max(initial=0))))
        positions = rows[lengths >= length] if length else _NO_ROWS
        if self._static and 0 < length <= len(common):
            # The early rows are among these.
            found = self._static.latest(*common[length - 1])
            positions = np.concatenate([found, late[late_lengths >= length]])
        positions = np.sort(positions)[-LATEST:]
        latest, weight = self._one(int(positions[-1])) if len(positions) else (-1, 0.0)
        return Matches(length, positions, latest, weight, *self._by_order(common, early, late, lengths, orders))

    def source(self, suffix: Any, token: int, tokens: int, after: int | None = None) -> int | None:
        """Position of a token that a text's continuation repeats; None where it could not be copied.

        Of its occurrences that may be proposed the one before which most of the text's last ids stand: what goes on
        from `after` where that is among them, else the latest.

        Args:
            suffix: the text's last ids, the newest at the end.
            token: what continued it.
            tokens: of the archive that count, the first ones.
            after: position that the text's last token was copied from; None: it was not copied.
        """
        pattern = self.pattern(suffix, LONGEST)
        if not len(pattern):
            return None
        rows, lengths = [], []
        static = self._static
        if static:
            found = static.positions_of(token)
            found = found[found < tokens]
            rows.append(found)
            lengths.append(np.minimum(match_lengths(static.ids, found, pattern), found))
        here = self._tail[LONGEST:] == token
        if self._proposable is not None:
            here &= self._proposable
        local = here.nonzero()[0]
        local = local[local + self._sorted < tokens]
        rows.append(local + self._sorted)
        lengths.append(np.minimum(match_lengths(self._tail, local, pattern), rows[-1]))
        positions, reach = np.concatenate(rows), np.concatenate(lengths)
        longest = int(reach.max(initial=0))
        if not longest:
            return None
        best = positions[reach == longest]
        return after + 1 if after is not None and after + 1 in best else int(best.max())

    def _one(self, position: int) -> tuple[int, float]:
        """Id and weight at a position of the archive."""
        static, local = self._static, position - self._sorted
        if static and local < 0:
            ids, weights, at = static.ids, static.weights, position
        else:
            ids, weights, at = self._tail, self._weights, local
        return int(ids[LONGEST + at]), 1.0 if weights is None else float(weights[at]) / SURE

    def pattern(self, suffix: Any, reach: int) -> np.ndarray:
        """What is looked for: a text's last `reach` ids, those behind its last stop id, the newest first."""
        recent = self._checked(np.atleast_1d(suffix)[-reach:])[::-1]
        if self.stop_ids.isdisjoint(recent.tolist()):
            return recent
        return recent[: next(i for i, token in enumerate(recent.tolist()) if token in self.stop_ids)]

    def _sorted_occurrences(self, pattern: np.ndarray) -> tuple[list[tuple[int, int]], np.ndarray, np.ndarray]:
        """Slices of the index by depth while they are large; then positions, and how far each matches."""
        common: list[tuple[int, int]] = []
        low = high = 0
        if self._static:
            index = self._static
            for depth, token in enumerate(pattern.tolist()):
                low, high = index.narrow(low, high, depth, token)
                if high - low <= SMALL:
                    rows = index.ends[low:high].astype(np.int64)
                    return common, rows, np.minimum(match_lengths(index.ids, rows, pattern), rows)
                common.append((low, high))
        return common, _NO_ROWS, _NO_ROWS

    def _tail_occurrences(self, pattern: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions in the tail that the newest token stands before, and how far each matches."""
        if not len(pattern) or len(self._tail) == LONGEST:
            return _NO_ROWS, _NO_ROWS
        before = self._tail[LONGEST - 1 : -1] == pattern[0]
        before[0] &= self._sorted > 0  # before the first token of all stands only padding
        if self._proposable is not None:
            before &= self._proposable
        local = before.nonzero()[0]
        rows = local + self._sorted
        return rows, np.minimum(match_lengths(self._tail, local, pattern), rows)

    def _by_order(
        self,
        common: list[tuple[int, int]],
        early: np.ndarray,
        late: np.ndarray,
        lengths: np.ndarray,
        orders: Sequence[int],
    ) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...], tuple[int, ...]]:
        """Tokens, weights and occurrences of every order.

        Args:
            common: slices of the index by depth while they are large.
            early: positions in the sorted part that match further.
            late: positions in the tail.
            lengths: how far these two match, `[early + late]`.
            orders: numbers of last tokens.
        """
        remembered = sum(order <= len(common) for order in orders)
        furthest = int(lengths.max(initial=0))
        reached = max(remembered, sum(order <= furthest for order in orders))
        tokens, counts, weights = self._counted(early, late, lengths, remembered, np.array(orders[:reached]))
        totals = counts.sum(1, dtype=np.int64).tolist()
        results: list[tuple[np.ndarray, np.ndarray, int]] = []
        for i, order in enumerate(orders[:reached]):
            if i < remembered and self._static:
                low, high = common[order - 1]
                known = self._static.followers(low, high)
                results.append((*_sum(known, tokens, counts[i], weights[i], totals[i]), high - low + totals[i]))
            elif i > remembered and totals[i] == totals[i - 1]:
                results.append(results[-1])  # the same occurrences
            else:
                some = counts[i].nonzero()[0]
                results.append((tokens[some], weights[i, some], totals[i]))
        results += (len(orders) - reached) * [(_NO_TOKENS, _NO_WEIGHTS, 0)]
        return tuple(zip(*results, strict=True))  # pyright: ignore[reportReturnType]

    def _counted(
        self, early: np.ndarray, late: np.ndarray, lengths: np.ndarray, remembered: int, orders: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Distinct tokens at some positions, ascending; `[orders, tokens]` how often each stands; the summed weights.

        The early ones are left out of the first `remembered` orders.
        """
        tokens, weights = self._at(early, late)
        by_token = tokens.argsort(kind="stable")
        tokens = tokens[by_token]
        hits = (lengths[by_token] >= orders[:, None]).astype(np.float32)
        if remembered:
            hits[:remembered] *= by_token >= len(early)
        heads = np.concatenate([[0], (tokens[1:] != tokens[:-1]).nonzero()[0] + 1])[: len(tokens)]
        counts = np.add.reduceat(hits, heads, axis=1) if len(tokens) else hits
        sums = counts
        if weights is not None and len(tokens):
            sums = np.add.reduceat(hits * weights[by_token], heads, axis=1)
        return tokens[heads].astype(np.int64), counts, sums

    def _at(self, early: np.ndarray, late: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Ids at positions of the sorted part and of the tail, and their weights; None where all are 1."""
        local, static = late - self._sorted, self._static
        tokens = self._tail[local + LONGEST]
        weights = None if self._weights is None else self._weights[local]
        if static:
            tokens = np.concatenate([static.ids[early + LONGEST], tokens])
            old = None if static.weights is None else static.weights[early]
            weights = _joined(old, len(early), weights, len(late), SURE, np.uint8)
        return tokens, None if weights is None else weights.astype(np.float32) / SURE

    def _checked(self, ids: Any) -> np.ndarray:
        """`ids` in the archive's dtype."""
        ids = np.asarray(ids)
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise InputError(f"archive: expected a list of token ids, got {ids.dtype} of shape {list(ids.shape)}")
        if ids.size and (ids.min() < 0 or ids.max() >= self.vocab_size):
            raise InputError(f"archive: expected ids of 0 to {self.vocab_size - 1}, got {ids.min()} to {ids.max()}")
        return ids.astype(self._tail.dtype)


def _of_length(values: Any, length: int, name: str) -> np.ndarray:
    array = np.asarray(values)
    if array.shape != (length,):
        raise InputError(f"archive: expected {name} of {length} tokens, got the shape {list(array.shape)}")
    return array


def _joined(old, old_length: int, new, new_length: int, default, dtype) -> np.ndarray | None:
    """Two arrays as one, where None stands for an array of defaults."""
    if old is None and new is None:
        return None
    parts = [(old, old_length), (new, new_length)]
    return np.concatenate([np.full(n, default, dtype) if array is None else array for array, n in parts])


def _sum(
    known: Followers, tokens: np.ndarray, counts: np.ndarray, weights: np.ndarray, total: int
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and weights of what is remembered with some more tokens (ascending) that stand `counts` times each."""
    if not total:
        return known.tokens.astype(np.int64), known.weights.copy()
    some = counts.nonzero()[0]
    tokens, weights = tokens[some], weights[some]
    at = np.minimum(known.tokens.searchsorted(tokens.astype(known.tokens.dtype)), len(known.tokens) - 1)
    new = known.tokens[at] != tokens
    sums = np.concatenate([known.weights, weights[new]])
    sums[at[~new]] += weights[~new]
    return np.concatenate([known.tokens, tokens[new]]).astype(np.int64), sums
