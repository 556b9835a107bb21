"""The archive as a list that is read from end to end for every query."""

from dataclasses import dataclass, field

import numpy as np
import pytest


@dataclass
class SlowArchive:
    stop_ids: frozenset = frozenset()
    ids: list = field(default_factory=list)
    weights: list = field(default_factory=list)
    copyable: list = field(default_factory=list)

    def extended(self, ids, weights=None, copyable=None):
        ids = [int(i) for i in ids]
        weights = [1.0] * len(ids) if weights is None else [round(float(w) * 255) / 255 for w in weights]
        copyable = [True] * len(ids) if copyable is None else [bool(c) for c in copyable]
        return SlowArchive(self.stop_ids, self.ids + ids, self.weights + weights, self.copyable + copyable)

    def match(self, suffix, orders, longest):
        """Length, positions, for each order the weights by token, and the occurrences."""
        suffix = [int(i) for i in suffix]
        stops = [i for i, token in enumerate(suffix) if token in self.stop_ids]
        suffix = suffix[stops[-1] + 1 :] if stops else suffix

        def occurrences(k):
            if k > len(suffix):
                return []
            return [
                i
                for i in range(k, len(self.ids))
                if self.ids[i - k : i] == suffix[-k:] and self.copyable[i] and self.ids[i] not in self.stop_ids
            ]

        length = max((k for k in range(1, longest + 1) if occurrences(k)), default=0)
        followers = []
        for k in orders:
            found = {}
            for i in occurrences(k):
                found[self.ids[i]] = found.get(self.ids[i], 0.0) + self.weights[i]
            followers.append(found)
        return length, occurrences(length)[-64:] if length else [], followers, [len(occurrences(k)) for k in orders]


def slow_raw(parts, suffix, stop_ids=()):
    """Length, token, occurrences and share of the longest match within one of some parts, read from end to end."""
    stops = [i for i, token in enumerate(suffix) if token in stop_ids]
    suffix = [int(i) for i in (suffix[stops[-1] + 1 :] if stops else suffix)][-64:]
    found = []
    for part in parts:
        part = [int(i) for i in part]
        for at in range(1, len(part)):
            length = 0
            while length < min(at, len(suffix)) and part[at - 1 - length] == suffix[-1 - length]:
                length += 1
            found.append((length, part[at]))
    longest = max((length for length, _ in found), default=0)
    tokens = [token for length, token in found if length == longest and longest]
    if not tokens:
        return 0, -1, 0, 0.0
    return longest, tokens[-1], len(tokens), tokens.count(tokens[-1]) / len(tokens)


def assert_same(matches, expected, slow=None):
    length, positions, followers, counts = expected
    assert (matches.length, matches.positions.tolist()) == (length, positions)
    if slow is not None:
        assert matches.latest == (slow.ids[positions[-1]] if positions else -1)
        assert matches.latest_weight == pytest.approx(slow.weights[positions[-1]] if positions else 0.0)
    assert matches.occurrences == tuple(counts) and all(type(count) is int for count in matches.occurrences)
    for tokens, weights, wanted in zip(matches.tokens, matches.weights, followers, strict=True):
        assert (tokens.dtype, weights.dtype, len(tokens)) == (np.int64, np.float32, len(wanted))
        assert dict(zip(tokens.tolist(), weights.tolist(), strict=True)) == pytest.approx(wanted, abs=1e-4)
