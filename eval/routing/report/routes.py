"""Figures of our router: accuracy, rejection, the confusion matrix, shortlists, other compressors of the domains.

A chunk that the router leaves to the base model counts as wrong, except under `.argmin`, which compares with
baselines that always answer.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from eval.routing.report.figures import UNSEEN, Figures, macro, rejection_auroc
from eval.routing.windows import FAR, NEAR
from hf_crouter.routing.profile import LOG_NLL, NLL

SPANS = {"chunk": "chunk", "span": "span128", "within": "span128.within"}


def routing_figures(figures: Figures, part: Mapping[str, np.ndarray]) -> None:
    """Accuracy, rejection and the confusion of our router, and what other rules would make of the same measures.

    `.argmin`: always the least log reconstruction NLL; `.mean`: the least mean one; `.calibrated`: that less each
    expert's median. Rejection is by the least distance from a profile; `.reconstruction_nll.unseen`: by how far
    that lies above the 99% quantile, the rule without profiles; `.gain.unseen`: by what an expert gains over the
    crouter alone, below its 1% quantile.
    """
    for name, key in SPANS.items():
        nll = part[f"{name}.nll"]
        each = len(nll) // len(figures.domains(1))
        figures.accuracy(f"{key}.argmin.accuracy", part[f"{name}.log_nll"][:, :-1].argmin(1))
        figures.accuracy(f"{key}.mean.accuracy", nll[:, :-1].argmin(1))
        figures.accuracy(f"{key}.calibrated.accuracy", part[f"{name}.calibrated"].argmin(1), interval=False)
        figures.rejection(f"{key}.reconstruction_nll.unseen", part[f"{name}.excess"].min(1), interval=False)
        if f"{name}.distance" in part:
            figures.rejection(f"{key}.unseen", part[f"{name}.distance"].min(1))
        if name == "within":
            continue
        own, numbers = part[f"{name}.own"], part[f"{name}.own.domain"]
        lack, usual = (values[:, :-1] - values[:, -1:] for values in (nll, own))
        limits = [np.quantile(usual[numbers == i, i], 0.99) for i in range(lack.shape[1])]
        figures.accuracy(f"{key}.gain.accuracy", (lack - np.array(limits)).argmin(1), interval=False)
        figures.rejection(f"{key}.gain.unseen", (lack - np.array(limits)).min(1), interval=False)
        route = part[f"{name}.route"]
        figures.accuracy(f"{key}.accuracy", route)
        known = figures.truth(each) >= 0
        figures.found[f"{key}.known.abstained"] = float((route[known] < 0).mean())
        for group, members in UNSEEN.items():
            rows = np.isin(figures.domains(each), members)
            if rows.any():
                figures.found[f"{key}.unseen.{group}.accepted"] = float((route[rows] >= 0).mean())
    for domain in dict.fromkeys([*NEAR, *FAR]):
        rows = figures.domains(2) == domain
        if rows.any() and "chunk.distance" in part:
            away = part["chunk.distance"].min(1)
            figures.found[f"unseen.{domain}.auroc"] = rejection_auroc(away[figures.truth(2) >= 0], away[rows])
    for group in UNSEEN:  # the names that others rely on
        for suffix in ("auroc", "auroc.lo", "auroc.hi", "false_accepts"):
            if f"chunk.unseen.{group}.{suffix}" in figures.found:
                figures.found[f"unseen.{group}.{suffix}"] = figures.found[f"chunk.unseen.{group}.{suffix}"]
    for row, shares in confusion(figures, part["chunk.route"]).items():
        figures.found |= {f"confusion.{row}.{column}": share for column, share in shares.items()}
    compressor, host = part["expert.bytes"].mean(0)
    figures.found |= {"expert.bytes": float(compressor), "expert.host.bytes": float(host)}
    figures.found["added.bit_difference"] = float(part["added.bit_difference"][0])


def confusion(figures: Figures, routes: np.ndarray) -> dict[str, dict[str, float]]:
    """Share of each domain's chunks (rows) that go to each expert or to the base model (columns)."""
    each = len(routes) // len(figures.domains(1))
    domains = figures.domains(each)
    present = dict.fromkeys([*figures.names, *NEAR, *FAR])
    return {
        domain: {
            name: float((routes[domains == domain] == number).mean())
            for number, name in [*enumerate(figures.names), (-1, "base")]
        }
        for domain in present
        if (domains == domain).any()
    }


def shortlist_figures(figures: Figures, distance: np.ndarray, decided: Mapping[str, np.ndarray]) -> None:
    """How often the right expert is among the nearest few, by their centroids, and what is decided among those."""
    truth = figures.truth(2)
    known = np.flatnonzero(truth >= 0)
    rank = (distance < distance[np.arange(len(truth)), truth][:, None]).sum(1)[known]  # experts that lie nearer
    domains, documents = figures.domains(2)[known], figures.documents(2)[known]
    for name in (name for name in decided if name.endswith(".route")):
        size = int(name.removesuffix(".route"))
        key, kept, routes = f"shortlist{size}", rank < size, decided[name]
        figures.add(f"{key}.recall", lambda index, kept=kept: macro(kept[index], domains[index]), documents)
        figures.accuracy(f"{key}.argmin.accuracy", decided[f"{size}.choice"])
        figures.accuracy(f"{key}.accuracy", routes)
        for group, members in UNSEEN.items():
            rows = np.isin(figures.domains(2), members)
            if rows.any():
                figures.found[f"{key}.unseen.{group}.accepted"] = float((routes[rows] >= 0).mean())


def compared_figures(figures: Figures, part: Mapping[str, np.ndarray], adapters: Mapping[str, np.ndarray]) -> None:
    """Whole copies of the crouter and smaller adapters beside the experts', on the domains that have all of them."""
    names = [name for name in figures.names if f"full.{name}.chunk" in part]
    numbers = [figures.names.index(name) for name in names]
    rows = np.isin(figures.truth(2), numbers)
    truth, documents = figures.truth(2)[rows], figures.documents(2)[rows]
    own = np.array([numbers.index(t) for t in truth])
    scores = {kind: np.stack([part[f"{kind}.{n}.chunk"] for n in names], 1)[rows] for kind in ("full", "small")}
    ours = np.stack([adapters["chunk.nll"], adapters["chunk.log_nll"]], -1)[rows][:, numbers]
    for key, values in (scores | {"expert": ours}).items():
        nll = values[..., NLL]
        right = np.array(numbers)[values[..., LOG_NLL].argmin(1)] == truth
        figures.add(f"compared.{key}.accuracy", lambda index, right=right: float(right[index].mean()), documents)
        best_other = np.where(np.arange(len(names)) == own[:, None], np.inf, nll).min(1)
        mine = nll[np.arange(len(own)), own]
        figures.found |= {
            f"compared.{key}.margin": float(np.mean(best_other - mine)),
            f"compared.{key}.reconstruction_nll": float(np.mean(mine)),
        }
        if key in scores:
            figures.found |= {
                f"compared.{key}.{what}": float(np.mean([part[f"{key}.{n}.{what}"][0] for n in names]))
                for what in ("bytes", "ms")
            }
