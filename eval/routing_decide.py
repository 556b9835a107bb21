"""What a router decides from measured nats: routes, borders, and how late it follows a change. Needs no accelerator.

Axes: `W` test windows of two chunks, `N` chunks or spans, `n` experts, `T` tokens, `P` pieces with a border.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from eval.routing_nats import Arrays, Setting
from hf_crouter.routing.experts import ExpertSet
from hf_crouter.routing.router import SCORES, Router
from hf_crouter.routing.spans import Span, find_spans

STAYS = (0.0, 0.05, 0.1, 0.2, 0.4)
SWITCHES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)  # nats that a border costs, tried on calibration documents
SMOOTHS = (1, 8, 16, 32)


def routers(crouter: Any, experts: ExpertSet, fewest: int) -> dict[str, Router]:
    """A router for each score."""
    return {score: Router(crouter, experts, score=score, fewest=fewest) for score in SCORES}


def excess(experts: ExpertSet, nats: np.ndarray, tokens: int, known: float) -> np.ndarray:
    """How far each residual lies above what its expert calls its own, `[N, n]`, nats/token."""
    return nats - np.array([expert.calibration.residual(tokens, known) for expert in experts])


def decide_residuals(crouter: Any, experts: ExpertSet, nats: Arrays, setting: Setting) -> Arrays:
    """Residuals, scores and decisions of chunks, of spans alone and of spans within their chunks.

    Args:
        crouter: the shared one, on any device.
        experts: the set.
        nats: of `measure_nats`.
        setting: the texts.
    """
    fewest, count = min(64, setting.span), len(experts)
    deciding = routers(crouter, experts, fewest)
    chunk = nats["chunk"].astype(np.float64)
    within = chunk.reshape(*chunk.shape[:2], 4, setting.span).mean(-1).swapaxes(1, 2).reshape(-1, count + 1)
    evidence = {
        "chunk": (chunk.mean(-1), setting.chunk),
        "span": (nats["span"].astype(np.float64), setting.span),
        "within": (within, setting.chunk),
    }
    found: Arrays = {}
    for name, (every, tokens) in evidence.items():
        some = every[:, :-1]
        found[f"{name}.nats"] = every.astype(np.float32)
        for score, router in deciding.items():
            found[f"{name}.{score}"] = router.scores(torch.from_numpy(some.T), tokens).numpy().T.astype("f4")
            if name != "within":
                routes = [router.decide(torch.from_numpy(row), tokens).number for row in some]
                found[f"{name}.{score}.route"] = np.array(routes, np.int64)
        found[f"{name}.excess"] = excess(experts, some, tokens, deciding[SCORES[0]].known).astype(np.float32)
    for mounted in range(1, count + 1):  # experts mounted one after another
        some = Router(crouter, ExpertSet(experts.experts[:mounted]), fewest=fewest)
        rows = torch.from_numpy(evidence["chunk"][0][:, :mounted])
        found[f"mounted.{mounted}.route"] = np.array(
            [some.decide(row, setting.chunk).number for row in rows], np.int64
        )
        some.remove()
    for router in deciding.values():
        router.remove()
    for kind in ("chunk", "span"):
        own = nats[f"own.{kind}"].astype(np.float32)
        found[f"{kind}.own"] = own.mean(-1) if own.ndim == 3 else own
        found[f"{kind}.own.domain"] = nats[f"own.{kind}.domain"]
    parts = [[expert.compressor.nbytes // 2, expert.host.nbytes // 2] for expert in experts]  # as saved, bfloat16
    return found | {
        "expert.bytes": np.array(parts, np.int64),
        "mounted.bit_difference": nats["mounted.bit_difference"],
    }


def nearest_border(spans: Sequence[Span], border: int, length: int) -> int:
    """Tokens from a true border to the nearest found one; the piece's length where none was found."""
    return min((abs(span.start - border) for span in spans[1:]), default=length)


def tuned(costs: np.ndarray, borders: Sequence[np.ndarray] | np.ndarray) -> tuple[float, int]:
    """The switch and smoothing with the least mean error on calibration pieces; costs `[P, n, T]`, borders of each.

    The mean, with missed and superfluous borders: the median alone would take many borders for free.
    """
    length, best = costs.shape[-1], (np.inf, SWITCHES[0], SMOOTHS[0])
    for smooth in SMOOTHS:
        for switch in SWITCHES:
            errors = []
            for row, true in zip(costs, borders, strict=True):
                spans = find_spans(torch.from_numpy(row), switch=switch, smooth=min(smooth, length // 8 or 1))
                mean = np.mean([nearest_border(spans, int(border), length) for border in true])
                errors.append(mean + length // 8 * max(0, len(spans) - 1 - len(true)))
            if np.mean(errors) < best[0]:
                best = (float(np.mean(errors)), switch, smooth)
    return best[1], best[2]


def measure_borders(setting: Setting, costs: Mapping[str, np.ndarray]) -> Arrays:
    """Errors of borders in spliced and in real mixed pieces.

    Args:
        setting: the texts.
        costs: `[P, n, T]`, what each token of the pieces of `Setting.bordered` costs under each expert.
    """
    switch, smooth = tuned(costs["fit"], setting.fit().borders[:, None])
    smooth = min(smooth, setting.chunk // 8 or 1)
    known, test = setting.known, setting.spliced()
    errors, counts, right = [], [], []
    for row, border, first, second in zip(costs["spliced"], test.borders, test.first, test.second, strict=True):
        spans = find_spans(torch.from_numpy(row), switch=switch, smooth=smooth)
        errors.append(nearest_border(spans, int(border), setting.chunk))
        counts.append(len(spans) - 1)
        names = [setting.windows.records[known[i]].domain for i in (first, second)]
        numbers = [setting.domains.index(name) for name in names]
        labels = np.repeat([span.number for span in spans], [len(span) for span in spans])
        truth = np.where(np.arange(setting.chunk) < border, numbers[0], numbers[1])
        right.append(float((labels == truth).mean()))
    found = {
        "switch": np.array([switch]), "smooth": np.array([smooth]), "spliced.error": np.array(errors),
        "spliced.found": np.array(counts), "spliced.tokens": np.array(right),
        "spliced.first": known[test.first], "spliced.second": known[test.second],
    }  # fmt: skip
    both = {"mixed": (switch, smooth)}
    fitting = setting.mixed_fit
    if fitting is not None:
        true = [fitting.borders(piece) for piece in range(len(fitting.ids))]
        own, least = tuned(costs["mixed_fit"], true)
        both["mixed_own"] = (own, min(least, setting.chunk // 8 or 1))
    for name, (switch, smooth) in both.items():
        errors, pieces, counts = [], [], []
        for piece, row in enumerate(costs["mixed"]):
            spans = find_spans(torch.from_numpy(row), switch=switch, smooth=smooth)
            true = setting.mixed.borders(piece)
            errors += [nearest_border(spans, int(border), setting.chunk) for border in true]
            pieces += [piece] * len(true)
            counts.append((len(spans) - 1, len(true)))
        found |= {f"{name}.error": np.array(errors), f"{name}.piece": np.array(pieces)}
        found |= {f"{name}.found": np.array(counts), f"{name}.setting": np.array([switch, smooth], np.float64)}
    return found


def decide_borders(crouter: Any, experts: ExpertSet, nats: Arrays, setting: Setting) -> Arrays:
    """Borders as the router's default score sees them."""
    router = Router(crouter, experts)
    costs = {
        name: np.stack(
            [router.scores(torch.from_numpy(row[:-1]).double(), setting.chunk).numpy() for row in nats[name]]
        )
        for name in setting.bordered()
    }
    router.remove()
    return measure_borders(setting, costs)


def decide_changing(crouter: Any, experts: ExpertSet, nats: Arrays, setting: Setting) -> Arrays:
    """Routes of consecutive chunks of documents that change once, for each `stay`."""
    known, documents = setting.known, setting.changing()
    every = nats["changing"][:, :-1].reshape(len(documents.ids), -1, len(experts))
    found: Arrays = {"border": documents.borders, "nats": every.astype(np.float32)}
    found |= {"first": known[documents.first], "second": known[documents.second]}
    for stay in STAYS:
        router = Router(crouter, experts, stay=stay, fewest=min(64, setting.span))
        routes = np.zeros(every.shape[:2], np.int64)
        for number, document in enumerate(every):
            previous = None
            for i, chunk in enumerate(document):
                previous = routes[number, i] = router.decide(torch.from_numpy(chunk), setting.chunk, previous).number
        found[f"route.{stay:g}"] = routes
        router.remove()
    return found
