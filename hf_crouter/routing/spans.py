"""Where the domain changes inside a text: the cheapest way to explain each token by one expert.

Axes: `n` experts, `T` tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..errors import InputError
from ..types import Route
from .router import Router


@dataclass(frozen=True)
class Span:
    """A stretch of one domain.

    Attributes:
        start: first token.
        end: one past the last.
        number: the expert's.
    """

    start: int
    end: int
    number: int

    def __len__(self) -> int:
        """Tokens."""
        return self.end - self.start


def find_spans(token_reconstruction_nll: torch.Tensor, *, switch: float, smooth: int = 1) -> list[Span]:
    """The exact minimum of all tokens' NLL plus `switch` for each change of expert; of equals, the fewest changes.

    Args:
        token_reconstruction_nll: `[n, T]`, what each token costs under each expert; nan for an expert that is out of
            the question.
        switch: nats that a change costs, 0 or more: how much evidence a border needs.
        smooth: no span is shorter than so many tokens; a text that is shorter is one span.

    Returns:
        Spans that cover the text once, in order; none for an empty text.

    Raises:
        InputError: a negative `switch`, a `smooth` below 1, or no expert.

    Source: dynamic programming after Viterbi, 1967; here with a fewest length.
    """
    costs = token_reconstruction_nll.detach().double().cpu().numpy()
    if costs.ndim != 2 or not len(costs) or not switch >= 0 or smooth < 1:
        raise InputError(
            f"spans: expected costs [n, T], switch >= 0 and smooth >= 1, got {list(costs.shape)}, {switch}, {smooth}"
        )
    tokens = costs.shape[1]
    if not tokens:
        return []
    least = min(smooth, tokens)
    numbers = np.flatnonzero(np.isfinite(costs).all(1))
    n = len(numbers)
    if not n:
        raise InputError("spans: expected finite costs under at least one expert, got none")
    sums = np.concatenate([np.zeros((n, 1)), costs[numbers].cumsum(1)], axis=1)
    best = np.full((tokens + 1, n), np.inf)  # cheapest explanation of the first t tokens that ends with expert i
    source = np.full((tokens + 1, n), -1)  # its expert before the change `least` tokens ago; -1: no change there
    best[least] = sums[:, least]
    for t in range(least + 1, tokens + 1):
        best[t] = best[t - 1] + sums[:, t] - sums[:, t - 1]
        if t < 2 * least or n < 2:
            continue
        before = best[t - least]
        first, second = np.argpartition(before, 1)[:2]
        other = np.where(np.arange(n) == first, second, first)
        change = before[other] + switch + sums[:, t] - sums[:, t - least]
        cheaper = change < best[t] - 1e-9  # a sum's rounding is no reason to change
        best[t], source[t] = np.where(cheaper, change, best[t]), np.where(cheaper, other, -1)
    spans, end, number = [], tokens, int(best[tokens].argmin())
    t = tokens
    while t > 0:
        if source[t, number] < 0:
            t -= 1
            continue
        start = t - least
        spans.append(Span(start, end, int(numbers[number])))
        number, end, t = int(source[t, number]), start, start
    return [*reversed([*spans, Span(0, end, int(numbers[number]))])]


def split_document(router: Router, ids: torch.Tensor | Sequence[int], *, switch: float, smooth: int = 1) -> list[Span]:
    """Spans of a whole document, found at once over all its chunks: a chunk's border is no border of a span.

    Args:
        router: scores each token under every expert.
        ids: the document's crouter token ids.
        switch: see `find_spans`.
        smooth: see `find_spans`.
    """
    ids = torch.as_tensor(ids, dtype=torch.long)
    pieces = ids.split(router.crouter.config.chunk_length)
    costs = [router.token_reconstruction_nll(piece) for piece in pieces if len(piece)]
    return find_spans(torch.cat(costs, dim=1), switch=switch, smooth=smooth) if costs else []


def route_spans(router: Router, ids: torch.Tensor | Sequence[int], spans: Sequence[Span]) -> list[Route]:
    """Each span judged on its own: rebuilt apart from its neighbours, against texts of its length.

    One that is too short to judge keeps its expert, with the status `short`.

    Args:
        router: decides.
        ids: the document's crouter token ids.
        spans: one longer than a chunk is judged by the mean over its chunks (with `top_k_experts`: of those experts
            that are among the top k of all of them).
    """
    ids, length = torch.as_tensor(ids, dtype=torch.long), router.crouter.config.chunk_length
    routes = []
    for span in spans:
        pieces = ids[span.start : span.end].split(length)
        if len(span) < router.fewest:
            routes += router(pieces, span.number)
            continue
        shares = torch.tensor([len(piece) / len(span) for piece in pieces])
        reconstruction_nlls = (router.reconstruction_nlls(pieces) * shares[:, None, None]).sum(0)
        routes.append(router.decide(reconstruction_nlls, min(len(span), length), span.number))
    return routes
