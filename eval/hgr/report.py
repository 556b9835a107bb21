"""What the measurement says: ratios, lines, differences and their intervals from the figures of documents.

Arrays are `[D]` by key: `n<chunks>.<arm>.{loss,right,lines,slots}`, nan where a document was not read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from eval.rows import Record, Rows
from hf_crouter.errors import InputError

FEWEST = 8  # documents of a domain below which its own ratio says nothing
LEAST_WORTH = 0.01  # nats/token that full history must be worth in a domain for a ratio to say something
DIFFERENCES = (  # an arm and the other one, where both were read
    ("copy", "window"), ("copy_fitted", "window"), ("copy_fitted", "copy"), ("retrieve2_copy", "retrieve2"),
    ("retrieve2_copy_fitted", "retrieve2"), ("retrieve4_copy", "retrieve4"), ("retrieve4_copy_fitted", "retrieve4"),
    ("full_copy", "full"), ("soft_retrieve2_copy", "full"), ("soft_retrieve2_copy", "longer_same_slots_retrieve2"),
    ("retrieve2", "longer_same_slots_retrieve2"), ("retrieve4", "longer_same_slots_retrieve4"),
    ("retrieve2", "retrieve2_last"), ("retrieve2", "retrieve2_random"), ("retrieve2", "retrieve2_bm25"),
    ("retrieve2_copy", "longer_same_slots_retrieve2_copy"), ("soft", "shuffled"), ("soft", "mean_pool"),
    ("soft", "longer_same_slots"), ("soft_copy", "copy"), ("soft_retrieve2_copy", "retrieve2_copy"),
    ("kvzip.at8", "longer_same_slots"), ("snapkv.at8", "longer_same_slots"),
    ("kvzip.at128", "longer_same_slots_at128"), ("snapkv.at128", "longer_same_slots_at128"),
    ("kvzip.at128", "retrieve2"), ("full_peers", "full"),
    *((f"compact{n}", other) for n in (8, 32, 128) for other in (f"kvzip.at{n}", f"snapkv.at{n}", "window", "full",
                                                                 f"compact{n}_equal")),
    ("compact8", "longer_same_slots"), ("compact32", "longer_same_slots_at32"),
    ("compact128", "longer_same_slots_at128"), ("compact64", "full"), ("compact60", "full"),
    ("compact160", "full"), ("compact96_retrieve1", "full"),
    ("compact128", "retrieve2"),
    *((arm, other) for arm in ("compact8_retrieve2", "compact32_retrieve2", "compact64_retrieve2")
      for other in ("retrieve2", "full")),
    ("compact32_copy", "compact32"), ("compact32_copy_fitted", "compact32"),
    ("compact32_retrieve2_copy", "compact32_retrieve2"),
)  # fmt: skip


def measured(paths: Sequence[Path], count: int, index: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Figures of several files by document, `[count]` each.

    Args:
        paths: of shards and of other measurements on the same rows.
        count: documents, or those of `index`.
        index: documents in their order; all by default.

    Raises:
        InputError: a figure was measured twice, or a document is not among those expected.
    """
    place = {int(document): n for n, document in enumerate(range(count) if index is None else index)}
    found: dict[str, np.ndarray] = {}
    for path in paths:
        arrays = load_file(path)
        documents = arrays.pop("documents")
        if any(int(document) not in place for document in documents):
            raise InputError(f"{path}: expected documents of 0 to {count - 1}, got {documents.max()}")
        rows = np.array([place[int(document)] for document in documents], np.int64)
        for key, values in arrays.items():
            whole = found.setdefault(key, np.full(count, np.nan, np.float32))
            there = np.isfinite(values)
            if np.isfinite(whole[rows[there]]).any():
                raise InputError(f"{path}: {key} was measured twice")
            whole[rows[there]] = values[there]
    return found


class Bootstrap:
    """`eval.statistics.clustered_interval` for many figures at once: the same draws as counts `[1 + draws, D]`."""

    def __init__(self, groups: Sequence[str], seed: int, draws: int):
        names = sorted(set(groups))
        number = {name: i for i, name in enumerate(names)}
        member = np.array([number[group] for group in groups])
        generator = np.random.default_rng(seed)
        drawn = [
            np.bincount(generator.integers(0, len(names), len(names)), minlength=len(names)) for _ in range(draws)
        ]
        self.counts = np.concatenate(
            [np.ones((1, len(member))), np.stack(drawn)[:, member]]
        )  # the sample itself first

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Values `[D]` to their sum in each draw, the sample itself first."""
        return self.counts @ np.asarray(values, np.float64)


def interval(key: str, draws: np.ndarray) -> dict[str, float]:
    """A figure and its 95% interval from `[1 + draws]`, the sample itself first."""
    usable = draws[1:][np.isfinite(draws[1:])]
    low, high = np.quantile(usable, [0.025, 0.975]) if len(usable) else (math.nan, math.nan)
    return {key: float(draws[0]), f"{key}.lo": float(low), f"{key}.hi": float(high)}


def difference(key: str, draws: np.ndarray) -> dict[str, float]:
    """`<key>.{mean,lo,hi}` from `[1 + draws]`, the sample itself first."""
    found = interval(key, draws)
    return {f"{key}.mean": found.pop(key), **found}


class SetFigures:
    """Figures of one set and chunk count, over the documents that all of some arms were read on.

    Args:
        arrays: `[D]` by key without the chunk count.
        records: of the documents.
        lines: `[D]`, whole lines of each.
        scored: tokens of each.
        seed: of the bootstrap.
        draws: bootstrap samples.
    """

    def __init__(
        self, arrays: dict[str, np.ndarray], records: Sequence[Record], lines: np.ndarray, scored: int, seed: int,
        draws: int,
    ):  # fmt: skip
        self.arrays, self.records, self.lines, self.scored = arrays, records, lines, scored
        self.seed, self.draws = seed, draws
        self._bootstraps: dict[tuple[int, ...], Bootstrap] = {}

    def documents(self, *arms: str) -> np.ndarray:
        """Numbers of the documents that were read by all of some arms, and by window and full."""
        there = [np.isfinite(self.arrays[f"{arm}.loss"]) for arm in (*arms, "window", "full")]
        return np.flatnonzero(np.logical_and.reduce(there))

    def bootstrap(self, rows: np.ndarray) -> Bootstrap:
        """Draws of some documents."""
        key = tuple(rows.tolist())
        if key not in self._bootstraps:
            groups = [self.records[i].cluster for i in rows]
            self._bootstraps[key] = Bootstrap(groups, self.seed, self.draws)
        return self._bootstraps[key]

    def domains(self, rows: np.ndarray) -> list[str]:
        """Domains of prose with enough documents in which full history is worth something; none for code."""
        of = np.array([self.records[i].domain for i in rows])
        worth = (self.arrays["window.loss"] - self.arrays["full.loss"])[rows]
        names = sorted(set(of.tolist()) - {"code"})
        fewest = min(FEWEST, max((int((of == name).sum()) for name in names), default=0))
        return [name for name in names if (of == name).sum() >= fewest and worth[of == name].mean() >= LEAST_WORTH]

    def gain(self, arm: str, base: str, rows: np.ndarray, domains: Sequence[str]) -> np.ndarray:
        """HGR of an arm over a base in the sample and in each draw; with domains, the mean of theirs."""
        boot, losses = self.bootstrap(rows), {a: self.arrays[f"{a}.loss"][rows] for a in (arm, base, "window", "full")}
        gained, worth = losses[base] - losses[arm], losses["window"] - losses["full"]
        if not domains:
            return boot.sums(gained) / boot.sums(worth)
        of = np.array([self.records[i].domain for i in rows])
        ratios = []
        for domain in domains:
            here = of == domain
            with np.errstate(divide="ignore", invalid="ignore"):
                ratios.append(boot.sums(gained * here) / boot.sums(worth * here))
        return np.nanmean(np.where(np.isfinite(ratios), ratios, np.nan), axis=0)

    def lines_share(self, arm: str, rows: np.ndarray) -> np.ndarray:
        """Share of whole lines that are right, in the sample and in each draw."""
        boot = self.bootstrap(rows)
        with np.errstate(invalid="ignore"):  # a draw without a whole line says nothing
            return boot.sums(self.arrays[f"{arm}.lines"][rows]) / boot.sums(self.lines[rows])

    def of_arm(self, arm: str) -> dict[str, float]:
        """Its figures, keys with the arm's name; nothing where it was not read."""
        rows = self.documents(arm)
        if not len(rows):
            return {}
        out: dict[str, float] = {}
        if len(rows) < len(self.documents()):
            out[f"{arm}.documents"] = len(rows)
        out[f"{arm}.slots"] = float(self.arrays[f"{arm}.slots"][rows].mean())
        out[f"{arm}.loss"] = float(self.arrays[f"{arm}.loss"][rows].mean())
        names = self.domains(rows)
        out |= interval(f"{arm}.hgr", self.gain(arm, "window", rows, names))
        if names:
            out |= interval(f"{arm}.ratio", self.gain(arm, "window", rows, []))
        out |= interval(f"{arm}.lines", self.lines_share(arm, rows))
        out[f"{arm}.greedy"] = float(self.arrays[f"{arm}.right"][rows].mean() / self.scored)
        out[f"{arm}.worst_document"] = float((self.arrays["window.loss"] - self.arrays[f"{arm}.loss"])[rows].min())
        return out

    def of_pair(self, arm: str, other: str) -> dict[str, float]:
        """Paired differences of an arm and another one."""
        rows = self.documents(arm, other)
        if not len(rows):
            return {}
        found = difference(f"diff.{arm}.{other}", self.gain(arm, other, rows, self.domains(rows)))
        return found | difference(
            f"linesdiff.{arm}.{other}", self.lines_share(arm, rows) - self.lines_share(other, rows)
        )

    def of_domains(self) -> dict[str, float]:
        """HGR and lines of every arm, by domain of prose."""
        out: dict[str, float] = {}
        of = np.array([record.domain for record in self.records])
        arms = [key.removesuffix(".loss") for key in self.arrays if key.endswith(".loss")]
        for domain in sorted(set(of.tolist()) - {"code"}):
            both = int((of[self.documents()] == domain).sum())
            if both >= 2:
                out[f"{domain}.documents"] = both
            for arm in arms:
                rows = np.array([i for i in self.documents(arm) if of[i] == domain], np.int64)
                if len(rows) < 2:
                    continue
                out[f"{domain}.{arm}.loss"] = float(self.arrays[f"{arm}.loss"][rows].mean())
                out |= interval(f"{domain}.{arm}.hgr", self.gain(arm, "window", rows, []))
        return out


def metrics(arrays: dict[str, np.ndarray], rows: Rows, seed: int, draws: int = 2000) -> dict[str, float]:
    """All figures of a set by dotted key, `n<chunks>.<arm>.<figure>`.

    Args:
        arrays: from `measured`.
        rows: of the set.
        seed: of the bootstrap.
        draws: bootstrap samples.

    Raises:
        InputError: neither window nor full history was read.
    """
    counts = sorted({int(key[1:].partition(".")[0]) for key in arrays})
    whole = rows.lines.max(1, initial=-1).astype(np.int64) + 1
    out: dict[str, float] = {}
    for count in counts:
        own = {key.partition(".")[2]: values for key, values in arrays.items() if key.startswith(f"n{count}.")}
        if "window.loss" not in own or "full.loss" not in own:
            raise InputError(f"n{count}: expected the arms window and full beside the others, got neither or one")
        figures = SetFigures(own, rows.records, whole, rows.shape.target, seed, draws)
        both = figures.documents()
        found: dict[str, float] = {
            "documents": len(both),
            "clusters": len({rows.records[i].cluster for i in both}),
            "lines": int(whole[both].sum()),
        }
        found |= {f"loss.{arm}": float(own[f"{arm}.loss"][both].mean()) for arm in ("window", "full")}
        if domains := figures.domains(both):
            found["domains"] = len(domains)
        for key in own:
            if key.endswith(".loss"):
                found |= figures.of_arm(key.removesuffix(".loss"))
        for arm, other in DIFFERENCES:
            if f"{arm}.loss" in own and f"{other}.loss" in own:
                found |= figures.of_pair(arm, other)
        out |= {f"n{count}.{key}": value for key, value in found.items()}
        for key, value in figures.of_domains().items():
            domain, _, rest = key.partition(".")
            out[f"{domain}.n{count}.{rest}"] = value
    return out


def table(found: dict[str, float]) -> str:
    """HGR, lines, slots and loss of every arm, a line each."""
    lines = []
    for key, value in found.items():
        if key.endswith(".hgr") and f"{key.removesuffix('.hgr')}.slots" in found:
            arm = key.removesuffix(".hgr")
            low, high = found.get(f"{key}.lo", math.nan), found.get(f"{key}.hi", math.nan)
            lines.append(
                f"{arm:44} {value:7.3f} [{low:6.3f}, {high:6.3f}] lines {100 * found[f'{arm}.lines']:5.1f} "
                f"{found[f'{arm}.slots']:7.0f} slots, loss {found[f'{arm}.loss']:.4f}"
            )
    return "\n".join(lines)
