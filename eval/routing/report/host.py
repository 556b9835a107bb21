"""Figures of the host's loss: routed, under other adapters, and while experts are added one after another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from eval.routing.report.figures import Figures, macro


def host_figures(figures: Figures, part: Mapping[str, np.ndarray], routes: np.ndarray, beside: Sequence[str]) -> None:
    """Host losses routed, by the oracle and of the base model: the route of a window's first chunk serves its second.

    Args:
        figures: collects.
        part: of the host.
        routes: of all chunks, `[2W]`.
        beside: names of the adapters after the experts'.
    """
    truth, losses = figures.truth(1), part["window"][:, 1]  # [W, 1 + adapters]; column 0 is the base model
    rows = np.flatnonzero(truth >= 0)
    routed = losses[np.arange(len(losses)), routes[::2] + 1]
    oracle = losses[np.arange(len(losses)), truth + 1]
    base, domains, documents = losses[:, 0], figures.domains(1), figures.documents(1)
    for name in (*figures.names, "unseen"):
        some = np.flatnonzero(domains == name) if name != "unseen" else np.flatnonzero(truth < 0)
        if not len(some):
            continue
        figures.found |= {
            f"host.{name}.base": float(base[some].mean()),
            f"host.{name}.routed": float(routed[some].mean()),
        }
        gain = (base - routed)[some]
        figures.add(f"host.{name}.gain", lambda index, gain=gain: float(gain[index].mean()), documents[some])
        if name != "unseen":
            figures.found[f"host.{name}.oracle"] = float(oracle[some].mean())

    def ratio(index: np.ndarray) -> float:
        some = rows[index]
        return macro(routed[some], domains[some]) / macro(oracle[some], domains[some])

    figures.add("oracle.loss_ratio", ratio, documents[rows])
    figures.add("oracle.base_ratio", lambda index: macro(base[rows[index]], domains[rows[index]])
                / macro(oracle[rows[index]], domains[rows[index]]), documents[rows])  # fmt: skip
    columns = {name: 1 + len(figures.names) + i for i, name in enumerate(beside)}
    for name in figures.names:
        if f"large.{name}" in columns:
            figures.found[f"host.{name}.large"] = float(
                losses[truth == figures.names.index(name), columns[f"large.{name}"]].mean()
            )
    if "joint" in columns:
        joint = losses[:, columns["joint"]]
        figures.add("joint.loss_ratio", lambda index: macro(joint[rows[index]], domains[rows[index]])
                    / macro(oracle[rows[index]], domains[rows[index]]), documents[rows])  # fmt: skip


def continual_figures(
    figures: Figures, routes: Mapping[int, np.ndarray], losses: np.ndarray, beside: Sequence[str]
) -> None:
    """What every earlier domain loses while others are added, routed; and while one adapter is trained on them.

    Args:
        figures: collects.
        routes: of all chunks, by the number of experts.
        losses: of second chunks, `[W, 1 + adapters]`.
        beside: names of the adapters after the experts'.
    """
    truth = figures.truth(1)
    columns = {name: 1 + len(figures.names) + i for i, name in enumerate(beside)}
    deltas, sequential, accuracies = [], [], []
    for stage in sorted(routes):
        chosen = losses[np.arange(len(losses)), routes[stage][::2] + 1]
        for number, name in enumerate(figures.names[:stage]):
            rows = truth == number
            right = float((routes[stage] == number)[np.repeat(rows, 2)].mean())
            figures.found[f"continual.{stage}.{name}.routed"] = float(chosen[rows].mean())
            figures.found[f"continual.{stage}.{name}.accuracy"] = right
            first = figures.found[f"continual.{number + 1}.{name}.routed"]
            deltas.append(float(chosen[rows].mean()) - first)
            accuracies.append(right - figures.found[f"continual.{number + 1}.{name}.accuracy"])
            if f"sequential{stage - 1}" in columns:
                own = float(losses[rows, columns[f"sequential{stage - 1}"]].mean())
                figures.found[f"continual.{stage}.{name}.sequential"] = own
                sequential.append(own - figures.found[f"continual.{number + 1}.{name}.sequential"])
            if "joint" in columns:
                figures.found[f"continual.joint.{name}"] = float(losses[rows, columns["joint"]].mean())
    figures.found["forgetting.max_abs_delta"] = float(np.abs(deltas).max())
    figures.found["forgetting.max_delta"] = float(max(deltas))
    figures.found["forgetting.max_accuracy_drop"] = float(-min(accuracies))
    if sequential:
        figures.found["forgetting.sequential.max_abs_delta"] = float(np.abs(sequential).max())
