"""Which expert serves a chunk: the one that rebuilds it best, measured by what is usual for each.

Axes: `N` chunks, `n` experts, `T` tokens of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ..adapters import BASE, AdapterStack
from ..compressor import CRouterModel
from ..errors import InputError
from ..types import Route
from .calibration import LengthCalibration
from .experts import ExpertSet

SCORES = ("nll", "calibrated", "scaled")


def calibrated_score(nats: Any, tokens: int, calibration: LengthCalibration, score: str = "nll") -> Any:
    """A residual as one expert's calibration sees it; the lower, the more the text is its own.

    Args:
        nats: nats/token, a number or a tensor of any shape.
        tokens: length of the text that was rebuilt.
        calibration: the expert's.
        score: `nll`: the residual as it is, a likelihood under models of one kind; `calibrated`: minus the expert's
            own median, which leans to experts of hard domains where the adapters are weak; `scaled`: that over the
            distance from its median to its 90% quantile, no unit.
    """
    if score == "nll":
        return nats
    median = calibration.residual(tokens, 0.5)
    spread = max(calibration.residual(tokens, 0.9) - median, 1e-6) if score == "scaled" else 1.0
    return (nats - median) / spread


@torch.no_grad()
def rebuilding_nats(
    crouter: CRouterModel, pieces: Sequence[torch.Tensor], stack: AdapterStack | None = None, *, rows: int = 4
) -> list[torch.Tensor]:
    """What rebuilding each token of each text costs, `[T]` a text, nats, float32, on the CPU.

    Args:
        crouter: on any device.
        pieces: crouter token ids, 1-D, 1 to `chunk_length` each.
        stack: one adapter over this crouter, which serves; None: the crouter as it is.
        rows: texts at once.

    Raises:
        InputError: a text that is empty, too long or not 1-D.
    """
    length = crouter.config.chunk_length
    for piece in pieces:
        if piece.ndim != 1 or not 1 <= len(piece) <= length:
            raise InputError(f"expected texts of 1 to {length} tokens, got one of shape {list(piece.shape)}")
    found = []
    for start in range(0, len(pieces), rows):
        batch = list(pieces[start : start + rows])
        ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True).to(crouter.device)
        lengths = torch.tensor([len(piece) for piece in batch])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).to(crouter.device)
        if stack is None:
            nats = crouter(ids, mask).token_residual
        else:
            with stack.using([0] * len(batch)):
                nats = crouter(ids, mask).token_residual
        found += [row[: len(piece)] for row, piece in zip(nats.float().cpu(), batch, strict=True)]
    return found


class Router:
    """Rebuilds chunks under every expert and decides.

    Every expert is its own stack and its own passes: what is computed for one cannot depend, not in one bit, on how
    many others are mounted. Outside its methods the crouter is bit for bit what it was.

    Args:
        crouter: the shared one; that it is the experts' own is for `ExpertSet.check` to say.
        experts: at least one.
        shortlist: only so many experts are scored a chunk, those whose texts lie nearest to its latents without any
            adapter: one pass of the encoder in place of a whole pass for each expert left out. 0: all are.
        stay: how much lower than the previous expert's the best score must be for the route to change.
        score: what experts are compared by, see `calibrated_score`.
        fewest: chunks of fewer tokens are not judged.
        known: quantile of an expert's own residuals above which a chunk is none of its own.
        clear: quantile of an expert's own margins below which a second expert is called an overlap; margins that were
            measured with another score do not count.
        rows: chunks at once.

    Raises:
        InputError: no expert, an unknown score, or a shortlist of experts without a centroid.
        MismatchError: an adapter that does not fit the crouter.
    """

    def __init__(
        self,
        crouter: CRouterModel,
        experts: ExpertSet,
        *,
        shortlist: int = 0,
        stay: float = 0.0,
        score: str = "nll",
        fewest: int = 64,
        known: float = 0.99,
        clear: float = 0.01,
        rows: int = 4,
    ):
        if not len(experts):
            raise InputError("router: expected at least one expert, got an empty set")
        if score not in SCORES:
            raise InputError(f"router: expected a score of {', '.join(SCORES)}, got {score}")
        without = [expert.name for expert in experts if expert.centroid is None]
        if shortlist and without:
            raise InputError(f"router: expected a centroid of every expert for a shortlist, got none of {without[0]}")
        self.crouter, self.experts = crouter, experts
        self.shortlist, self.stay, self.score, self.fewest = shortlist, stay, score, fewest
        self.known, self.clear, self.rows = known, clear, rows
        self._stacks = []
        try:
            for expert in experts:
                self._stacks.append(AdapterStack(crouter, {expert.name: expert.compressor}))
        except BaseException:
            self.remove()
            raise

    @property
    def names(self) -> tuple[str, ...]:
        """The experts' names; their numbers are their places."""
        return self.experts.names

    def residuals(self, pieces: Sequence[torch.Tensor]) -> torch.Tensor:
        """How well each expert rebuilds each chunk, `[N, n]`, nats/token; nan where the shortlist left one out.

        Args:
            pieces: crouter token ids, 1-D, 1 to `chunk_length` each.

        Raises:
            InputError: a chunk that is empty or too long, or the router's adapters were removed.
        """
        wanted = self.shortlisted(pieces)
        found = torch.full(wanted.shape, math.nan)
        for number in range(len(self.experts)):
            stack = self._stack(number)
            chosen = [i for i in range(len(pieces)) if wanted[i, number]]
            nats = rebuilding_nats(self.crouter, [pieces[i] for i in chosen], stack, rows=self.rows)
            for i, row in zip(chosen, nats, strict=True):
                found[i, number] = row.mean()
        return found

    def token_residuals(self, piece: torch.Tensor, numbers: Sequence[int] | None = None) -> torch.Tensor:
        """What rebuilding each token of a chunk costs under each expert, `[n, T]`, nats.

        Args:
            piece: crouter token ids, `[T]`.
            numbers: only these experts, nan for the others; all by default, whatever the shortlist.
        """
        found = torch.full((len(self.experts), len(piece)), math.nan)
        for number in range(len(self.experts)) if numbers is None else numbers:
            found[number] = rebuilding_nats(self.crouter, [piece], self._stack(number))[0]
        return found

    @torch.no_grad()
    def shortlisted(self, pieces: Sequence[torch.Tensor]) -> torch.Tensor:
        """Which experts are scored for which chunk, `[N, n]`, bool."""
        wanted = torch.ones(len(pieces), len(self.experts), dtype=torch.bool)
        if not 0 < self.shortlist < len(self.experts):
            return wanted
        for start in range(0, len(pieces), self.rows):
            batch = list(pieces[start : start + self.rows])
            ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True).to(self.crouter.device)
            lengths = torch.tensor([len(piece) for piece in batch])
            latents = self.crouter.encode(ids, (torch.arange(ids.shape[1]) < lengths[:, None]).to(ids.device))
            far = torch.stack([e.centroid.distance(latents) for e in self.experts if e.centroid is not None], dim=1)
            nearest = far.topk(self.shortlist, dim=1, largest=False).indices
            wanted[start : start + len(batch)] = False
            wanted[start : start + len(batch)].scatter_(1, nearest, True)
        return wanted

    def scores(self, nats: torch.Tensor, tokens: int) -> torch.Tensor:
        """Residuals as each expert's calibration sees them, of the same shape.

        Args:
            nats: `[n]` or `[n, T]`, nats/token.
            tokens: length of the text that was rebuilt.
        """
        return torch.stack(
            [
                calibrated_score(row, tokens, expert.calibration, self.score)
                for row, expert in zip(nats, self.experts, strict=True)
            ]
        )

    def decide(self, nats: torch.Tensor, tokens: int, previous: int | None = None) -> Route:
        """The route of a chunk, from its residuals alone.

        Known is what at least one expert rebuilds as it does its own domain; of these the best score wins, unless the
        previous expert is one of them and not undercut by more than `stay`.

        Args:
            nats: `[n]`, nats/token; nan for an expert that was not scored.
            tokens: the chunk's length.
            previous: number of the expert that served before; -1: the base model; None: nothing came before.
        """
        nats = nats.detach().double().cpu()
        scored = {name: float(value) for name, value in zip(self.names, nats, strict=True) if not value.isnan()}
        scores = self.scores(nats, tokens).nan_to_num(nan=math.inf)
        if tokens < self.fewest:
            return self._route(BASE if previous is None else previous, "short", scored, _lead(scores))
        limits = torch.tensor([e.calibration.residual(tokens, self.known) for e in self.experts]).double()
        own = nats <= limits  # false for nan
        if not own.any():
            return self._route(BASE, "unknown", scored, _lead(scores))
        best = int(torch.where(own, scores, math.inf).argmin())
        margin = _lead(scores, best)
        calibration = self.experts.experts[best].calibration
        least = calibration.margin(tokens, self.clear) if calibration.score == self.score else -math.inf
        if previous is not None and previous != BASE and own[previous]:
            best = previous if scores[previous] - scores[best] <= self.stay else best
        return self._route(best, "overlap" if margin < least else "known", scored, margin)

    def __call__(self, pieces: Sequence[torch.Tensor], previous: int | None = None) -> list[Route]:
        """Routes of consecutive chunks of one row.

        Args:
            pieces: crouter token ids, 1-D, 1 to `chunk_length` each; those too short to judge are not rebuilt.
            previous: number of the expert before the first; -1: the base model; None: nothing came before.
        """
        nats = torch.full((len(pieces), len(self.experts)), math.nan)
        judged = [i for i, piece in enumerate(pieces) if len(piece) >= self.fewest]
        if judged:
            nats[judged] = self.residuals([pieces[i] for i in judged])
        routes = []
        for row, piece in zip(nats, pieces, strict=True):
            routes.append(self.decide(row, len(piece), previous))
            previous = routes[-1].number
        return routes

    def margins(self, nats: torch.Tensor, tokens: int, number: int) -> torch.Tensor:
        """How much worse than one expert the best other one does, `[N]`; below 0: another does better.

        Args:
            nats: `[N, n]`, of texts of its own domain; nan for an expert that was not scored.
            tokens: their length.
            number: the expert's.
        """
        return torch.tensor([_lead(self.scores(row, tokens).nan_to_num(nan=math.inf), number) for row in nats])

    def remove(self) -> None:
        """Takes the adapters off the crouter; from then on only `decide` works."""
        for stack in self._stacks:
            stack.remove()
        self._stacks = []

    def _stack(self, number: int) -> AdapterStack:
        if not self._stacks:
            raise InputError("router: expected its adapters on the crouter, got a router after `remove`")
        return self._stacks[number]

    def _route(self, number: int, verdict: str, nats: dict[str, float], margin: float) -> Route:
        return Route(self.names[number] if number != BASE else None, number, verdict, nats, margin)


def _lead(scores: torch.Tensor, number: int | None = None) -> float:
    """Least score of the others minus that of one expert, the best by default; infinite where there is no other."""
    number = int(scores.argmin()) if number is None else number
    others = [float(score) for i, score in enumerate(scores) if i != number and score < math.inf]
    return min(others) - float(scores[number]) if others else math.inf
