"""What a router decides from measured reconstruction NLL: routes, borders, and how late it follows a change.

Needs no accelerator.

Axes: `W` test windows of two chunks, `N` chunks or spans, `n` experts, `T` tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from eval.routing.borders import measure_borders
from eval.routing.reconstruction import evidence_of
from eval.routing.setting import Arrays, Setting
from hf_crouter.routing.experts import ExpertSet
from hf_crouter.routing.profile import LOG_NLL, NLL, summary
from hf_crouter.routing.router import Router

SHORTLISTS = (2, 3)


def decide_routes(crouter: Any, experts: ExpertSet, measured: Arrays, setting: Setting) -> Arrays:
    """Reconstruction NLL and routes of chunks, of spans alone and of spans within their chunks.

    Args:
        crouter: the shared one, on any device.
        experts: the set, with or without profiles.
        measured: of `measure_reconstruction`.
        setting: the texts.

    Returns:
        For `chunk`, `span` and `within`: `.nll`, `.log_nll` `[N, n + 1]`; `.calibrated` `[N, n]`, less each expert's
        median; `.excess`, less its 99% quantile; `.distance` `[N, n]`, where there are profiles. `.route` `[N]` of the
        first two, and `added.COUNT.route` of chunks, by the number of experts.
    """
    fewest, count, evidence = min(64, setting.span), len(experts), evidence_of(measured, experts)
    router = Router(crouter, experts.first(count, evidence), fewest=fewest)
    tokens = torch.from_numpy(measured["chunk"].astype(np.float32))
    parts = tokens.unflatten(-1, (4, setting.span)).swapaxes(1, 2).flatten(0, 1)
    pieces = {
        "chunk": (summary(tokens), setting.chunk),
        "span": (torch.from_numpy(measured["span"]), setting.span),
        "within": (summary(parts), setting.chunk),
    }
    found: Arrays = {}
    for name, (rows, length) in pieces.items():
        found |= {f"{name}.nll": rows[..., NLL].numpy(), f"{name}.log_nll": rows[..., LOG_NLL].numpy()}
        some = rows[:, :-1, NLL].numpy()
        for key, level in (("calibrated", 0.5), ("excess", router.in_domain_quantile)):
            found[f"{name}.{key}"] = some - np.float32(
                [e.calibration.reconstruction_nll(length, level) for e in experts]
            )
        if not rows.isnan().any() and all(expert.profile for expert in router.experts):
            found[f"{name}.distance"] = torch.stack([router.distances(row, length) for row in rows]).float().numpy()
        if name != "within":
            found[f"{name}.route"] = np.array([router.decide(row, length).number for row in rows], np.int64)
    router.remove()
    for added in range(1, count + 1):  # experts added one after another
        some = Router(crouter, experts.first(added, evidence), fewest=fewest)
        columns = [*range(added), count]
        routes = [some.decide(row[columns], setting.chunk).number for row in pieces["chunk"][0]]
        found[f"added.{added}.route"] = np.array(routes, np.int64)
        some.remove()
    for kind in ("chunk", "span"):
        own = torch.from_numpy(measured[f"own.{kind}"].astype(np.float32))
        found[f"{kind}.own"] = (own.mean(-1) if kind == "chunk" else own[..., NLL]).numpy()
        found[f"{kind}.own.domain"] = measured[f"own.{kind}.domain"]
    sizes = [[expert.compressor.nbytes // 2, expert.host.nbytes // 2] for expert in experts]  # as saved, bfloat16
    return found | {
        "expert.bytes": np.array(sizes, np.int64),
        "added.bit_difference": measured["added.bit_difference"],
    }


def decide_shortlist(
    crouter: Any, experts: ExpertSet, measured: Arrays, distance: np.ndarray, setting: Setting
) -> Arrays:
    """Decisions on chunks where only the experts nearest by their centroids were asked.

    Args:
        crouter: the shared one.
        experts: the set.
        measured: of `measure_reconstruction`.
        distance: of `measure_shortlist`, `[N, n]`.
        setting: the texts.

    Returns:
        For each size: `SIZE.route` `[N]`, and `SIZE.choice`, the least log reconstruction NLL of those asked.
    """
    rows, found = summary(torch.from_numpy(measured["chunk"].astype(np.float32))), {}
    experts = experts.first(len(experts), evidence_of(measured, experts))
    router = Router(crouter, experts, fewest=min(64, setting.span))
    for size in SHORTLISTS:
        far = torch.from_numpy(distance.argsort(1).argsort(1) >= size)
        asked = rows.clone()
        asked[torch.cat([far, torch.ones(len(far), 1, dtype=torch.bool)], dim=1)] = torch.nan
        found[f"{size}.route"] = np.array([router.decide(row, setting.chunk).number for row in asked], np.int64)
        found[f"{size}.choice"] = asked[:, :-1, LOG_NLL].nan_to_num(nan=torch.inf).argmin(1).numpy()
    router.remove()
    return found


def decide_borders(crouter: Any, experts: ExpertSet, measured: Arrays, setting: Setting) -> Arrays:
    """Borders as the experts' token reconstruction NLL shows them."""
    del crouter, experts
    return measure_borders(setting, {name: measured[name][:, :-1].astype(np.float64) for name in setting.bordered()})


def decide_changing(crouter: Any, experts: ExpertSet, measured: Arrays, setting: Setting) -> Arrays:
    """Routes `[P, chunks]` of consecutive chunks of documents that change once."""
    known, documents = setting.known, setting.changing()
    every = torch.from_numpy(measured["changing"]).unflatten(0, (len(documents.ids), -1))
    experts = experts.first(len(experts), evidence_of(measured, experts))
    router = Router(crouter, experts, fewest=min(64, setting.span))
    routes = [[router.decide(chunk, setting.chunk).number for chunk in document] for document in every]
    router.remove()
    return {
        "route": np.array(routes, np.int64),
        "border": documents.borders,
        "nll": every[:, :, :-1, NLL].numpy(),
        "first": known[documents.first],
        "second": known[documents.second],
    }
