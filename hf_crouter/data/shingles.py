"""Text as hashes of its tokens and token n-grams, 64 bits each, vectorised and the same on every machine.

A token here is a run of letters, digits, `_` and non-ASCII bytes, or one other visible byte; white space separates
and is dropped. This is no model's tokenizer: it makes duplicates and overlaps independent of one.
"""

from __future__ import annotations

import functools

import numpy as np

_WORD, _SPACE = 1, 0
_MULTIPLIER = 0x9E3779B97F4A7C15 | 1
_INVERSE = pow(_MULTIPLIER, -1, 1 << 64)


def _byte_classes() -> np.ndarray:
    classes = np.full(256, 2, dtype=np.uint8)
    classes[[9, 10, 11, 12, 13, 32]] = _SPACE
    word = [*range(48, 58), *range(65, 91), *range(97, 123), ord("_"), *range(128, 256)]
    classes[word] = _WORD
    return classes


_CLASSES = _byte_classes()


@functools.lru_cache(maxsize=2)
def _powers(length: int) -> tuple[np.ndarray, np.ndarray]:
    # Powers of an odd multiplier and of its inverse modulo 2^64, where unsigned arithmetic wraps by itself.
    forward = np.full(length, _MULTIPLIER, dtype=np.uint64)
    backward = np.full(length, _INVERSE, dtype=np.uint64)
    forward[0] = backward[0] = 1
    return np.multiply.accumulate(forward), np.multiply.accumulate(backward)


def _mix(values: np.ndarray) -> np.ndarray:
    # The finaliser of splitmix64: spreads every input bit over all output bits.
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def token_hashes(text: str) -> np.ndarray:
    """Hashes of the text's tokens in order, `[tokens]`, uint64."""
    data = np.frombuffer(text.encode("utf-8", "surrogatepass"), dtype=np.uint8)
    if not len(data):
        return np.empty(0, dtype=np.uint64)
    classes = _CLASSES[data]
    before = np.concatenate(([np.uint8(_SPACE)], classes[:-1]))
    after = np.concatenate((classes[1:], [np.uint8(_SPACE)]))
    visible = classes != _SPACE
    # A word byte begins (ends) a token only next to a byte of another class; any other visible byte is a token alone.
    starts = np.flatnonzero(visible & ((classes != _WORD) | (before != _WORD)))
    ends = np.flatnonzero(visible & ((classes != _WORD) | (after != _WORD))) + 1
    # Rounded up, so that few tables of powers are ever built.
    forward, backward = _powers(1 << max(16, int(len(data)).bit_length()))
    prefix = np.zeros(len(data) + 1, dtype=np.uint64)
    np.cumsum((data.astype(np.uint64) + np.uint64(1)) * forward[: len(data)], out=prefix[1:])
    return _mix((prefix[ends] - prefix[starts]) * backward[starts])


def gram_hashes(tokens: np.ndarray, n: int) -> np.ndarray:
    """Hashes of all n-grams in order, `[tokens - n + 1]` (empty for shorter texts), uint64.

    Args:
        tokens: token hashes `[tokens]`, as from `token_hashes`.
        n: tokens in a gram.
    """
    count = len(tokens) - n + 1
    if count < 1:
        return np.empty(0, dtype=np.uint64)
    total = np.zeros(count, dtype=np.uint64)
    for offset in range(n):
        total = total * np.uint64(_MULTIPLIER) + tokens[offset : offset + count]
    return _mix(total)


def sorted_unique(values: np.ndarray) -> np.ndarray:
    """The distinct values in ascending order."""
    # np.unique may build a hash table, which is many times slower on large input.
    values = np.sort(values)
    return values[np.concatenate(([True], values[1:] != values[:-1]))] if len(values) else values
