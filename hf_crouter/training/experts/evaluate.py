"""How texts of known domains are routed, and what the host's loss on them is under the adapters so chosen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ...data.tokens import TokenArray
from ...errors import InputError
from ...routing.adapters import AdapterStack
from ...routing.router import Router
from ...types import BASE
from .domain import cut, host_tokens
from .measure import host_nll
from .models import ExpertModels


@dataclass(frozen=True, eq=False)
class RoutedDomain:
    """How the texts of one domain were routed.

    Attributes:
        pieces: texts, each of at most a chunk.
        routes: how many of them went to which expert, by name; "" is the base model.
        accuracy: share that went where it should: to the expert of the domain's name, else to the base model.
        loss: the host's nats/token on them, `base`, `routed`, where there is an expert of the name `own`, and
            `oracle`, each text under what suits it best; empty without a host.
    """

    pieces: int
    routes: dict[str, int]
    accuracy: float
    loss: dict[str, float]


def route_domains(
    models: ExpertModels | None,
    router: Router,
    domains: Mapping[str, TokenArray],
    *,
    limit: int = 64,
    advance: Callable[[int, int], None] | None = None,
) -> dict[str, RoutedDomain]:
    """Routes texts of known origin, each on its own, and reads them with the host under the adapter that was chosen.

    Args:
        models: their host reads; None: nothing is read.
        router: over the experts.
        domains: documents in the crouter's tokens, by the name of their expert or any other name.
        limit: texts of each domain, evenly spread over its documents.
        advance: called with texts done and their number.

    Raises:
        InputError: documents that are all too short to judge.
    """
    length, found = router.crouter.config.chunk_length, {}
    for number, (name, tokens) in enumerate(domains.items()):
        pieces, _ = cut(tokens, length, limit, router.fewest)
        if not pieces:
            raise InputError(f"{name}: expected documents of at least {router.fewest} tokens, got none")
        routes = []
        for start in range(0, len(pieces), router.rows):
            block = pieces[start : start + router.rows]
            found_here = router.reconstruction_nlls(block)  # each text on its own: nothing came before it
            routes += [router.decide(row, len(piece)) for row, piece in zip(found_here, block, strict=True)]
            if advance is not None:
                advance(number * limit + min(limit, len(routes)), len(domains) * limit)
        expected = name if name in router.names else None
        chosen = [route.number for route in routes]
        losses: dict[str, float] = {}
        if models is not None:
            losses = _losses(models, router, tokens, pieces, {
                "base": [BASE] * len(pieces), "routed": chosen,
                **({"own": [router.names.index(expected)] * len(pieces)} if expected else {}),
            })  # fmt: skip
        counts = Counter(route.expert or "" for route in routes)
        right = sum(route.expert == expected for route in routes) / len(routes)
        found[name] = RoutedDomain(len(pieces), dict(counts), right, losses)
    return found


def _losses(
    models: ExpertModels,
    router: Router,
    tokens: TokenArray,
    pieces: Sequence[torch.Tensor],
    choices: Mapping[str, Sequence[int]],
) -> dict[str, float]:
    """Nats/token of a host on crouter pieces under each choice of adapters, and under the best one, `oracle`."""
    ends = np.cumsum([0, *(len(piece) + 1 for piece in pieces)])
    ids = np.concatenate([np.append(piece.numpy(), tokens.separator_id) for piece in pieces])
    names = tuple(str(i) for i in range(len(pieces)))
    array = TokenArray(ids.astype(tokens.ids.dtype), ends, names, names, tokens.separator_id, tokens.vocab_size)
    texts = [torch.from_numpy(text.astype(np.int64)) for _, _, text in host_tokens(array, models).documents()]
    stack = AdapterStack(models.host, {expert.name: expert.host for expert in router.experts})
    try:
        under = {}
        for number in (BASE, *range(len(router.experts))):
            under[number], counts = host_nll(models.host, texts, stack, [number] * len(texts))
        total = counts.sum()  # pyright: ignore[reportPossiblyUnboundVariable]
        found = {
            name: float(sum(under[number][i] for i, number in enumerate(numbers)) / total)
            for name, numbers in choices.items()
        }
        return {**found, "oracle": float(torch.stack(list(under.values())).amin(0).sum() / total)}
    finally:
        stack.remove()
