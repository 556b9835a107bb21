"""All figures of `routing.json` from the measured arrays, and those that a reader looks for first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from eval.routing.mixed import Mixed
from eval.routing.report.baselines import BASELINES, baseline_figures
from eval.routing.report.borders import border_figures, lag_figures
from eval.routing.report.figures import DRAWS, Figures, Metrics
from eval.routing.report.host import continual_figures, host_figures
from eval.routing.report.routes import compared_figures, routing_figures, shortlist_figures
from eval.routing.windows import TestWindows
from hf_crouter.errors import InputError

Parts = Mapping[str, Mapping[str, np.ndarray]]


def metrics(
    parts: Parts,
    windows: TestWindows,
    mixed: Mixed,
    names: Sequence[str],
    beside: Sequence[str],
    *,
    chunk: int,
    seed: int,
    draws: int = DRAWS,
) -> Metrics:
    """Figures of whatever parts are there.

    Raises:
        InputError: there is none.
    """
    if not parts:
        raise InputError("routing: expected measured parts, got none; run the stage `measure`")
    figures = Figures(windows, names, seed, draws)
    if "routes" in parts:
        routing_figures(figures, parts["routes"])
    if "borders" in parts:
        border_figures(figures, parts["borders"], mixed, "border")
    if "changing" in parts:
        lag_figures(figures, parts["changing"], chunk)
    if "host" in parts:
        baseline_figures(figures, "perplexity", parts["host"], "")
    if "host" in parts and "routes" in parts:
        part = parts["routes"]
        if parts["host"]["window"].shape[-1] != 1 + len(names) + len(beside):
            beside = ()  # they were not trained
        host_figures(figures, parts["host"], part["chunk.route"], beside)
        routes = {count: part[f"added.{count}.route"] for count in range(1, len(names) + 1)}
        continual_figures(figures, routes, parts["host"]["window"][:, 1], beside)
    for source in ("text", "probe", "arrow"):
        for name in BASELINES:
            if source in parts and f"{name}.chunk" in parts[source]:
                baseline_figures(figures, name, parts[source], f"{name}.")
    if "text" in parts:
        found = {k.removeprefix("ngram.border."): v for k, v in parts["text"].items() if k.startswith("ngram.border.")}
        border_figures(figures, found, mixed, "baseline.ngram.border")
    if "latency" in parts:
        figures.found |= {f"cost.{key}": float(value[0]) for key, value in parts["latency"].items()}
    if "shortlist" in parts and "shortlisted" in parts:
        shortlist_figures(figures, parts["shortlist"]["distance"], parts["shortlisted"])
    if "compared" in parts and "routes" in parts:
        compared_figures(figures, parts["compared"], parts["routes"])
    return figures.found


def table(found: Metrics) -> str:
    """The figures that a reader looks for first, a line each."""
    wanted = (
        "chunk.accuracy", "chunk.argmin.accuracy", "chunk.mean.accuracy", "chunk.calibrated.accuracy",
        "chunk.known.abstained",
        "span128.accuracy", "span128.argmin.accuracy", "span128.mean.accuracy", "span128.within.argmin.accuracy",
        "unseen.near.auroc", "unseen.far.auroc", "unseen.near.false_accepts", "unseen.far.false_accepts",
        "chunk.unseen.near.accepted", "chunk.unseen.far.accepted",
        "chunk.reconstruction_nll.unseen.near.auroc", "chunk.reconstruction_nll.unseen.far.auroc",
        "border.median_tokens",
        "oracle.loss_ratio", "joint.loss_ratio", "forgetting.max_abs_delta", "forgetting.sequential.max_abs_delta",
        "cost.switch.ms", "cost.recompute.ms", "expert.bytes",
    )  # fmt: skip
    keys = [key for key in wanted if key in found]
    keys += [f"baseline.{name}{what}" for name in BASELINES for what in
             (".accuracy", ".span128.accuracy", ".unseen.near.auroc", ".unseen.far.auroc", ".ms", ".bytes")
             if f"baseline.{name}{what}" in found]  # fmt: skip
    keys += [key for key in found if ".border." in key and key.endswith("median_tokens")]
    lines = []
    for key in keys:
        interval = f"  [{found[f'{key}.lo']:.4f}, {found[f'{key}.hi']:.4f}]" if f"{key}.lo" in found else ""
        lines.append(f"{key:48} {found[key]:.4f}{interval}")
    return "\n".join(lines)
