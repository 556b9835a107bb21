"""What a router decides from measured nats: routes, borders, and how late it follows a change. Needs no accelerator.

Axes: `W` test windows of two chunks, `N` chunks or spans, `n` experts, `T` tokens, `P` pieces with a border.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from eval.routing_nats import Arrays, Setting, evidence_of
from hf_crouter.routing.experts import ExpertSet
from hf_crouter.routing.profile import LOGS, NATS, summary
from hf_crouter.routing.router import Router
from hf_crouter.routing.spans import Span, find_spans

STAYS = (0.0, 0.05, 0.1, 0.2, 0.4)
SWITCHES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)  # nats that a border costs, tried on calibration documents
SMOOTHS = (1, 8, 16, 32)
SHORTLISTS = (2, 3)


def decide_residuals(crouter: Any, experts: ExpertSet, nats: Arrays, setting: Setting) -> Arrays:
    """Residuals and decisions of chunks, of spans alone and of spans within their chunks.

    Args:
        crouter: the shared one, on any device.
        experts: the set, with or without profiles.
        nats: of `measure_nats`.
        setting: the texts.

    Returns:
        For `chunk`, `span` and `within`: `.nats`, `.logs` `[N, n + 1]`; `.calibrated` `[N, n]`, less each expert's
        median; `.excess`, less its 99% quantile; `.distance` `[N, n]`, where there are profiles. `.route` `[N]` of the
        first two, and `mounted.COUNT.route` of chunks.
    """
    fewest, count, evidence = min(64, setting.span), len(experts), evidence_of(nats, experts)
    router = Router(crouter, experts.mounted(count, evidence), fewest=fewest)
    tokens = torch.from_numpy(nats["chunk"].astype(np.float32))
    parts = tokens.unflatten(-1, (4, setting.span)).swapaxes(1, 2).flatten(0, 1)
    pieces = {
        "chunk": (summary(tokens), setting.chunk),
        "span": (torch.from_numpy(nats["span"]), setting.span),
        "within": (summary(parts), setting.chunk),
    }
    found: Arrays = {}
    for name, (rows, length) in pieces.items():
        found |= {f"{name}.nats": rows[..., NATS].numpy(), f"{name}.logs": rows[..., LOGS].numpy()}
        some = rows[:, :-1, NATS].numpy()
        for key, level in (("calibrated", 0.5), ("excess", router.known)):
            found[f"{name}.{key}"] = some - np.float32(
                [e.calibration.reconstruction_nll(length, level) for e in experts]
            )
        if not rows.isnan().any() and all(expert.profile for expert in router.experts):
            found[f"{name}.distance"] = torch.stack([router.distances(row, length) for row in rows]).float().numpy()
        if name != "within":
            found[f"{name}.route"] = np.array([router.decide(row, length).number for row in rows], np.int64)
    router.remove()
    for mounted in range(1, count + 1):  # experts mounted one after another
        some = Router(crouter, experts.mounted(mounted, evidence), fewest=fewest)
        columns = [*range(mounted), count]
        routes = [some.decide(row[columns], setting.chunk).number for row in pieces["chunk"][0]]
        found[f"mounted.{mounted}.route"] = np.array(routes, np.int64)
        some.remove()
    for kind in ("chunk", "span"):
        own = torch.from_numpy(nats[f"own.{kind}"].astype(np.float32))
        found[f"{kind}.own"] = (own.mean(-1) if kind == "chunk" else own[..., NATS]).numpy()
        found[f"{kind}.own.domain"] = nats[f"own.{kind}.domain"]
    sizes = [[expert.compressor.nbytes // 2, expert.host.nbytes // 2] for expert in experts]  # as saved, bfloat16
    return found | {
        "expert.bytes": np.array(sizes, np.int64),
        "mounted.bit_difference": nats["mounted.bit_difference"],
    }


def decide_shortlist(crouter: Any, experts: ExpertSet, nats: Arrays, distance: np.ndarray, setting: Setting) -> Arrays:
    """Decisions on chunks where only the experts nearest by their centroids were asked.

    Args:
        crouter: the shared one.
        experts: the set.
        nats: of `measure_nats`.
        distance: of `measure_shortlist`, `[N, n]`.
        setting: the texts.

    Returns:
        For each size: `SIZE.route` `[N]`, and `SIZE.choice`, the least log residual of those asked.
    """
    rows, found = summary(torch.from_numpy(nats["chunk"].astype(np.float32))), {}
    experts = experts.mounted(len(experts), evidence_of(nats, experts))
    router = Router(crouter, experts, fewest=min(64, setting.span))
    for size in SHORTLISTS:
        far = torch.from_numpy(distance.argsort(1).argsort(1) >= size)
        asked = rows.clone()
        asked[torch.cat([far, torch.ones(len(far), 1, dtype=torch.bool)], dim=1)] = torch.nan
        found[f"{size}.route"] = np.array([router.decide(row, setting.chunk).number for row in asked], np.int64)
        found[f"{size}.choice"] = asked[:, :-1, LOGS].nan_to_num(nan=torch.inf).argmin(1).numpy()
    router.remove()
    return found


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
    """Borders as the experts' token residuals show them."""
    del crouter, experts
    return measure_borders(setting, {name: nats[name][:, :-1].astype(np.float64) for name in setting.bordered()})


def decide_changing(crouter: Any, experts: ExpertSet, nats: Arrays, setting: Setting) -> Arrays:
    """Routes of consecutive chunks of documents that change once, for each `stay`."""
    known, documents = setting.known, setting.changing()
    every = torch.from_numpy(nats["changing"]).unflatten(0, (len(documents.ids), -1))
    found: Arrays = {"border": documents.borders, "nats": every[:, :, :-1, NATS].numpy()}
    experts = experts.mounted(len(experts), evidence_of(nats, experts))
    found |= {"first": known[documents.first], "second": known[documents.second]}
    for stay in STAYS:
        router = Router(crouter, experts, stay=stay, fewest=min(64, setting.span))
        routes = np.zeros(tuple(every.shape[:2]), np.int64)
        for number, document in enumerate(every):
            previous = None
            for i, chunk in enumerate(document):
                previous = routes[number, i] = router.decide(chunk, setting.chunk, previous).number
        found[f"route.{stay:g}"] = routes
        router.remove()
    return found
