"""Figures of borders inside chunks, and of how late the route follows a change."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from eval.routing.mixed import Mixed
from eval.routing.report.figures import Figures


def border_figures(figures: Figures, part: Mapping[str, np.ndarray], mixed: Mixed, key: str) -> None:
    """Border errors in tokens, spliced and real."""
    documents = figures.documents(1)[part["spliced.first"]]
    error = part["spliced.error"].astype(float)
    figures.add(f"{key}.median_tokens", lambda index: float(np.median(error[index])), documents)
    figures.found |= {
        f"{key}.mean_tokens": float(error.mean()),
        f"{key}.within32": float((error <= 32).mean()),
        f"{key}.borders_found": float(part["spliced.found"].mean()),
        f"{key}.tokens_right": float(part["spliced.tokens"].mean()),
        f"{key}.switch": float(part["switch"][0]),
        f"{key}.smooth": float(part["smooth"][0]),
    }
    for source in ("mixed", "mixed_own"):
        if f"{source}.error" not in part:
            continue
        pieces, error = part[f"{source}.piece"], part[f"{source}.error"].astype(float)
        prefix = key if source == "mixed" else f"{key}.own"
        figures.found[f"{prefix}.mixed.switch"] = float(part[f"{source}.setting"][0])
        for kind in dict.fromkeys(mixed.kinds):
            rows = np.array([mixed.kinds[piece] == kind for piece in pieces])
            groups = [mixed.documents[piece] for piece in pieces[rows]]
            some = error[rows]
            figures.add(f"{prefix}.{kind}.median_tokens", lambda index, v=some: float(np.median(v[index])), groups)
            found = part[f"{source}.found"][[other == kind for other in mixed.kinds]]
            figures.found |= {
                f"{prefix}.{kind}.borders": float(rows.sum()),
                f"{prefix}.{kind}.within32": float((some <= 32).mean()),
                f"{prefix}.{kind}.borders_found": float(found[:, 0].mean()),
                f"{prefix}.{kind}.borders_true": float(found[:, 1].mean()),
            }


def lag_figures(figures: Figures, part: Mapping[str, np.ndarray], chunk: int) -> None:
    """How late the route follows a change."""
    truth, border, routes = figures.truth(1), part["border"], part["route"]
    second, first = truth[part["second"]], truth[part["first"]]
    at = border // chunk
    lag = np.array([
        next((i for i in range(b, len(row)) if row[i] == s), len(row)) - b
        for row, b, s in zip(routes, at, second, strict=True)
    ])  # fmt: skip
    documents = figures.documents(1)[part["first"]]
    figures.add("lag.chunks", lambda index: float(lag[index].mean()), documents)
    figures.found |= {
        "lag.tokens": float(np.mean((at + lag + 1) * chunk - border)),
        "lag.never": float((lag >= routes.shape[1] - at).mean()),
        "lag.changes": float((np.diff(routes, axis=1) != 0).sum(1).mean()),
        "lag.before": float((routes[:, 0] == first).mean()),
        "lag.base": float((routes[np.arange(len(routes)), at] < 0).mean()),
    }
