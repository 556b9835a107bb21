"""What the archive proposes at some positions, and what a gate is told of it.

Axes as in `mixture`: `N` positions, `K` sources, `E` candidates of all positions, `U` of each, `V` vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch

from .archive import ORDERS, Archive, Matches
from .gate import ARCHIVE_FEATURES, FROM_ORDER, INDEX_FEATURES, SOURCES
from .raw_text import RawMatch, RawText
from .suffix_index import LONGEST

_NO_IDS = np.empty(0, np.int64)
_LATEST = SOURCES - 1  # the last source: what followed the latest occurrence of the longest match


@dataclass(frozen=True, eq=False)
class Evidence:
    """What is known before one position, but for the host.

    Attributes:
        matches: of the archive.
        archived: tokens of it.
        raw: what the raw text says; not looked for where the archive matches nothing.
        raw_ids: ids of the raw text, among others that no token has.
    """

    matches: Matches
    archived: int
    raw: RawMatch = RawMatch()
    raw_ids: np.ndarray = field(default_factory=lambda: _NO_IDS)

    @classmethod
    def of(cls, archive: Archive, suffix: np.ndarray, raw: RawText, window: int) -> Evidence:
        """What an archive and the raw text with the first `window` tokens of its window say behind some last ids."""
        matches = archive.match(suffix)
        if not matches.length:
            return cls(matches, len(archive))
        return cls(matches, len(archive), raw.match(archive.pattern(suffix, LONGEST), window), raw.upto(window))


class Proposals(Protocol):
    """What the archive proposes at N positions.

    Values of candidates have a shape `C` of their own: `[E]` where candidates of all positions stand one behind the
    other (`Candidates`), `[N, U]` where every position has as many (`grid.GridCandidates`).
    """

    @property
    def available(self) -> torch.Tensor:
        """`[N, K]`, bool: the source has candidates."""
        ...

    @property
    def confidence(self) -> torch.Tensor:
        """`[N, K]`, float32: mean of a source's occurrences, 0 to 1; below 1 for rebuilt tokens alone."""
        ...

    @property
    def chosen(self) -> torch.Tensor:
        """`[N]`, int64: the most probable token of the longest order; -1 where there is none."""
        ...

    @property
    def features(self) -> torch.Tensor:
        """`[N, ARCHIVE_FEATURES]`, float32."""
        ...

    def __len__(self) -> int:
        """Number of positions N."""
        ...

    def at(self, scores: torch.Tensor) -> torch.Tensor:
        """`C`: the entries of `[N, V]` or, one a position, of `[N]`."""
        ...

    def expected(self, values: torch.Tensor) -> torch.Tensor:
        """`[N, K]`: the mean of values `C` under each source."""
        ...

    def of_best(self, values: torch.Tensor) -> torch.Tensor:
        """`[N, K]`: the value `C` of each source's most probable token; 0 where it has none."""
        ...

    def allowed(self, keep: torch.Tensor) -> Proposals:
        """Without the candidates that a mask `C` leaves out; the others of their source share its probability."""
        ...

    def added(self, weights: torch.Tensor) -> torch.Tensor:
        """`C`: probability that each gets from sources that weigh `[N, K]`."""
        ...

    def of(self, targets: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """`[N]`: the sum of values `C` at one token a position."""
        ...

    def named(self, flags: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions and tokens of the candidates that flags `C` mark; asking waits for the device."""
        ...

    def best(self, own: torch.Tensor, added: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`[N]` each: the highest log-probability of a candidate and the token that has it; -inf where there is none.

        Args:
            own: `C`, log-probability that the host gives, its weight counted.
            added: `C`, see there.
        """
        ...

    def mixed(self, own: torch.Tensor, added: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities `[N, V]` of host and archive, and `C`: log-probability that a token gets from the archive.

        Args:
            own: `[N, V]`, the host's, its weight counted; written to.
            added: `C`, see there.
        """
        ...


@dataclass(frozen=True, eq=False)
class Candidates:
    """What the archive proposes at N positions, flat; see `Proposals`.

    Attributes:
        positions: `[E]`, int64, ascending.
        sources: `[E]`, int64, index of the order, or K - 1 for the latest occurrence.
        tokens: `[E]`, int64.
        probabilities: `[E]`, float32; they sum to 1 over a position and source.
        available: see `Proposals`.
        confidence: likewise.
        best_entry: `[N, K]`, int64, the entry of the source's most probable token; 0 where there is none.
        chosen: see `Proposals`.
        features: likewise.
    """

    positions: torch.Tensor
    sources: torch.Tensor
    tokens: torch.Tensor
    probabilities: torch.Tensor
    available: torch.Tensor
    confidence: torch.Tensor
    best_entry: torch.Tensor
    chosen: torch.Tensor
    features: torch.Tensor

    def __len__(self) -> int:
        """Number of positions N."""
        return len(self.features)

    def to(self, device: torch.device | str) -> Candidates:
        """The same on a device."""
        return Candidates(**{name: value.to(device) for name, value in vars(self).items()})

    @property
    def cells(self) -> torch.Tensor:
        """`[E]`: the position and source of each, as an index into `[N * K]`."""
        return self.positions * SOURCES + self.sources

    def by_source(self, values: torch.Tensor) -> torch.Tensor:
        """`[N, K]`: sums of values `[E]`."""
        flat = torch.zeros(len(self) * SOURCES, device=values.device, dtype=values.dtype)
        return flat.index_add_(0, self.cells, values).view(-1, SOURCES)

    def at(self, scores: torch.Tensor) -> torch.Tensor:
        """See `Proposals.at`."""
        return scores[self.positions, self.tokens] if scores.ndim == 2 else scores[self.positions]

    def expected(self, values: torch.Tensor) -> torch.Tensor:
        """See `Proposals.expected`."""
        return self.by_source(self.probabilities * values)

    def of_best(self, values: torch.Tensor) -> torch.Tensor:
        """See `Proposals.of_best`."""
        if not len(values):
            return torch.zeros(self.available.shape, device=values.device)
        return torch.where(self.available, values[self.best_entry], 0.0)

    def allowed(self, keep: torch.Tensor) -> Candidates:
        """See `Proposals.allowed`."""
        allowed = torch.where(keep, self.probabilities, 0.0)
        kept, lost = self.by_source(allowed), self.by_source((~keep).float())
        share = torch.where(lost > 0, kept, 1.0)  # exactly as it was where nothing is left out
        probabilities = allowed / share.flatten()[self.cells].clamp(min=1e-12)
        return replace(self, probabilities=probabilities, available=self.available & (kept > 0))

    def added(self, weights: torch.Tensor) -> torch.Tensor:
        """See `Proposals.added`."""
        return weights[self.positions, self.sources] * self.probabilities

    def of(self, targets: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """See `Proposals.of`."""
        hit = targets[self.positions] == self.tokens
        return torch.zeros(len(self), device=values.device).index_add_(0, self.positions, values * hit)

    def named(self, flags: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Proposals.named`."""
        return self.positions[flags], self.tokens[flags]

    def best(self, own: torch.Tensor, added: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Proposals.best`."""
        highest = torch.full((len(self),), -math.inf, device=own.device)
        token = torch.zeros(len(self), dtype=torch.long, device=own.device)
        if not len(self.tokens):
            return highest, token
        cells, inverse = torch.unique(torch.stack([self.positions, self.tokens]), dim=1, return_inverse=True)
        total = torch.zeros(cells.shape[1], device=own.device).index_add_(0, inverse, added)
        hosts = torch.full_like(total, -math.inf).index_put_((inverse,), own)
        total = torch.logaddexp(hosts, total.log())
        highest.scatter_reduce_(0, cells[0], total, "amax")
        top = total == highest[cells[0]]
        token[cells[0][top]] = cells[1][top]
        return highest, token

    def mixed(self, own: torch.Tensor, added: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Proposals.mixed`."""
        at = (self.positions, self.tokens)
        extra = torch.zeros_like(own).index_put_(at, added, accumulate=True)
        copied = extra[at].log()
        return own.index_put_(at, torch.logaddexp(own[at], copied)), copied  # a token's sources write the same


def collect(evidence: Sequence[Evidence]) -> Candidates:
    """Candidates and their features from what is known before N positions; on the CPU."""
    features = np.zeros((len(evidence), ARCHIVE_FEATURES), np.float32)
    available = np.zeros((len(evidence), SOURCES), bool)
    confidence = np.ones((len(evidence), SOURCES), np.float32)
    best = np.zeros((len(evidence), SOURCES), np.int64)
    chosen = np.full(len(evidence), -1, np.int64)
    tokens, probabilities, cells, sizes, total = [], [], [], [], 0
    for n, known in enumerate(evidence):
        match, tops = known.matches, []
        ids, shares = _NO_IDS, np.empty(0, np.float32)  # of the longest order, in the end
        for k in range(len(ORDERS)):
            if k >= len(match.weights) or not len(match.weights[k]):
                break
            weights = match.weights[k]
            whole = float(weights.sum())
            if whole <= 0:  # rebuilt with no confidence at all
                continue
            ids, occurrences = match.tokens[k], match.occurrences[k]
            tied = np.flatnonzero(weights >= weights.max() * (1 - 1e-6))
            top = int(tied[ids[tied].argmin()])  # whatever order they come in
            available[n, k], best[n, k], confidence[n, k] = True, total + top, min(1.0, whole / occurrences)
            shares = weights / whole
            features[n, FROM_ORDER * k : FROM_ORDER * (k + 1)] = (
                1.0, math.log1p(occurrences) / 8, math.log1p(len(weights)) / 8, float(shares[top])
            )  # fmt: skip
            tops.append(int(ids[top]))
            tokens.append(ids)
            probabilities.append(shares)
            cells.append((n, k))
            sizes.append(len(ids))
            total += len(ids)
        if not tops:
            continue
        chosen[n] = tops[-1]
        features[n, FROM_ORDER * len(ORDERS) : INDEX_FEATURES] = (
            math.log2(1 + match.length) / 6, tops.count(tops[-1]) / len(tops), float(match.length >= 32)
        )  # fmt: skip
        features[n, INDEX_FEATURES:] = _beside(known, tops[-1], ids, shares)
        if not match.latest_weight:
            continue
        available[n, _LATEST], best[n, _LATEST], confidence[n, _LATEST] = True, total, match.latest_weight
        tokens.append(np.array([match.latest]))
        probabilities.append(np.ones(1, np.float32))
        cells.append((n, _LATEST))
        sizes.append(1)
        total += 1
    flat = np.repeat(np.array(cells, np.int64).reshape(-1, 2), sizes, axis=0)
    return Candidates(
        torch.from_numpy(flat[:, 0].copy()),
        torch.from_numpy(flat[:, 1].copy()),
        torch.from_numpy(np.concatenate(tokens) if tokens else np.empty(0, np.int64)),
        torch.from_numpy(np.concatenate(probabilities).astype(np.float32) if tokens else np.empty(0, np.float32)),
        torch.from_numpy(available),
        torch.from_numpy(confidence),
        torch.from_numpy(best),
        torch.from_numpy(chosen),
        torch.from_numpy(features),
    )


def _beside(known: Evidence, chosen: int, ids: np.ndarray, shares: np.ndarray) -> tuple[float, ...]:
    """What the raw text says of the chosen token, and how the archive's occurrences differ; `BESIDE` features.

    Args:
        known: before the position.
        chosen: most probable token of the longest order.
        ids: what followed the longest order, `[tokens]`.
        shares: of its occurrences, `[tokens]`.
    """
    match, raw = known.matches, known.raw

    def share(token: int) -> float:
        return float(shares[ids == token].sum())

    return (
        float(raw.length > 0),
        math.log2(1 + raw.length) / 6,
        float(raw.length >= match.length),
        max(-1.0, min(1.0, (raw.length - match.length) / 8)),
        float(raw.token == chosen),
        float(raw.length > 0 and raw.token != chosen),
        math.log1p(raw.occurrences) / 6,
        raw.share,
        float((known.raw_ids == chosen).any()),
        float(match.latest == chosen),
        share(match.latest),
        math.log2(1 + known.archived - int(match.positions[-1])) / 20,
        math.log1p(len(match.positions)) / 4,
        float(len(ids) > 1),
        share(raw.token),
        float(raw.token == match.latest),
    )
