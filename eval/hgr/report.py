"""What the HGR measurement says: ratios, differences and their intervals from the losses of documents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from eval.arrays import joined_arrays
from eval.documents import Record, Windows
from eval.hgr.arms import ARMS, GREEDY, KVPRESS, Layout
from hf_crouter.errors import InputError


@dataclass(frozen=True, eq=False)
class Losses:
    """A set's figures: arrays `[D, ...]` by key, and what is known of each document."""

    arrays: dict[str, np.ndarray]
    records: list[Record]

    def take(self, rows: np.ndarray) -> Losses:
        """Some of the documents."""
        arrays = {key: values[rows] for key, values in self.arrays.items()}
        return Losses(arrays, [self.records[i] for i in rows])


def losses_of(folder: Path, name: str, data: Path) -> Losses:
    """Joins what the shards wrote for a set, in the order of its documents, with what was measured beside it.

    That is what `eval.hgr.kvpress_arms` wrote, and arms that were collected by themselves (`--arms`).

    Raises:
        InputError: there is nothing, or a figure was measured twice.
    """
    files = [load_file(path) for path in sorted((folder / "losses").glob(f"{name}.[0-9]*of*.safetensors"))]
    if not files:
        raise InputError(f"{folder}: no losses of {name}; run the stage `collect`")
    arrays = joined_arrays(files)
    _, rows = np.unique(arrays["documents"], return_index=True)
    arrays = {key: values[rows] for key, values in arrays.items()}
    more: dict[str, list[dict[str, np.ndarray]]] = {}  # by what was measured
    for path in sorted((folder / "losses").glob(f"{name}.[a-z]*.*of*.safetensors")):
        more.setdefault(path.name.split(".")[1], []).append(load_file(path))
    for files in more.values():
        other = joined_arrays(files)
        place = {int(document): row for row, document in enumerate(other["documents"])}
        some = [(i, place[int(d)]) for i, d in enumerate(arrays["documents"]) if int(d) in place]
        ours, theirs = np.array(some, np.int64).reshape(-1, 2).T
        for key, values in other.items():
            if key == "documents":
                continue
            none = -1 if values.dtype.kind == "i" else np.nan
            mine = arrays.setdefault(key, np.full((len(rows), *values.shape[1:]), none, values.dtype))
            free = ours[(mine[ours] == none if none == -1 else np.isnan(mine[ours])).reshape(len(ours), -1).all(1)]
            if len(free) < len(ours):
                raise InputError(f"{folder}: {name}.{key} was measured twice on {len(ours) - len(free)} documents")
            mine[ours] = values[theirs]
    records = Windows.load(data, name).records
    return Losses(arrays, [records[i] for i in arrays["documents"]])


class Bootstrap:
    """`eval.statistics.clustered_interval` for many figures at once: the same draws as counts `[draws, D]`."""

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
    low, high = np.quantile(draws[1:], [0.025, 0.975]) if np.isfinite(draws).all() else (math.nan, math.nan)
    return {key: float(draws[0]), f"{key}.lo": float(low), f"{key}.hi": float(high)}


def difference(arm: str, other: str, draws: np.ndarray) -> dict[str, float]:
    """`diff.<arm>.<other>.{mean,lo,hi}` from `[1 + draws]`, the sample itself first."""
    key = f"diff.{arm}.{other}"
    found = interval(key, draws)
    return {f"{key}.mean": found.pop(key), **found}


BESIDE_BM25 = {"soft_retrieve2_copy", "soft_retrieve2_learned_copy"}  # held against BM25's choice
FEWEST = 8  # documents of a domain below which its own ratio says nothing
LEAST_WORTH = 0.01  # nats/token that full history must be worth in a domain for a ratio to say something


def gain_ratio(
    losses: Losses, arm: str, base: str, n: int, bootstrap: Bootstrap, domains: Sequence[str]
) -> np.ndarray:
    """HGR of an arm over a base in the sample and in each draw; with domains, the mean of theirs."""
    window, full = losses.arrays[f"n{n}.window"], losses.arrays[f"n{n}.full"]
    gain = losses.arrays[f"n{n}.{base}"] - losses.arrays[f"n{n}.{arm}"]
    if not domains:
        return bootstrap.sums(gain) / bootstrap.sums(window - full)
    of = np.array([record.domain for record in losses.records])
    ratios = []
    for domain in domains:
        here = of == domain
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios.append(bootstrap.sums(gain * here) / bootstrap.sums((window - full) * here))
    return np.nanmean(np.where(np.isfinite(ratios), ratios, np.nan), axis=0)


def usable_domains(losses: Losses, n: int) -> list[str]:
    """Domains of prose with enough documents in which full history is worth something; none for code."""
    of = np.array([record.domain for record in losses.records])
    worth = losses.arrays[f"n{n}.window"] - losses.arrays[f"n{n}.full"]
    names = sorted(set(of.tolist()) - {"code"})
    fewest = min(FEWEST, max((int((of == name).sum()) for name in names), default=0))
    return [name for name in names if (of == name).sum() >= fewest and worth[of == name].mean() >= LEAST_WORTH]


def set_metrics(losses: Losses, n: int, seed: int, draws: int, layout: Layout) -> dict[str, float]:
    """Figures of one set and chunk count, keys without set and count."""
    out: dict[str, float] = {"documents": len(losses.records)}
    bootstrap = Bootstrap([record.cluster for record in losses.records], seed, draws)
    domains = usable_domains(losses, n)
    if domains:
        out["domains"] = len(domains)  # over which ratios are averaged
    keys = [
        key.split(".", 1)[1]
        for key, values in losses.arrays.items()
        if key.startswith(f"n{n}.") and values.ndim == 1 and not key.endswith((".tra", ".right"))
    ]
    owner = {key: name for name, arm in ARMS.items() for key in (name, *(r[0] for r in arm.readings))}
    owner |= {"retrieve2_oracle": "retrieve2_bm25", "retrieve2_oracle_copy_fitted": "retrieve2_bm25"}
    owner |= {"full_kvpress": "full"}
    owner |= {f"{method}.at8": "longer_same_slots" for method in KVPRESS}
    owner |= {f"{method}.at8_retrieve2": "longer_same_slots_retrieve2" for method in KVPRESS}
    for key in keys:
        arm = ARMS[owner[key]]
        values = losses.arrays[f"n{n}.{key}"]
        part, boot, names = losses, bootstrap, domains
        if np.isnan(values).any():  # measured on some of the documents
            part = losses.take(np.flatnonzero(~np.isnan(values)))
            if not len(part.records):
                continue
            boot = Bootstrap([record.cluster for record in part.records], seed, draws)
            names = usable_domains(part, n)
            out[f"{key}.documents"] = len(part.records)
            if names:
                out[f"{key}.domains"] = len(names)
        out[f"{key}.slots"] = arm.slots(layout, n)
        out[f"{key}.loss"] = float(part.arrays[f"n{n}.{key}"].mean())
        out |= interval(f"{key}.hgr", gain_ratio(part, key, "window", n, boot, names))
        if names:
            out |= interval(f"{key}.ratio", gain_ratio(part, key, "window", n, boot, []))
        if key in BESIDE_BM25:
            other = "soft_retrieve2_bm25_copy"
            out |= difference(key, other, gain_ratio(part, key, other, n, boot, names))
        retrieves = arm.retrieve or arm.longer == "retrieve"
        base = "longer_same_slots_retrieve2_copy_fitted" if retrieves else "longer_same_slots_copy_fitted"
        if key not in ("window", "full", "full_copy", "full_copy_fitted", base) and base in keys:
            out |= difference(key, base, gain_ratio(part, key, base, n, boot, names))
    for name in ("window", "full"):
        out[f"loss.{name}"] = out[f"{name}.loss"]
    out |= difference("soft", "shuffled", gain_ratio(losses, "soft", "shuffled", n, bootstrap, domains))
    out["tra"] = float(losses.arrays[f"n{n}.tra"].mean())
    for key in GREEDY:
        if f"n{n}.{key}.right" in losses.arrays:
            out[f"{key}.accuracy"] = float(losses.arrays[f"n{n}.{key}.right"].mean())
    if f"n{n}.retrieve2_bm25.chunks" in losses.arrays:
        same = losses.arrays[f"n{n}.retrieve2_bm25.chunks"] == losses.arrays[f"n{n}.retrieve2_last.chunks"]
        out["retrieve2_bm25_is_last"] = float(same.all(1).mean())
    out["copy.worst_document"] = float((losses.arrays[f"n{n}.window"] - losses.arrays[f"n{n}.copy"]).min())
    return out


def detail_metrics(losses: Losses, n: int, seed: int, draws: int) -> tuple[dict[str, float], dict[str, float]]:
    """HGR of copying by thirds of repetition (keys behind set and count), and by domain (keys behind the set)."""
    thirds, by_domain = {}, {}
    order = np.argsort([record.repetition for record in losses.records], kind="stable")
    for third, rows in enumerate(np.array_split(order, 3), 1):
        part = losses.take(rows)
        if not len(rows):
            continue
        boot = Bootstrap([record.cluster for record in part.records], seed, draws)
        for key in ("copy", "soft_retrieve2_copy"):
            if f"n{n}.{key}" in part.arrays:
                thirds |= interval(f"{key}.third{third}.hgr", gain_ratio(part, key, "window", n, boot, []))
        thirds[f"third{third}.repetition"] = float(np.mean([record.repetition for record in part.records]))
    of = np.array([record.domain for record in losses.records])
    for domain in sorted(set(of.tolist()) - {"code"}):
        part = losses.take(np.flatnonzero(of == domain))
        boot = Bootstrap([record.cluster for record in part.records], seed, draws)
        key = f"{domain}.n{n}"
        gain = part.arrays[f"n{n}.window"] - part.arrays[f"n{n}.copy"]
        by_domain |= {f"{key}.documents": len(part.records), f"{key}.copy.worst_document": float(gain.min())}
        by_domain |= {f"{key}.loss.{arm}": float(part.arrays[f"n{n}.{arm}"].mean()) for arm in ("window", "full")}
        by_domain[f"{key}.copy.loss"] = float(part.arrays[f"n{n}.copy"].mean())
        for arm in ("copy", "copy_fitted", "copy_rebuilt", "copy_rebuilt_fitted", "soft_retrieve2_copy"):
            if f"n{n}.{arm}" in part.arrays:
                by_domain |= interval(f"{key}.{arm}.hgr", gain_ratio(part, arm, "window", n, boot, []))
    return thirds, by_domain


def metrics(
    sets: dict[str, Losses], counts: Sequence[int], seed: int, draws: int = 2000, slots: Layout | None = None
) -> dict[str, float]:
    """All figures by dotted key.

    Args:
        sets: losses by the set's name.
        counts: of chunks.
        seed: of the bootstrap.
        draws: bootstrap samples.
        slots: the rows' layout.
    """
    layout, out = slots or Layout(), {}
    for name, losses in sets.items():
        for n in counts:
            found = set_metrics(losses, n, seed, draws, layout)
            out |= {f"{name}.n{n}.{key}": value for key, value in found.items()}
        thirds, by_domain = detail_metrics(losses, max(counts), seed, draws)
        out |= {f"{name}.n{max(counts)}.{key}": value for key, value in thirds.items()}
        out |= {f"{name}.{key}": value for key, value in by_domain.items()}
    return out


def table(found: dict[str, float]) -> str:
    """HGR, slots and loss of every arm, a line each."""
    lines = []
    for key, value in found.items():
        if key.endswith(".hgr"):
            arm = key.removesuffix(".hgr")
            low, high = found.get(f"{key}.lo", math.nan), found.get(f"{key}.hi", math.nan)
            line = f"{arm:48} {value:7.3f} [{low:6.3f}, {high:6.3f}]"
            if f"{arm}.slots" in found:
                line += f" {found[f'{arm}.slots']:6.0f} slots, loss {found[f'{arm}.loss']:.4f}"
            lines.append(line)
    return "\n".join(lines)
