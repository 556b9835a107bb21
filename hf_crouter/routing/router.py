"""Which expert serves a chunk: of those whose own texts look like it, the one with the least log reconstruction NLL.

The mean of the logarithms, since each token then counts by how many times better one expert rebuilds it than another;
in the mean itself a few tokens that are hard for all drown the rest.

Axes: `N` chunks, `n` experts, `T` tokens of a chunk; the last of `n + 1` is the crouter without any adapter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..crouter import CRouterModel
from ..errors import InputError
from ..types import BASE, Route
from ..utils.batching import check_ids, padded
from .adapters import AdapterStack
from .experts import ExpertSet
from .profile import LOG_NLL, NLL, summary


@torch.no_grad()
def token_reconstruction_nll(
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
        batch = pieces[start : start + rows]
        ids, mask = (part.to(crouter.device) for part in padded(batch))
        if stack is None:
            measured = crouter(ids, mask).token_reconstruction_nll
        else:
            with stack.using([0] * len(batch)):
                measured = crouter(ids, mask).token_reconstruction_nll
        found += [row[: len(piece)] for row, piece in zip(measured.float().cpu(), batch, strict=True)]
    return found


class Router:
    """Rebuilds chunks under every expert and decides.

    Every expert is its own stack and its own passes: what is computed for one cannot depend, not in one bit, on how
    many others are in the set. Outside its methods the crouter is bit for bit what it was.

    Args:
        crouter: the shared one; that it is the experts' own is for `ExpertSet.check` to say.
        experts: at least one.
        top_k_experts: only so many experts are scored a chunk, those whose texts lie nearest to its latents without
            any adapter: one pass of the encoder in place of a whole pass for each expert left out. 0: all are.
        fewest: chunks of fewer tokens are not judged.
        in_domain_quantile: quantile of an expert's own texts, by their distance from its profile, beyond which a chunk
            is none of its own. Without a profile, or where experts were left out: by their reconstruction NLL.
        overlap_quantile: quantile of an expert's own margins below which a second expert is called an overlap; none is
            where the expert's own texts are as often rebuilt better by another.
        rows: chunks at once.

    Raises:
        InputError: no expert, or `top_k_experts` of a set where one has no centroid.
        MismatchError: an adapter that does not fit the crouter.
    """

    def __init__(
        self,
        crouter: CRouterModel,
        experts: ExpertSet,
        *,
        top_k_experts: int = 0,
        fewest: int = 64,
        in_domain_quantile: float = 0.99,
        overlap_quantile: float = 0.01,
        rows: int = 4,
    ):
        if not len(experts):
            raise InputError("router: expected at least one expert, got an empty set")
        without = [expert.name for expert in experts if expert.centroid is None]
        if top_k_experts and without:
            raise InputError(f"router: top_k_experts expected a centroid of every expert, got none of {without[0]}")
        self.crouter, self.experts = crouter, experts
        self.top_k_experts = top_k_experts if top_k_experts < len(experts) else 0
        self.fewest, self.rows = fewest, rows
        self.in_domain_quantile, self.overlap_quantile = in_domain_quantile, overlap_quantile
        self._stacks = []
        try:
            for expert in experts:
                self._stacks.append(AdapterStack(crouter, {expert.name: expert.compressor}))
        except BaseException:
            self.remove()
            raise

    @property
    def names(self) -> tuple[str, ...]:
        """The experts' names; their numbers are their positions."""
        return self.experts.names

    @property
    def profiled(self) -> bool:
        """Whether some expert has a profile, so that the crouter alone is asked too."""
        return any(expert.profile is not None for expert in self.experts)

    def reconstruction_nlls(self, pieces: Sequence[torch.Tensor]) -> torch.Tensor:
        """How well each expert rebuilds each chunk, and last the crouter alone, `[N, n + 1, 2]`: `profile.summary`.

        nan for an expert that is not among the top k of a chunk; for the crouter alone where some are not, or without
        profiles.

        Args:
            pieces: crouter token ids, 1-D, 1 to `chunk_length` each.

        Raises:
            InputError: a chunk that is empty or too long, or the router's adapters were removed.
            MismatchError: ids that the crouter does not know.
        """
        check_ids(pieces, self.crouter.config.vocab_size)
        wanted = self.among_top_k(pieces)
        alone = torch.full((len(pieces), 1), self.profiled and bool(wanted.all()))
        wanted = torch.cat([wanted, alone], dim=1)
        found = torch.full((*wanted.shape, 2), math.nan)
        for number in range(wanted.shape[1]):
            stack = self._stack(number) if number < len(self.experts) else None
            chosen = [i for i in range(len(pieces)) if wanted[i, number]]
            measured = token_reconstruction_nll(self.crouter, [pieces[i] for i in chosen], stack, rows=self.rows)
            for i, row in zip(chosen, measured, strict=True):
                found[i, number] = summary(row)
        return found

    def token_reconstruction_nll(self, piece: torch.Tensor, numbers: Sequence[int] | None = None) -> torch.Tensor:
        """What rebuilding each token of a chunk costs under each expert, `[n, T]`, nats.

        Args:
            piece: crouter token ids, `[T]`.
            numbers: only these experts, nan for the others; all by default, whatever `top_k_experts` says.
        """
        found = torch.full((len(self.experts), len(piece)), math.nan)
        for number in range(len(self.experts)) if numbers is None else numbers:
            found[number] = token_reconstruction_nll(self.crouter, [piece], self._stack(number))[0]
        return found

    @torch.no_grad()
    def among_top_k(self, pieces: Sequence[torch.Tensor]) -> torch.Tensor:
        """Which experts are scored for which chunk, `[N, n]`, bool."""
        wanted = torch.ones(len(pieces), len(self.experts), dtype=torch.bool)
        if not self.top_k_experts:
            return wanted
        for start in range(0, len(pieces), self.rows):
            batch = pieces[start : start + self.rows]
            latents = self.crouter.encode(*(part.to(self.crouter.device) for part in padded(batch)))
            far = torch.stack([e.centroid.distance(latents) for e in self.experts if e.centroid is not None], dim=1)
            nearest = far.topk(self.top_k_experts, dim=1, largest=False).indices
            wanted[start : start + len(batch)] = False
            wanted[start : start + len(batch)].scatter_(1, nearest, True)
        return wanted

    def distances(self, reconstruction_nlls: torch.Tensor, tokens: int) -> torch.Tensor:
        """How far a chunk lies from each expert's own texts, `[n]`, float64; up to 1 lie nine of ten of these.

        nan for an expert without a profile, and for all where something was not measured.

        Args:
            reconstruction_nlls: `[n + 1, 2]`; nan for an expert that was not scored.
            tokens: the chunk's length.
        """
        if reconstruction_nlls.isnan().any():
            return torch.full((len(self.experts),), math.nan, dtype=torch.float64)
        log_reconstruction_nll = reconstruction_nlls[:, LOG_NLL].double().cpu().numpy()
        found = [
            math.nan if e.profile is None else e.profile.distance(log_reconstruction_nll, tokens) for e in self.experts
        ]
        return torch.tensor(found, dtype=torch.float64)

    def in_domain(self, reconstruction_nlls: torch.Tensor, tokens: int) -> torch.Tensor:
        """Which experts a chunk looks like the texts of, `[n]`, bool; without a distance, by its NLL under each.

        Args:
            reconstruction_nlls: `[n + 1, 2]`; nan for an expert that was not scored.
            tokens: the chunk's length.
        """
        found, quantile = [], self.in_domain_quantile
        values, distances = reconstruction_nlls[:-1, NLL], self.distances(reconstruction_nlls, tokens)
        for expert, value, distance in zip(self.experts, values.tolist(), distances.tolist(), strict=True):
            if expert.profile is None or math.isnan(distance):
                found.append(value <= expert.calibration.reconstruction_nll(tokens, quantile))  # false for nan
            else:
                found.append(distance <= expert.profile.limit(tokens, quantile))
        return torch.tensor(found)

    def decide(self, reconstruction_nlls: torch.Tensor, tokens: int, previous: int | None = None) -> Route:
        """The route of a chunk, from its reconstruction NLLs alone.

        Of the experts whose own texts look like it the one with the least log reconstruction NLL serves; a chunk
        too short to judge goes where the one before it went.

        Args:
            reconstruction_nlls: `[n + 1, 2]`; nan for an expert that was not scored.
            tokens: the chunk's length.
            previous: number of the expert that served before; -1: the base model; None: nothing came before.
        """
        reconstruction_nlls = reconstruction_nlls.detach().double().cpu()
        values, log_reconstruction_nll = reconstruction_nlls[:-1].unbind(-1)
        scored = {name: float(value) for name, value in zip(self.names, values, strict=True) if not value.isnan()}
        log_reconstruction_nll = log_reconstruction_nll.nan_to_num(nan=math.inf)
        if tokens < self.fewest:
            return self._route(BASE if previous is None else previous, "short", scored, _lead(log_reconstruction_nll))
        in_domain = self.in_domain(reconstruction_nlls, tokens)
        if not in_domain.any():
            return self._route(BASE, "unknown", scored, _lead(log_reconstruction_nll))
        best = int(torch.where(in_domain, log_reconstruction_nll, math.inf).argmin())
        margin, profile = _lead(log_reconstruction_nll, best), self.experts.experts[best].profile
        least = profile.margin(tokens, self.overlap_quantile) if profile is not None else -math.inf
        return self._route(best, "overlap" if margin < least else "known", scored, margin)

    def __call__(self, pieces: Sequence[torch.Tensor], previous: int | None = None) -> list[Route]:
        """Routes of consecutive chunks of one row.

        Args:
            pieces: crouter token ids, 1-D, 1 to `chunk_length` each; those too short to judge are not rebuilt.
            previous: number of the expert before the first; -1: the base model; None: nothing came before.
        """
        found = torch.full((len(pieces), len(self.experts) + 1, 2), math.nan)
        judged = [i for i, piece in enumerate(pieces) if len(piece) >= self.fewest]
        if judged:
            found[judged] = self.reconstruction_nlls([pieces[i] for i in judged])
        routes = []
        for row, piece in zip(found, pieces, strict=True):
            routes.append(self.decide(row, len(piece), previous))
            previous = routes[-1].number
        return routes

    def remove(self) -> None:
        """Takes the adapters off the crouter; from then on only `decide` works."""
        for stack in self._stacks:
            stack.remove()
        self._stacks = []

    def _stack(self, number: int) -> AdapterStack:
        if not self._stacks:
            raise InputError("router: expected its adapters on the crouter, got a router after `remove`")
        return self._stacks[number]

    def _route(self, number: int, status: str, reconstruction_nll: dict[str, float], margin: float) -> Route:
        return Route(self.names[number] if number != BASE else None, number, status, reconstruction_nll, margin)


def _lead(log_reconstruction_nll: torch.Tensor, number: int | None = None) -> float:
    """Least log NLL of the others minus an expert's, the best by default; infinite where there is no other."""
    number = int(log_reconstruction_nll.argmin()) if number is None else number
    others = [float(value) for i, value in enumerate(log_reconstruction_nll) if i != number and value < math.inf]
    return min(others) - float(log_reconstruction_nll[number]) if others else math.inf
