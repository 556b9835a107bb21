"""What the text that a host reads raw says of the next token: where its last tokens stood in there before.

A raw window or a retrieved chunk that goes on otherwise than the archive speaks against a copy: the host sees it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from .suffix_index import LONGEST, match_lengths

_NOTHING, _BREAK = -1, -2  # ids of no token: what stands before the text, and between its parts


@dataclass(frozen=True, eq=False)
class RawMatch:
    """The longest match of a text's last tokens within the raw text.

    Attributes:
        length: tokens of it; 0 without one.
        token: id that followed its latest occurrence; -1 without a match.
        occurrences: of that length.
        share: of them that the same id followed.
    """

    length: int = 0
    token: int = -1
    occurrences: int = 0
    share: float = 0.0


class RawText:
    """One row's raw text: its beginning, retrieved chunks and the window.

    Args:
        parts: ids of what stands before the window, each `[tokens]`; no match reaches over a seam.
        window: ids of the window, as far as it is known.
    """

    def __init__(self, parts: Iterable[np.ndarray], window: np.ndarray):
        pieces = [np.full(LONGEST, _NOTHING, np.int64)]
        for part in parts:
            pieces += [part, np.array([_BREAK])]
        self._before = sum(map(len, pieces))
        self._ids = np.concatenate([*pieces, window])

    def upto(self, window: int) -> np.ndarray:
        """Ids of the text with the first so many tokens of its window, seams and padding among them."""
        return self._ids[: self._before + window]

    def match(self, pattern: np.ndarray, window: int) -> RawMatch:
        """The longest match in the text with the first so many tokens of its window.

        Args:
            pattern: a text's last ids, the newest first, at most 64.
            window: tokens.
        """
        ids = self.upto(window)
        if not len(pattern):
            return RawMatch()
        text = ids[LONGEST:]
        found = (text[:-1] == pattern[0]).nonzero()[0] + 1
        found = found[text[found] >= 0]
        if not len(found):
            return RawMatch()
        lengths = match_lengths(ids, found, pattern)
        length = int(lengths.max())
        followers = text[found[lengths == length]]
        token = int(followers[-1])
        return RawMatch(length, token, len(followers), float((followers == token).mean()))
