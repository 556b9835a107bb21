"""What all parts of the routing measurement share: the texts, cut into pieces of every kind.

Axes: `W` test windows of two chunks, `N` pieces.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from eval.routing.mixed import Mixed
from eval.routing.splice import Spliced, changing, splice
from eval.routing.windows import TestWindows
from hf_crouter.data.tokens import TokenArray
from hf_crouter.training.experts import cut

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Setting:
    """What all parts share.

    Attributes:
        windows: test windows `[W, 2 * chunk]`, known and unknown domains.
        mixed: real mixed documents.
        train: training tokens of each known domain.
        calibration: calibration tokens of each.
        domains: the known ones, in the experts' order.
        chunk: tokens of a chunk.
        pieces: spliced and changing documents, each.
        limit: calibration and training pieces of a domain, at most.
        rows: chunks at once.
        seed: of everything drawn.
        mixed_fit: real mixed documents of the calibration part, to choose how borders are found in such.
    """

    windows: TestWindows
    mixed: Mixed
    train: list[TokenArray]
    calibration: list[TokenArray]
    domains: tuple[str, ...]
    chunk: int
    pieces: int = 400
    limit: int = 300
    rows: int = 4
    seed: int = 0
    mixed_fit: Mixed | None = None

    @property
    def span(self) -> int:
        """Tokens of a span."""
        return self.chunk // 4

    @property
    def chunks(self) -> np.ndarray:
        """`[2W, chunk]`; both chunks of a window stand side by side."""
        return self.windows.ids.reshape(-1, self.chunk)

    @property
    def spans(self) -> np.ndarray:
        """`[8W, span]`."""
        return self.windows.ids.reshape(-1, self.span)

    @property
    def known(self) -> np.ndarray:
        """Windows of known domains, their numbers."""
        return np.flatnonzero(np.isin(self.windows.domains, self.domains))

    def cut(self, tokens: TokenArray, length: int) -> np.ndarray:
        """Whole pieces of documents, evenly spread, `[N, length]`."""
        pieces, _ = cut(tokens, length, self.limit, length)
        return np.array([piece.numpy() for piece in pieces], np.int64).reshape(-1, length)

    def calibration_windows(self) -> tuple[np.ndarray, np.ndarray]:
        """Windows `[W, 2 * chunk]` of calibration documents and their domains."""
        rows = [self.cut(tokens, 2 * self.chunk) for tokens in self.calibration]
        names = np.repeat(np.array(self.domains), [len(some) for some in rows])
        return np.concatenate(rows), names

    def own_pieces(self, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Calibration pieces `[N, length]` of all domains, and the numbers of domain and document of each."""
        ids, domains, documents = [], [], []
        for number, tokens in enumerate(self.calibration):
            pieces, groups = cut(tokens, length, self.limit, length)
            ids += [piece.numpy() for piece in pieces]
            domains += [number] * len(pieces)
            documents.append(groups)
        return np.stack(ids), np.array(domains), np.concatenate(documents)

    def fit(self) -> Spliced:
        """Spliced calibration chunks, to choose how borders are found."""
        ids, domains = self.calibration_windows()
        return splice(ids, domains, max(8, self.pieces // 8), self.seed + 1)

    def spliced(self) -> Spliced:
        """Spliced test chunks; rows are numbered among the known windows."""
        known = self.known
        return splice(self.windows.ids[known], self.windows.domains[known], self.pieces, self.seed)

    def changing(self) -> Spliced:
        """Test documents that change once; rows are numbered among the known windows."""
        known = self.known
        return changing(self.windows.ids[known], self.windows.domains[known], self.pieces, self.seed)

    def bordered(self) -> Arrays:
        """All pieces `[P, T]` in which borders are looked for, by name."""
        found = {"fit": self.fit().ids, "spliced": self.spliced().ids, "mixed": self.mixed.ids.astype(np.int64)}
        if self.mixed_fit is not None:
            found["mixed_fit"] = self.mixed_fit.ids.astype(np.int64)
        return found
