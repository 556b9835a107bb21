"""Figures of the routing measurement from its arrays, with intervals, and the confusion matrix as a picture.

Accuracies are means of the domains' means; a chunk that the router leaves to the base model counts as wrong, except
under `.argmin`, which compares with baselines that always answer. Rejection is by one number a piece, the lower the
better known. Intervals are bootstraps clustered by document.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.routing_data import FAR, NEAR, TestWindows
from eval.routing_mixed import Mixed
from eval.statistics import clustered_interval
from hf_crouter.errors import InputError
from hf_crouter.routing.profile import LOG_NLL, NLL, USUAL, distances_across, gaussian, squared_distance
from hf_crouter.utils.io import replaced_file

BASELINES = ("ngram", "tfidf", "perplexity", "probe", "arrow")
UNSEEN = {"near": NEAR, "far": FAR}
DRAWS = 400
SPANS = {"chunk": "chunk", "span": "span128", "within": "span128.within"}
Parts = Mapping[str, Mapping[str, np.ndarray]]
Metrics = dict[str, float]


def auroc(known: np.ndarray, unknown: np.ndarray) -> float:
    """Probability that an unknown piece has the higher number than a known one; ties count half."""
    values = np.concatenate([known, unknown])
    _, ranks, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    mean_ranks = (ends - (counts - 1) / 2)[ranks]
    above = mean_ranks[len(known) :].sum() - len(unknown) * (len(unknown) + 1) / 2
    return float(above / (len(known) * len(unknown)))


def false_accepts(known: np.ndarray, unknown: np.ndarray, accepted: float = 0.95) -> float:
    """Share of unknown pieces under the number that this share of known ones stays under."""
    return float((unknown <= np.quantile(known, accepted)).mean())


def macro(values: np.ndarray, domains: np.ndarray) -> float:
    """Mean of the domains' means."""
    return float(np.mean([values[domains == name].mean() for name in np.unique(domains)]))


class Figures:
    """Collects metrics with their intervals.

    Args:
        windows: the test windows.
        names: known domains in the experts' order.
        seed: of the draws.
        draws: bootstrap samples.
    """

    def __init__(self, windows: TestWindows, names: Sequence[str], seed: int, draws: int = DRAWS):
        self.names, self.seed, self.draws = tuple(names), seed, draws
        self.found: Metrics = {}
        self._domains, self._documents = windows.domains, np.array(windows.documents)

    def domains(self, each: int) -> np.ndarray:
        """Domain of every piece where a window has `each`."""
        return np.repeat(self._domains, each)

    def truth(self, each: int) -> np.ndarray:
        """Number of every piece's domain; -1: unknown."""
        numbers = {name: i for i, name in enumerate(self.names)}
        return np.array([numbers.get(name, -1) for name in self.domains(each)])

    def documents(self, each: int) -> np.ndarray:
        """Cluster of every piece."""
        return np.repeat(self._documents, each)

    def add(self, key: str, statistic: Callable[[np.ndarray], float], groups: Sequence[str] | np.ndarray) -> None:
        """A figure with its 95% interval."""
        value, low, high = clustered_interval(statistic, list(groups), seed=self.seed, draws=self.draws)
        self.found |= {key: value, f"{key}.lo": low, f"{key}.hi": high}

    def accuracy(self, key: str, choices: np.ndarray, interval: bool = True) -> None:
        """Of choices over all pieces; unknown domains are left out."""
        each = len(choices) // len(self._domains)
        rows = self.truth(each) >= 0
        right, domains = (choices == self.truth(each))[rows], self.domains(each)[rows]
        if interval:
            self.add(key, lambda index: macro(right[index], domains[index]), self.documents(each)[rows])
        else:
            self.found[key] = macro(right, domains)

    def rejection(self, key: str, numbers: np.ndarray, interval: bool = True) -> None:
        """AUROC and false accepts near and far, of one number a piece."""
        each = len(numbers) // len(self._domains)
        domains, documents, known = self.domains(each), self.documents(each), self.truth(each) >= 0
        for name, members in UNSEEN.items():
            rows = known | np.isin(domains, members)
            if known.all() or rows.sum() == known.sum():
                continue
            values, own = numbers[rows], known[rows]
            for suffix, function in (("auroc", auroc), ("false_accepts", false_accepts)):

                def statistic(index: np.ndarray, function: Any = function, v: Any = values, o: Any = own) -> float:
                    some, kept = v[index], o[index]
                    return function(some[kept], some[~kept]) if kept.any() and not kept.all() else float("nan")

                if interval:
                    self.add(f"{key}.{name}.{suffix}", statistic, documents[rows])
                else:
                    self.found[f"{key}.{name}.{suffix}"] = statistic(np.arange(len(values)))


def routing_figures(figures: Figures, part: Mapping[str, np.ndarray]) -> None:
    """Accuracy, rejection and the confusion of our router, and what other rules would make of the same residuals.

    `.argmin`: always the least log residual; `.mean`: the least mean residual; `.calibrated`: that less each
    expert's median. Rejection is by the least distance from a profile; `.residual.unseen`: by how far the residual
    lies above the 99% quantile, the rule without profiles; `.gain.unseen`: by what an expert gains over the crouter
    alone, below its 1% quantile.
    """
    for name, key in SPANS.items():
        nats = part[f"{name}.nats"]
        each = len(nats) // len(figures.domains(1))
        figures.accuracy(f"{key}.argmin.accuracy", part[f"{name}.logs"][:, :-1].argmin(1))
        figures.accuracy(f"{key}.mean.accuracy", nats[:, :-1].argmin(1))
        figures.accuracy(f"{key}.calibrated.accuracy", part[f"{name}.calibrated"].argmin(1), interval=False)
        figures.rejection(f"{key}.residual.unseen", part[f"{name}.excess"].min(1), interval=False)
        if f"{name}.distance" in part:
            figures.rejection(f"{key}.unseen", part[f"{name}.distance"].min(1))
        if name == "within":
            continue
        own, numbers = part[f"{name}.own"], part[f"{name}.own.domain"]
        lack, usual = (values[:, :-1] - values[:, -1:] for values in (nats, own))
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
            figures.found[f"unseen.{domain}.auroc"] = auroc(away[figures.truth(2) >= 0], away[rows])
    for group in UNSEEN:  # the names that others rely on
        for suffix in ("auroc", "auroc.lo", "auroc.hi", "false_accepts"):
            if f"chunk.unseen.{group}.{suffix}" in figures.found:
                figures.found[f"unseen.{group}.{suffix}"] = figures.found[f"chunk.unseen.{group}.{suffix}"]
    for row, shares in confusion(figures, part["chunk.route"]).items():
        figures.found |= {f"confusion.{row}.{column}": share for column, share in shares.items()}
    compressor, host = part["expert.bytes"].mean(0)
    figures.found |= {"expert.bytes": float(compressor), "expert.host.bytes": float(host)}
    figures.found["mounted.bit_difference"] = float(part["mounted.bit_difference"][0])


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
    """How late the route follows a change, for each `stay`."""
    truth, border = figures.truth(1), part["border"]
    second, first = truth[part["second"]], truth[part["first"]]
    documents = figures.documents(1)[part["first"]]
    for key in sorted(key for key in part if key.startswith("route.")):
        routes, name = part[key], key.replace("route.", "lag.stay", 1)
        at = border // chunk
        lag = np.array([
            next((i for i in range(b, len(row)) if row[i] == s), len(row)) - b
            for row, b, s in zip(routes, at, second, strict=True)
        ])  # fmt: skip
        tokens = (at + lag + 1) * chunk - border
        changes = (np.diff(routes, axis=1) != 0).sum(1)
        figures.add(f"{name}.chunks", lambda index, lag=lag: float(lag[index].mean()), documents)
        figures.found |= {
            f"{name}.tokens": float(np.mean(tokens)),
            f"{name}.never": float((lag >= routes.shape[1] - at).mean()),
            f"{name}.changes": float(changes.mean()),
            f"{name}.before": float((routes[:, 0] == first).mean()),
            f"{name}.base": float((routes[np.arange(len(routes)), at] < 0).mean()),
        }


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
    places = {name: 1 + len(figures.names) + i for i, name in enumerate(beside)}
    for name in figures.names:
        if f"large.{name}" in places:
            figures.found[f"host.{name}.large"] = float(
                losses[truth == figures.names.index(name), places[f"large.{name}"]].mean()
            )
    if "joint" in places:
        joint = losses[:, places["joint"]]
        figures.add("joint.loss_ratio", lambda index: macro(joint[rows[index]], domains[rows[index]])
                    / macro(oracle[rows[index]], domains[rows[index]]), documents[rows])  # fmt: skip


def continual_figures(
    figures: Figures, routes: Mapping[int, np.ndarray], losses: np.ndarray, beside: Sequence[str]
) -> None:
    """What every earlier domain loses while others are mounted, routed; and while one adapter is trained on them.

    Args:
        figures: collects.
        routes: of all chunks, by the number of experts mounted.
        losses: of second chunks, `[W, 1 + adapters]`.
        beside: names of the adapters after the experts'.
    """
    truth = figures.truth(1)
    places = {name: 1 + len(figures.names) + i for i, name in enumerate(beside)}
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
            if f"sequential{stage - 1}" in places:
                own = float(losses[rows, places[f"sequential{stage - 1}"]].mean())
                figures.found[f"continual.{stage}.{name}.sequential"] = own
                sequential.append(own - figures.found[f"continual.{number + 1}.{name}.sequential"])
            if "joint" in places:
                figures.found[f"continual.joint.{name}"] = float(losses[rows, places["joint"]].mean())
    figures.found["forgetting.max_abs_delta"] = float(np.abs(deltas).max())
    figures.found["forgetting.max_delta"] = float(max(deltas))
    figures.found["forgetting.max_accuracy_drop"] = float(-min(accuracies))
    if sequential:
        figures.found["forgetting.sequential.max_abs_delta"] = float(np.abs(sequential).max())


def pattern_distance(scores: np.ndarray, own: np.ndarray, numbers: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """Least distance of scores `[N, n]` from the pattern of a domain's own, `[N]`: our rule, for a baseline.

    Args:
        scores: of the pieces to judge.
        own: of calibration pieces, `[C, n]`.
        numbers: their domains, `[C]`.
        documents: theirs, `[C]`.
    """
    found = []
    for number in np.unique(numbers):
        rows = numbers == number
        points = own[rows].astype(np.float64)
        across = distances_across(points, documents[rows])
        usual = np.quantile(squared_distance(points, *gaussian(points)) if across is None else across, USUAL)
        found.append(squared_distance(scores.astype(np.float64), *gaussian(points)) / usual)
    return np.min(found, axis=0)


def baseline_figures(figures: Figures, name: str, part: Mapping[str, np.ndarray], prefix: str) -> None:
    """Accuracy, rejection, milliseconds and bytes of a baseline; its scores stand under `prefix`."""
    for what, key in (("chunk", f"baseline.{name}"), ("span", f"baseline.{name}.span128")):
        scores, median = part[f"{prefix}{what}"], part[f"{prefix}{what}.median"]
        figures.accuracy(f"{key}.accuracy", scores.argmin(1))
        figures.accuracy(f"{key}.calibrated.accuracy", (scores - median).argmin(1), interval=False)
        figures.rejection(f"{key}.unseen", (scores - part[f"{prefix}{what}.limit"]).min(1))
        figures.rejection(f"{key}.calibrated.unseen", (scores - median).min(1), interval=False)
        figures.rejection(f"{key}.raw.unseen", scores.min(1), interval=False)
        if f"{prefix}{what}.own" in part:
            own, numbers, documents = (part[f"{prefix}{what}.own{end}"] for end in ("", ".domain", ".document"))
            figures.rejection(f"{key}.pattern.unseen", pattern_distance(scores, own, numbers, documents))
        if f"{prefix}{what}.ms" in part:
            figures.found[f"{key}.ms"] = float(part[f"{prefix}{what}.ms"][0])
    if f"{prefix}bytes" in part:
        figures.found[f"baseline.{name}.bytes"] = float(part[f"{prefix}bytes"][0])


def compared_figures(figures: Figures, part: Mapping[str, np.ndarray], adapters: Mapping[str, np.ndarray]) -> None:
    """Whole copies of the crouter and smaller adapters beside the experts', on the domains that have all of them."""
    names = [name for name in figures.names if f"full.{name}.chunk" in part]
    numbers = [figures.names.index(name) for name in names]
    rows = np.isin(figures.truth(2), numbers)
    truth, documents = figures.truth(2)[rows], figures.documents(2)[rows]
    own = np.array([numbers.index(t) for t in truth])
    scores = {kind: np.stack([part[f"{kind}.{n}.chunk"] for n in names], 1)[rows] for kind in ("full", "small")}
    ours = np.stack([adapters["chunk.nats"], adapters["chunk.logs"]], -1)[rows][:, numbers]
    for key, values in (scores | {"expert": ours}).items():
        nats = values[..., NLL]
        right = np.array(numbers)[values[..., LOG_NLL].argmin(1)] == truth
        figures.add(f"compared.{key}.accuracy", lambda index, right=right: float(right[index].mean()), documents)
        best_other = np.where(np.arange(len(names)) == own[:, None], np.inf, nats).min(1)
        mine = nats[np.arange(len(own)), own]
        figures.found |= {
            f"compared.{key}.margin": float(np.mean(best_other - mine)),
            f"compared.{key}.residual": float(np.mean(mine)),
        }
        if key in scores:
            figures.found |= {
                f"compared.{key}.{what}": float(np.mean([part[f"{key}.{n}.{what}"][0] for n in names]))
                for what in ("bytes", "ms")
            }


def shortlist_figures(figures: Figures, distance: np.ndarray, decided: Mapping[str, np.ndarray]) -> None:
    """How often the right expert is among the nearest few, by their centroids, and what is decided among those."""
    truth = figures.truth(2)
    known = np.flatnonzero(truth >= 0)
    place = (distance < distance[np.arange(len(truth)), truth][:, None]).sum(1)[known]  # experts that lie nearer
    domains, documents = figures.domains(2)[known], figures.documents(2)[known]
    for name in (name for name in decided if name.endswith(".route")):
        size = int(name.removesuffix(".route"))
        key, kept, routes = f"shortlist{size}", place < size, decided[name]
        figures.add(f"{key}.recall", lambda index, kept=kept: macro(kept[index], domains[index]), documents)
        figures.accuracy(f"{key}.argmin.accuracy", decided[f"{size}.choice"])
        figures.accuracy(f"{key}.accuracy", routes)
        for group, members in UNSEEN.items():
            rows = np.isin(figures.domains(2), members)
            if rows.any():
                figures.found[f"{key}.unseen.{group}.accepted"] = float((routes[rows] >= 0).mean())


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
    if "residuals" in parts:
        routing_figures(figures, parts["residuals"])
    if "borders" in parts:
        border_figures(figures, parts["borders"], mixed, "border")
    if "changing" in parts:
        lag_figures(figures, parts["changing"], chunk)
    if "host" in parts:
        baseline_figures(figures, "perplexity", parts["host"], "")
    if "host" in parts and "residuals" in parts:
        part = parts["residuals"]
        if parts["host"]["window"].shape[-1] != 1 + len(names) + len(beside):
            beside = ()  # they were not trained
        host_figures(figures, parts["host"], part["chunk.route"], beside)
        routes = {count: part[f"mounted.{count}.route"] for count in range(1, len(names) + 1)}
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
    if "compared" in parts and "residuals" in parts:
        compared_figures(figures, parts["compared"], parts["residuals"])
    return figures.found


def table(found: Metrics) -> str:
    """The figures that a reader looks for first, a line each."""
    wanted = (
        "chunk.accuracy", "chunk.argmin.accuracy", "chunk.mean.accuracy", "chunk.calibrated.accuracy",
        "chunk.known.abstained",
        "span128.accuracy", "span128.argmin.accuracy", "span128.mean.accuracy", "span128.within.argmin.accuracy",
        "unseen.near.auroc", "unseen.far.auroc", "unseen.near.false_accepts", "unseen.far.false_accepts",
        "chunk.unseen.near.accepted", "chunk.unseen.far.accepted",
        "chunk.residual.unseen.near.auroc", "chunk.residual.unseen.far.auroc", "border.median_tokens",
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


def draw_confusion(found: Metrics, path: Path) -> Path:
    """Writes the confusion matrix as a picture (SVG or PNG by suffix), the same bytes from the same figures.

    Args:
        found: metrics of `routing.json`, with keys `confusion.DOMAIN.EXPERT`.
        path: where to.

    Raises:
        InputError: no such figures, or no matplotlib.
    """
    cells = [key.split(".")[1:] for key in found if key.startswith("confusion.")]
    if not cells:
        raise InputError("confusion matrix: expected figures confusion.DOMAIN.EXPERT, got none")
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("figures: expected matplotlib, which the extra 'test' brings") from error
    rows, columns = (list(dict.fromkeys(cell[i] for cell in cells)) for i in (0, 1))
    shares = np.array([[found.get(f"confusion.{row}.{column}", 0.0) for column in columns] for row in rows])
    with matplotlib.rc_context({"svg.hashsalt": "routing", "svg.fonttype": "path", "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(7.2, 6.4), dpi=100)
        axes = figure.add_subplot()
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for y, row in enumerate(shares):
            for x, share in enumerate(row):
                if share >= 0.005:
                    axes.text(x, y, f"{100 * share:.0f}", ha="center", va="center", fontsize=8,
                              color="white" if share > 0.5 else "#333333")  # fmt: skip
        axes.set_xticks(range(len(columns)), columns, rotation=40, ha="right", fontsize=8)
        axes.set_yticks(range(len(rows)), rows, fontsize=8)
        known = sum(row in columns for row in rows)
        axes.axhline(known - 0.5, color="#333333", linewidth=1)
        axes.set(xlabel="expert that serves", ylabel="domain of the chunk (unknown ones below the line)")
        axes.set_title("Routes of held-out chunks of 512 tokens, per cent of each domain", fontsize=10)
        figure.tight_layout()
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = path.suffix.removeprefix(".") or "svg"
        with replaced_file(path) as temporary:
            figure.savefig(temporary, format=kind, metadata={"Date": None} if kind == "svg" else None)
    return path
