"""Every position where some last tokens stood before: a suffix array over the reversed text.

Reversed, because a query grows to the left: the occurrences of its last k + 1 tokens lie, in sorted order, within
those of its last k. An occurrence is named by the position of what followed it.
"""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np

LONGEST = 64  # tokens that a match is followed back; as many stand as padding before every text
LATEST = 64  # positions that a match names
SURE = 255  # the weight 1 as it is stored


@dataclass(frozen=True, eq=False)
class Followers:
    """What followed one set of occurrences.

    Attributes:
        tokens: ids, ascending, uint16 or uint32.
        weights: for each of them the sum of the weights of its occurrences, float32.
    """

    tokens: np.ndarray
    weights: np.ndarray

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return self.tokens.nbytes + self.weights.nbytes


class Memory:
    """What was used last, up to a number of bytes; safe to share between threads. A copy of it begins empty."""

    def __init__(self, limit: int):
        self.limit, self.nbytes = limit, 0
        self._values: OrderedDict[Hashable, Any] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self):
        return Memory, (self.limit,)

    def get(self, key: Hashable) -> Any:
        """What is remembered under `key`, or None."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
            return self._values.get(key)

    def put(self, key: Hashable, value: Any) -> None:
        """Remembers `value`, which has `nbytes`, and forgets what was not used for longest."""
        with self._lock:
            if key in self._values:  # another thread was faster
                return
            self._values[key] = value
            self.nbytes += value.nbytes
            while self.nbytes > self.limit:
                self.nbytes -= self._values.popitem(last=False)[1].nbytes


@dataclass(frozen=True, eq=False)
class SuffixIndex:
    """A fixed text and its positions, sorted by what stands before them, read backwards.

    Attributes:
        ids: the text behind `LONGEST` ids of padding, uint16 or uint32, `[LONGEST + tokens]`.
        weights: confidence of each token in 255ths, uint8, `[tokens]`; None: all are certain.
        ends: the positions that may be proposed, sorted, int32, `[at most tokens - 1]`.
        tokens: the distinct tokens that stand right before a position, ascending.
        starts: where the positions behind each of them begin in `ends`, int32, `[len(tokens) + 1]`.
        memory: what was found in large slices of `ends`.
    """

    ids: np.ndarray
    weights: np.ndarray | None
    ends: np.ndarray
    tokens: np.ndarray
    starts: np.ndarray
    memory: Memory

    @classmethod
    def build(
        cls, ids: np.ndarray, weights: np.ndarray | None = None, proposable: np.ndarray | None = None
    ) -> SuffixIndex:
        """Sorts a text: about 0.2 s for a million tokens, and for the moment about 25 bytes for each of them.

        Args:
            ids: the text behind `LONGEST` ids of padding, uint16 or uint32.
            weights: confidence of each token in 255ths, uint8, `[tokens]`.
            proposable: bool, `[tokens]`; only these positions are indexed. None: all of them.
        """
        from pydivsufsort import divsufsort  # a short archive is never sorted: it works without

        text = ids[LONGEST:]
        # Position `len(text)` is sorted as well: the text's end, which nothing follows.
        ends = len(text) - divsufsort(np.ascontiguousarray(text[::-1]))
        ends = ends[ends < len(text)]
        if proposable is not None:
            ends = ends[proposable[ends]]
        before = text[ends - 1]
        starts = (before[1:] != before[:-1]).nonzero()[0] + 1
        starts = np.concatenate([[0], starts, [len(ends)]] if len(ends) else [[0]]).astype(np.int32)
        memory = Memory(max(1 << 20, 2 * len(text)))
        return cls(ids, weights, ends.astype(np.int32, copy=False), before[starts[:-1]], starts, memory)

    def __len__(self) -> int:
        """Tokens of the text."""
        return len(self.ids) - LONGEST

    @property
    def nbytes(self) -> int:
        """Bytes of the index and of what it remembers; text and weights are not counted."""
        return self.ends.nbytes + self.tokens.nbytes + self.starts.nbytes + self.memory.nbytes

    @property
    def proposable(self) -> np.ndarray | None:
        """Which positions may be proposed, bool `[tokens]`; None: all. The first never is."""
        if len(self.ends) == len(self) - 1:
            return None
        flags = np.zeros(len(self), bool)
        flags[self.ends] = True
        return flags

    def positions_of(self, token: int) -> np.ndarray:
        """Positions of a token that may be proposed, ascending, int64."""
        found = (self.ids[LONGEST:] == token).nonzero()[0]
        flags = self.proposable
        return found if flags is None else found[flags[found]]

    def narrow(self, low: int, high: int, depth: int, token: int) -> tuple[int, int]:
        """Of the occurrences of `depth` tokens, the slice of `ends` that `token` stands before.

        Args:
            low: first of the slice of `ends` that holds the occurrences; not read at depth 0.
            high: end of that slice.
            depth: tokens that the occurrences have in common, from 0.
            token: the token to the left of them.
        """
        if depth == 0:
            at = bisect_left(self.tokens.data, token)
            found = at < len(self.tokens) and self.tokens[at] == token
            return (int(self.starts[at]), int(self.starts[at + 1])) if found else (0, 0)
        ids, ends, offset = self.ids.data, self.ends.data, LONGEST - 1 - depth
        if low < high and ends[low] == depth:
            low += 1  # the text begins there: nothing stands to the left
        if low == high:
            return low, low
        if ids[ends[low] + offset] == token == ids[ends[high - 1] + offset]:
            return low, high  # repeated text: most steps narrow nothing

        def left(end: int) -> int:
            return ids[end + offset]

        low = bisect_left(ends, token, low, high, key=left)
        return low, bisect_right(ends, token, low, high, key=left)

    def followers(self, low: int, high: int) -> Followers:
        """What followed the occurrences in a slice of `ends` that is not empty."""
        found = self.memory.get((low, high))
        if found is None:
            ends = self.ends[low:high]
            tokens = self.ids[ends + LONGEST]
            confidence = None if self.weights is None else self.weights[ends]
            if 6 * len(tokens) > tokens.max():  # sorting many takes longer than counting all ids
                weights = counts = np.bincount(tokens)
                if confidence is not None:
                    weights = np.bincount(tokens, confidence) / SURE
                tokens = counts.nonzero()[0].astype(tokens.dtype)
                weights = weights[tokens]
            elif confidence is None:
                tokens, weights = np.unique(tokens, return_counts=True)
            else:
                tokens, which = np.unique(tokens, return_inverse=True)
                weights = np.bincount(which, confidence) / SURE
            found = Followers(tokens, weights.astype(np.float32))
            self.memory.put((low, high), found)
        return found

    def latest(self, low: int, high: int) -> np.ndarray:
        """The last `LATEST` positions in a slice of `ends`, int64, in no order."""
        found = self.memory.get((low, high, LATEST))
        if found is None:
            ends = self.ends[low:high]
            found = (np.partition(ends, -LATEST)[-LATEST:] if len(ends) > LATEST else ends).astype(np.int64)
            self.memory.put((low, high, LATEST), found)
        return found


_BACK = LONGEST - 1 - np.arange(LONGEST)  # from a position, past the padding, to the tokens before it, nearest first
_NEAR = 8  # tokens that every position is compared on; few agree on more


def match_lengths(ids: np.ndarray, rows: np.ndarray, pattern: np.ndarray) -> np.ndarray:
    """How many tokens before each position agree with a pattern, int64 `[rows]`; padding is compared like text.

    Args:
        ids: a text behind `LONGEST` ids that stand before it.
        rows: positions in the text, int64 `[rows]`.
        pattern: ids, the last one first, at most `LONGEST`.
    """
    lengths = _leading(ids.take(rows[:, None] + _BACK[: len(pattern[:_NEAR])]) == pattern[:_NEAR])
    if len(pattern) > _NEAR:
        more = (lengths == _NEAR).nonzero()[0]
        if len(more):
            back = _BACK[_NEAR : len(pattern)]
            lengths[more] += _leading(ids.take(rows[more, None] + back) == pattern[_NEAR:])
    return lengths


def _leading(agree: np.ndarray) -> np.ndarray:
    """Number of leading True in each row."""
    lengths = agree.argmin(1)
    lengths[agree.all(1)] = agree.shape[1]
    return lengths
