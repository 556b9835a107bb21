"""History gain recovered on a real host: soft prompts, copying and recall beside windows of the same slots.

Two stages. `collect` (accelerator) records passes on the gate sets, fits the gates, and writes the loss of every
document, arm and chunk count; it can be split over processes (`--shard i/k`) that wait for each other's files.
`report` (CPU) turns these losses into `hgr.json`. Rows are those of `eval.documents`; fewer chunks are the latest
ones. An arm is what the host reads; its archive is what is older than its raw window.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from torch import nn

from eval.documents import CHUNK, CHUNKS, EVALUATION, PREFIX, SCORED, WINDOW, Record, Windows, place
from eval.results import write_result
from hf_crouter.archive.copying import (
    Candidates,
    Gate,
    GateConfig,
    HostView,
    collect,
    gate_features,
)
from hf_crouter.archive.store import ORDERS, Archive
from hf_crouter.errors import InputError
from hf_crouter.host.fingerprint import host_fingerprint
from hf_crouter.host.projector import Projector, display_name, find_projector
from hf_crouter.loading import load_crouter, load_host
from hf_crouter.storage import replaced_file
from hf_crouter.training.align import compressed_logits
from hf_crouter.training.gate import fit_gate, fit_weights, mixture_log_likelihood

GATE_SETS = ("gate_code", "gate_prose")
QUERY = 128  # last tokens of the window that BM25 looks for
DENSE = 2048  # places whose whole distribution is held in float32 at once
NOTES = (
    "Host: SmolLM2-135M-Instruct, 4-bit weights in bf16. hgr: share of what full history is worth over the window "
    "(a ratio of means; for prose the mean of the domains' ratios, and .ratio over all documents); intervals: paired "
    "bootstrap clustered by package, or by record of prose. .diff: hgr minus that of recent_same_slots_copy, for arms "
    "with raw recalled chunks minus that of recent_same_slots_recall_copy. Recall arms hold no soft prompts; all and "
    "soft_recall2 do. recall2 is bm25_2, streaming is recent_same_slots. Every *_copy arm has a gate fitted on the "
    "gate sets to what that arm reads; *_pooled share one gate, *_generic one that does not see the host. oracle2: "
    "the best pair by the target's loss, on fewer documents (.documents), over which window and full are taken too."
)


@dataclass(frozen=True)
class Layout:
    """Where what stands in a row `[prefix | chunks | window | target]`, in tokens.

    Attributes:
        prefix: raw tokens at the start.
        chunk: of a chunk.
        chunks: older chunks.
        window: raw tokens before the target.
        target: tokens that are scored.
        latents: soft prompts of a chunk.
        recalled: chunks that a recall arm reads.
    """

    prefix: int = PREFIX
    chunk: int = CHUNK
    chunks: int = CHUNKS
    window: int = WINDOW
    target: int = SCORED
    latents: int = 8
    recalled: int = 2

    @property
    def old(self) -> int:
        """End of the chunks."""
        return self.prefix + self.chunks * self.chunk

    @property
    def split(self) -> int:
        """End of the window."""
        return self.old + self.window

    @property
    def length(self) -> int:
        """Of a row."""
        return self.split + self.target

    def moved(self, by: int) -> Layout:
        """With window and target `by` chunks earlier, and so many chunks fewer."""
        return replace(self, chunks=self.chunks - by)

    def extra(self, kind: str, count: int) -> int:
        """Tokens by which a raw window is longer: `""`, `soft`, `recall` (as many slots as those take), `full`."""
        if kind == "full":
            return count * self.chunk
        return {"": 0, "soft": count * self.latents, "recall": count * self.latents + self.recalled * self.chunk}[kind]

    def past(self, row: np.ndarray, count: int, extra: int = 0) -> np.ndarray:
        """What of the last `count` chunks a window that is `extra` tokens longer does not hold."""
        return row[self.old - count * self.chunk : self.old - extra]

    def raw(self, row: np.ndarray, extra: int = 0, chunks: Sequence[int] = ()) -> np.ndarray:
        """Recalled chunks, by their number in the row, in order, then the longer window and all but the last target.

        Args:
            row: `[length]`.
            extra: tokens by which the window is longer.
            chunks: numbers of recalled chunks, 0 the oldest of the row.
        """
        starts = [self.prefix + c * self.chunk for c in sorted(chunks)]
        recalled = [row[s : s + self.chunk] for s in starts]
        return np.concatenate([*recalled, row[self.old - extra : self.length - 1]])


@dataclass(frozen=True)
class Arm:
    """What a host reads.

    Attributes:
        soft: whose soft prompts: `""` nobody's, `own`, `other`.
        longer: by what the raw window is longer, as in `Layout.extra`.
        recall: which chunks are raw again: `last2`, `bm25_2`, `random2`.
        readings: name of each variant with copying, and what it copies from: `past` or `rebuilt`.
    """

    soft: str = ""
    longer: str = ""
    recall: str = ""
    readings: tuple[tuple[str, str, str], ...] = ()  # key, archive, gate

    def slots(self, layout: Layout, count: int) -> int:
        """Positions before the target."""
        recalled = layout.recalled * layout.chunk if self.recall else 0
        soft = count * layout.latents if self.soft else 0
        return layout.prefix + soft + recalled + layout.extra(self.longer, count) + layout.window

    def exists(self, layout: Layout, count: int) -> bool:
        """Whether recalling is less than reading everything."""
        return count > layout.recalled or not (self.recall or self.longer == "recall")


def _own(key: str, archive: str = "past") -> tuple[str, str, str]:
    return key, archive, key


ARMS = {
    "window": Arm(readings=(_own("copy"), ("copy_pooled", "past", "pooled"), ("copy_generic", "past", "generic"),
                            ("nine", "past", "nine"), _own("copy_rebuilt", "rebuilt"),
                            ("copy_rebuilt_pooled", "rebuilt", "pooled"),
                            ("copy_rebuilt_generic", "rebuilt", "generic"))),
    "soft": Arm("own", readings=(_own("soft_copy"), ("soft_copy_pooled", "past", "pooled"),
                                 _own("soft_copy_rebuilt", "rebuilt"))),
    "shuffled": Arm("other"),
    "recent_same_slots": Arm(longer="soft", readings=(_own("recent_same_slots_copy"),)),
    "recent_same_slots_recall": Arm(longer="recall", readings=(_own("recent_same_slots_recall_copy"),)),
    "last2": Arm(recall="last2", readings=(_own("last2_copy"),)),
    "bm25_2": Arm(recall="bm25_2", readings=(_own("recall2_copy"), ("recall2_copy_pooled", "past", "pooled"))),
    "random2": Arm(recall="random2", readings=(_own("random2_copy"),)),
    "soft_recall2": Arm("own", recall="bm25_2", readings=(_own("all"), ("all_pooled", "past", "pooled"))),
    "full": Arm(longer="full", readings=(_own("full_copy"), ("full_copy_pooled", "past", "pooled"))),
}  # fmt: skip
SOURCES = {key: (name, archive) for name, arm in ARMS.items() for key, archive, gate in arm.readings if key == gate
           and key != "nine"}  # fmt: skip
POOLED = ("copy", "copy_rebuilt", "soft_copy", "soft_copy_rebuilt", "recall2_copy", "all", "full_copy")
GATES = (*SOURCES, "pooled", "generic", "nine")
GREEDY = ("window", "copy", "all", "full")
ALIASES = {"recall2": "bm25_2", "streaming": "recent_same_slots"}


class NineWeights(nn.Module):
    """The simplest gate: one weight for each order, that of the longest one with candidates."""

    def __init__(self):
        super().__init__()
        self.logit = nn.Parameter(torch.full((len(ORDERS),), -4.0))

    def forward(self, features: torch.Tensor, available: torch.Tensor) -> torch.Tensor:
        """Available orders `[N, K]` to log-weights `[N, 1 + K]`, the host's first."""
        longest = available.int().cumsum(1).argmax(1)
        weights = features.new_full((len(available), 1 + len(ORDERS)), -math.inf, dtype=torch.float32)
        some = available.any(1)
        logit = self.logit[longest]
        own = torch.where(some, nn.functional.logsigmoid(-logit), 0.0)
        copied = torch.where(some, nn.functional.logsigmoid(logit), -math.inf)
        return weights.scatter(1, longest[:, None] + 1, copied[:, None]).index_copy(
            1, torch.zeros(1, dtype=torch.long, device=weights.device), own[:, None]
        )


def bm25(query: np.ndarray, chunks: Sequence[np.ndarray], k1: float = 1.2, b: float = 0.75) -> np.ndarray:
    """Scores `[chunks]` of token ids against the distinct ids of a query (Robertson and Zaragoza, 2009)."""
    terms = np.unique(query)
    counts = np.stack([(chunk[:, None] == terms).sum(0) for chunk in chunks]).astype(np.float64)
    having = (counts > 0).sum(0)
    weight = np.log1p((len(chunks) - having + 0.5) / (having + 0.5))
    sizes = np.array([len(chunk) for chunk in chunks], np.float64)
    norm = k1 * (1 - b + b * sizes / sizes.mean())
    return (weight * counts * (k1 + 1) / (counts + norm[:, None])).sum(1)


def recalled(layout: Layout, row: np.ndarray, count: int, how: str, seed: int) -> tuple[int, ...]:
    """Numbers of the chunks that an arm recalls, ascending, 0 the oldest of the row."""
    first = layout.chunks - count
    if how == "last2":
        return tuple(range(layout.chunks - layout.recalled, layout.chunks))
    if how == "random2":
        generator = np.random.default_rng([seed, count, *row[: layout.prefix + 8].tolist()])
        return tuple(sorted((first + generator.permutation(count)[: layout.recalled]).tolist()))
    old = layout.past(row, count).reshape(count, layout.chunk)
    scores = bm25(row[layout.split - min(QUERY, layout.window) : layout.split], list(old))
    best = np.argsort(-scores, kind="stable")[: layout.recalled]
    return tuple(sorted((first + best).tolist()))


def partners(records: Sequence[Record], seed: int) -> np.ndarray:
    """For every document another one: of its package or domain where there is one, else of the set."""
    names = [record.cluster if record.domain == "code" else record.domain for record in records]
    order = sorted(range(len(records)), key=lambda i: (names[i], place(seed, records[i].name)))
    partner = np.empty(len(records), np.int64)
    for _, members in itertools.groupby(order, key=lambda i: names[i]):
        group = list(members)
        for i, other in zip(group, [*group[1:], group[0]], strict=True):
            partner[i] = other
    alone = np.flatnonzero(partner == np.arange(len(records)))
    partner[alone] = (alone + 1) % len(records)
    return partner


# What the archives propose: found by a pool of processes, in arrays that travel well.


class Search(NamedTuple):
    """Work of one process: a row, the archives to search, and whose continuation is asked for."""

    layout: Layout
    row: np.ndarray
    rebuilt: tuple[np.ndarray, np.ndarray] | None  # ids and confidence `[chunks · chunk]`
    archives: tuple[tuple[int, str], ...]  # chunk count, and a kind of `Layout.extra` or "rebuilt"
    vocab_size: int
    stop_ids: frozenset[int]


def search(work: Search) -> dict[tuple[int, str], dict[str, np.ndarray]]:
    """Candidates of every target position for each archive, in small types."""
    layout, row = work.layout, work.row
    tail = layout.length  # nothing is sorted: these archives are small
    found = {}
    for count, kind in work.archives:
        archive = Archive.empty(work.vocab_size, work.stop_ids, tail_limit=tail)
        if kind == "rebuilt":
            assert work.rebuilt is not None
            ids, confidence = (values[-count * layout.chunk :] for values in work.rebuilt)
            archive = archive.extended(ids, confidence)
        else:
            archive = archive.extended(layout.past(row, count, layout.extra(kind, count)))
        ends = range(layout.split, layout.length)
        candidates = collect([archive.match(row[max(0, end - 64) : end]) for end in ends])
        small = {"places": np.int16, "orders": np.int8, "tokens": np.int32, "best": np.int32}
        found[count, kind] = {
            name: value.numpy().astype(small.get(name, value.numpy().dtype))
            for name, value in vars(candidates).items()
        }
    return found


def joined(parts: Sequence[dict[str, np.ndarray]], places: int, device: torch.device | str) -> Candidates:
    """Candidates of several rows of `places` each as those of one text."""
    entries = [len(part["tokens"]) for part in parts]
    first = np.concatenate([[0], np.cumsum(entries)])
    arrays = {
        "places": np.concatenate([part["places"].astype(np.int64) + i * places for i, part in enumerate(parts)]),
        "best": np.concatenate([part["best"].astype(np.int64) + first[i] for i, part in enumerate(parts)]),
    }
    for name in ("orders", "tokens", "probabilities", "available", "features"):
        arrays[name] = np.concatenate([part[name] for part in parts])
    tensors = {name: torch.from_numpy(values).to(device) for name, values in arrays.items()}
    for name in ("orders", "tokens"):
        tensors[name] = tensors[name].long()
    return Candidates(**tensors)


def _one_thread() -> None:
    torch.set_num_threads(1)


class Searchers:
    """`search` on so many processes, or at once where there are none; made before an accelerator is touched."""

    def __init__(self, workers: int):
        context = multiprocessing.get_context("fork")
        self.pool = context.Pool(workers, initializer=_one_thread) if workers else None

    def __enter__(self) -> Searchers:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.pool:
            self.pool.terminate()

    def submit(self, work: Search) -> Callable[[], dict]:
        """Returns what waits for the candidates."""
        if self.pool is None:
            found = search(work)
            return lambda: found
        return self.pool.apply_async(search, (work,)).get


# The host's passes.


@dataclass(frozen=True, eq=False)
class Places:
    """What a host says at N positions; what a gate needs comes from here.

    Attributes:
        scores: `[N, V]`, logits.
        targets: `[N]`.
        normaliser: `[N]`, the logits' log-sum-exp.
        best: `[N]`, highest log-probability.
        token: `[N]`, the token that has it.
        entropy: `[N]`, nats.
        host: `[N]`, log-probability of the target.
    """

    scores: torch.Tensor
    targets: torch.Tensor
    normaliser: torch.Tensor
    best: torch.Tensor
    token: torch.Tensor
    entropy: torch.Tensor
    host: torch.Tensor

    @classmethod
    def read(cls, scores: torch.Tensor, targets: torch.Tensor) -> Places:
        """From logits `[N, V]` and targets `[N]`; what `view_host` reads, in fewer and larger steps."""
        parts = []
        for part in scores.split(DENSE):
            normaliser = part.float().logsumexp(-1)
            part = part.float() - normaliser[:, None]
            best, token = part.max(-1)
            parts.append((normaliser, best, token, -(part.exp() * part).sum(-1)))
        normaliser, best, token, entropy = (torch.cat(values) for values in zip(*parts, strict=True))
        host = scores.gather(1, targets[:, None])[:, 0].float() - normaliser
        return cls(scores, targets, normaliser, best, token, entropy, host)

    def beside(self, candidates: Candidates) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Features `[N, F]`, available orders `[N, K]`, and each order's probability of the target `[N, K]`."""
        at = self.scores[candidates.places, candidates.tokens].float() - self.normaliser[candidates.places]
        features = gate_features(candidates, HostView(at, self.best, self.token, self.entropy))
        hit = self.targets[candidates.places] == candidates.tokens
        copied = torch.zeros(candidates.available.numel(), device=at.device)
        copied.index_add_(0, candidates.places * len(ORDERS) + candidates.orders, candidates.probabilities * hit)
        return features, candidates.available, copied.view_as(candidates.available)

    def greedy(self, candidates: Candidates, weights: torch.Tensor) -> torch.Tensor:
        """The mixture's most probable token, `[N]`.

        Args:
            candidates: of these places.
            weights: `[N, 1 + K]`, log-weights.
        """
        width = self.scores.shape[1]
        added = weights[candidates.places, candidates.orders + 1].exp() * candidates.probabilities
        choice = []
        for start in range(0, len(self.scores), DENSE):
            part = self.scores[start : start + DENSE].float() - self.normaliser[start : start + DENSE, None]
            part = (part + weights[start : start + DENSE, :1]).exp()
            low, high = torch.searchsorted(
                candidates.places, torch.tensor([start, start + len(part)], device=part.device)
            ).tolist()
            cells = (candidates.places[low:high] - start) * width + candidates.tokens[low:high]
            choice.append(part.flatten().index_add_(0, cells, added[low:high]).view_as(part).argmax(-1))
        return torch.cat(choice)


@dataclass(eq=False)
class Block:
    """Some documents on their way.

    Attributes:
        index: `[D]`, their numbers in the set.
        rows: `[D, length]`, int64.
        soft: soft prompts `[D, chunks · latents, H]` of their own and of their partners' chunks.
        tra: `[D, chunks]`, share of tokens that the crouter rebuilds.
        waiting: for the candidates of each document.
    """

    index: np.ndarray
    rows: np.ndarray
    soft: dict[str, torch.Tensor]
    tra: np.ndarray
    waiting: list[Callable[[], dict]]
    found: list[dict] = field(default_factory=list)
    kept: dict[tuple[int, str], Candidates] = field(default_factory=dict)  # of the whole block: most arms share them

    def candidates(self, documents: Sequence[int], count: int, kind: str, places: int, device: Any) -> Candidates:
        """Of some documents of the block, which may come more than once; `places` of each."""
        if not self.found:
            self.found = [wait() for wait in self.waiting]
        whole = list(documents) == list(range(len(self.rows)))
        if whole and (count, kind) in self.kept:
            return self.kept[count, kind]
        candidates = joined([self.found[i][count, kind] for i in documents], places, device)
        if whole:
            self.kept[count, kind] = candidates
        return candidates


class Reader:
    """A host, a crouter and the projector between them, and the passes of the measurement.

    Args:
        host: the decoder, in the dtype that is measured.
        crouter: on the same device and tokens.
        projector: of the pair.
        layout: of the rows.
        stop_ids: special tokens.
        searchers: find the candidates.
        tokens: that are forwarded at once.
        seed: of the random arm.
    """

    def __init__(
        self,
        host: Any,
        crouter: Any,
        projector: Projector,
        layout: Layout,
        stop_ids: frozenset[int],
        searchers: Searchers,
        tokens: int = 65_536,
        seed: int = 0,
    ):
        self.host, self.crouter, self.projector, self.layout = host, crouter, projector, layout
        self.stop_ids, self.searchers, self.tokens, self.seed = stop_ids, searchers, tokens, seed
        self.device = host.device
        self.forwarded = 0  # tokens

    @torch.inference_mode()
    def prepare(
        self, index: np.ndarray, rows: np.ndarray, others: np.ndarray | None, archives: Sequence[tuple[int, str]]
    ) -> Block:
        """Encodes and rebuilds the chunks of rows `[D, length]`, and has their archives searched.

        Args:
            index: `[D]`, numbers of the documents.
            rows: `[D, length]`.
            others: `[D, length]`, rows of the documents whose soft prompts are shown instead; None: not needed.
            archives: that will be read, by chunk count and kind.
        """
        layout = self.layout
        latents, soft = {}, {}
        for name, ids in (("own", rows), ("other", others)):
            if ids is not None:
                chunks = ids[:, layout.prefix : layout.old].reshape(-1, layout.chunk)
                parts = torch.from_numpy(chunks).to(self.device).split(max(1, self.tokens // layout.chunk))
                latents[name] = torch.cat([self.crouter.encode(part) for part in parts])
                soft[name] = self.projector(latents[name].float()).flatten(0, 1).unflatten(0, (len(rows), -1))
        count = len(rows) * layout.chunks
        ids, confidence = np.zeros((count, layout.chunk), np.int64), np.ones((count, layout.chunk), np.float32)
        if any(kind == "rebuilt" for _, kind in archives):
            step = max(1, self.tokens // (8 * layout.chunk))  # the whole distribution of every token is formed
            parts = [self.crouter.reconstruct(part) for part in latents["own"].split(step)]
            ids = torch.cat([part.input_ids for part in parts]).cpu().numpy()
            confidence = torch.cat([part.confidence for part in parts]).float().clamp(0, 1).cpu().numpy()
        ids, confidence = ids.reshape(len(rows), -1), confidence.reshape(len(rows), -1)
        tra = (ids == rows[:, layout.prefix : layout.old]).reshape(len(rows), layout.chunks, -1).mean(-1)
        vocab = self.host.get_input_embeddings().weight.shape[0]
        waiting = [
            self.searchers.submit(Search(layout, row, (ids[i], confidence[i]), tuple(archives), vocab, self.stop_ids))
            for i, row in enumerate(rows)
        ]
        return Block(index, rows, soft, tra, waiting)

    @torch.inference_mode()
    def forward(
        self, block: Block, arm: Arm, count: int, wanted: Sequence[tuple[int, tuple[int, ...]]]
    ) -> Iterator[tuple[list[int], Places]]:
        """Passes of an arm, as many rows at once as fit.

        Args:
            block: holds the rows.
            arm: what is read.
            count: chunks.
            wanted: document of the block, and the chunks that it recalls.

        Yields:
            The documents of a batch, and what the host says, of `target` places each.
        """
        layout = self.layout
        extra = layout.extra(arm.longer, count)
        length = layout.raw(block.rows[0], extra, wanted[0][1]).size + layout.prefix
        length += count * layout.latents if arm.soft else 0
        size = max(1, self.tokens // length)
        for start in range(0, len(wanted), size):
            some = wanted[start : start + size]
            documents = [i for i, _ in some]
            raw = torch.from_numpy(np.stack([layout.raw(block.rows[i], extra, chunks) for i, chunks in some]))
            rows = torch.from_numpy(block.rows[documents])
            prefix, targets = rows[:, : layout.prefix], rows[:, layout.split :]
            width = self.projector.config.host_hidden_size
            soft = torch.zeros(len(some), 0, width, device=self.device)
            if arm.soft:
                soft = block.soft[arm.soft][documents][:, -count * layout.latents :]
            scores = compressed_logits(self.host, soft, prefix.to(self.device), raw.to(self.device), layout.target)
            self.forwarded += len(some) * length
            yield documents, Places.read(scores.flatten(0, 1), targets.to(self.device).flatten())

    def wanted(self, block: Block, arm: Arm, count: int) -> list[tuple[int, tuple[int, ...]]]:
        """Every document of a block, with the chunks that an arm recalls."""
        if not arm.recall:
            return [(i, ()) for i in range(len(block.rows))]
        return [(i, recalled(self.layout, row, count, arm.recall, self.seed)) for i, row in enumerate(block.rows)]


def archive_of(arm: Arm, archive: str) -> str:
    """The kind of archive that `search` makes: what is rebuilt, or what the arm's raw window does not hold."""
    return "rebuilt" if archive == "rebuilt" else "" if arm.longer == "full" else arm.longer


def archives_of(layout: Layout, counts: Sequence[int]) -> list[tuple[int, str]]:
    """All archives that the arms read."""
    kinds = {
        (count, archive_of(arm, archive))
        for count in counts
        for arm in ARMS.values()
        if arm.exists(layout, count)
        for _, archive, _ in arm.readings
    }
    return sorted(kinds)


def record_places(reader: Reader, block: Block, count: int) -> dict[str, np.ndarray]:
    """What the gates are fitted on, `<gate>.{features,available,copied,host}`, each `[D, target, ...]`."""
    layout, out = reader.layout, {}
    for arm in ARMS.values():
        keys = [(key, archive) for key, archive, gate in arm.readings if key in SOURCES]
        if not keys or not arm.exists(layout, count):
            continue
        for documents, places in reader.forward(block, arm, count, reader.wanted(block, arm, count)):
            for key, archive in keys:
                kind = archive_of(arm, archive)
                candidates = block.candidates(documents, count, kind, layout.target, reader.device)
                features, available, copied = places.beside(candidates)
                values = {"features": features.half(), "available": available, "copied": copied, "host": places.host}
                for name, value in values.items():
                    part = value.unflatten(0, (len(documents), layout.target)).cpu().numpy()
                    out.setdefault(f"{key}.{name}", []).append(part)
    return {name: np.concatenate(parts) for name, parts in out.items()}


def measure(
    reader: Reader, block: Block, counts: Sequence[int], gates: dict[str, nn.Module], oracle: Sequence[int] = ()
) -> dict[str, np.ndarray]:
    """Figures of every document, `[D]` each: `n<k>.<arm>`, loss in nats/token; `.right`, greedy accuracy, and more.

    Args:
        reader: the host.
        block: the documents.
        counts: of chunks.
        gates: by name.
        oracle: documents of the block whose every pair of chunks is tried.
    """
    layout, size = reader.layout, len(block.rows)
    out: dict[str, np.ndarray] = {}

    def put(key: str, documents: Sequence[int], places: torch.Tensor) -> None:
        values = places.float().unflatten(0, (len(documents), layout.target)).mean(1).cpu().numpy()
        out.setdefault(key, np.full(size, np.nan, np.float32))[list(documents)] = values

    for (name, arm), count in itertools.product(ARMS.items(), counts):
        if not arm.exists(layout, count) or (name == "window" and count != counts[0]):
            continue
        here = counts if name == "window" else [count]  # the window does not depend on how much is older
        wanted = reader.wanted(block, arm, count)
        for documents, places in reader.forward(block, arm, count, wanted):
            right = (places.token == places.targets).float()
            for n in here:
                put(f"n{n}.{name}", documents, -places.host)
                if name in GREEDY:
                    put(f"n{n}.{name}.right", documents, right)
                for archive, keys in itertools.groupby(arm.readings, key=lambda reading: reading[1]):
                    kind = archive_of(arm, archive)
                    candidates = block.candidates(documents, n, kind, layout.target, reader.device)
                    seen = places.beside(candidates)
                    for key, _, gate in keys:
                        put(f"n{n}.{key}", documents, -mixture_log_likelihood(gates[gate], *seen, places.host))
                        if key in GREEDY and n == max(counts):
                            token = places.greedy(candidates, gates[gate](seen[0], seen[1]))
                            put(f"n{n}.{key}.right", documents, (token == places.targets).float())
        if arm.recall:
            out[f"n{count}.{name}.chunks"] = np.array([chunks for _, chunks in wanted], np.int16)
    for count in counts:
        out[f"n{count}.tra"] = block.tra[:, -count:].mean(1).astype(np.float32)
        if len(oracle) and count > layout.recalled:
            out |= best_pairs(reader, block, count, gates["recall2_copy"], oracle)
    return out


def single_losses(
    reader: Reader, block: Block, count: int, gate: nn.Module, wanted: Sequence[tuple[int, tuple[int, ...]]]
) -> np.ndarray:
    """Losses without and with copying, `[len(wanted), 2]`, of documents that recall given chunks."""
    layout, parts = reader.layout, []
    arm = Arm(recall="given") if wanted[0][1] else Arm()
    for documents, places in reader.forward(block, arm, count, wanted):
        seen = places.beside(block.candidates(documents, count, "", layout.target, reader.device))
        both = torch.stack([-places.host, -mixture_log_likelihood(gate, *seen, places.host)], dim=1)
        parts.append(both.unflatten(0, (len(documents), layout.target)).mean(1).cpu().numpy())
    return np.concatenate(parts)


def best_pairs(
    reader: Reader, block: Block, count: int, gate: nn.Module, oracle: Sequence[int]
) -> dict[str, np.ndarray]:
    """`oracle2` and `oracle2_copy`: the least loss of any pair of chunks, without and with copying, and the pair."""
    layout = reader.layout
    pairs = list(itertools.combinations(range(layout.chunks - count, layout.chunks), layout.recalled))
    wanted = [(i, pair) for i in oracle for pair in pairs]
    losses = single_losses(reader, block, count, gate, wanted).reshape(len(oracle), len(pairs), 2)
    out = {}
    for column, key in enumerate(("oracle2", "oracle2_copy")):
        out[f"n{count}.{key}"] = np.full(len(block.rows), np.nan, np.float32)
        out[f"n{count}.{key}"][list(oracle)] = losses[:, :, column].min(1)
        out[f"n{count}.{key}.chunks"] = np.full((len(block.rows), layout.recalled), -1, np.int16)
        out[f"n{count}.{key}.chunks"][list(oracle)] = np.array(pairs)[losses[:, :, column].argmin(1)]
    return out


# The collecting stage.


class Progress:
    """A line now and then: how far, how fast, how long still."""

    def __init__(self, what: str, total: int, reader: Reader):
        self.what, self.total, self.reader, self.start = what, total, reader, time.monotonic()
        self.before, self.said = reader.forwarded, 0.0

    def __call__(self, done: int) -> None:
        """Prints at most every two seconds, and at the end."""
        now = time.monotonic()
        if done < self.total and now - self.said < 2:
            return
        self.said, passed = now, now - self.start
        rate = (self.reader.forwarded - self.before) / max(passed, 1e-9)
        left = passed / max(done, 1) * (self.total - done)
        print(f"{self.what}: {done}/{self.total} documents, {rate:,.0f} tokens/s, {passed:.0f} s, {left:.0f} s left",
              flush=True)  # fmt: skip


def blocks(
    reader: Reader, ids: np.ndarray, index: np.ndarray, size: int, partner: np.ndarray | None, archives: list
) -> Iterator[Block]:
    """Blocks of documents, two of them ahead so that the archives are searched meanwhile."""
    ahead: list[Block] = []
    for some in (index[i : i + size] for i in range(0, len(index), size)):
        others = ids[partner[some]].astype(np.int64) if partner is not None else None
        ahead.append(reader.prepare(some, ids[some].astype(np.int64), others, archives))
        if len(ahead) > 2:
            yield ahead.pop(0)
    yield from ahead


def chosen(records: Sequence[Record], most: int | None, seed: int) -> np.ndarray:
    """Numbers of at most so many documents in a seeded order: what an ended lease leaves is a fair sample."""
    return np.array(sorted(range(len(records)), key=lambda i: place(seed, records[i].name))[:most], np.int64)


def save_arrays(path: Path, arrays: dict[str, np.ndarray], about: dict[str, Any]) -> None:
    """Writes a safetensors file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced_file(path) as part:
        save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, part, {"about": json.dumps(about)})


def about_of(path: Path) -> dict[str, Any]:
    """What `save_arrays` noted."""
    with safe_open(path, "np") as file:
        return json.loads((file.metadata() or {}).get("about", "{}"))


def wait_for(paths: Sequence[Path], seconds: float = 300) -> None:
    """Until other processes have written these files.

    Raises:
        InputError: they do not in time.
    """
    end = time.monotonic() + seconds
    while missing := [path for path in paths if not path.exists()]:
        if time.monotonic() > end:
            raise InputError(f"{missing[0]}: expected from another shard within {seconds:.0f} s; is it running?")
        time.sleep(0.5)


def collect_gate_places(reader: Reader, args: argparse.Namespace, path: Path) -> None:
    """Records this shard's part of the gate sets."""
    count, parts, groups, first = max(args.chunks), [], [], 0
    shard, shards = args.shard
    archives = archives_of(reader.layout, [count])
    for name in GATE_SETS:
        windows = Windows.load(args.data, name)
        index = chosen(windows.records, args.gate_documents, args.seed)[shard::shards]
        clusters = {cluster: first + i for i, cluster in enumerate(sorted({r.cluster for r in windows.records}))}
        first += len(clusters)
        progress, done = Progress(name, len(index), reader), 0
        for block in blocks(reader, windows.ids, index, args.block, None, archives):
            parts.append(record_places(reader, block, count))
            groups += [clusters[windows.records[i].cluster] for i in block.index]
            progress(done := done + len(block.index))
    arrays = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    save_arrays(path, {**arrays, "groups": np.array(groups, np.int64)}, about(args))


def fit(
    name: str, files: Sequence[dict[str, np.ndarray]], config: GateConfig, args: argparse.Namespace, device: Any
) -> nn.Module:
    """Fits one gate on what all shards recorded, and saves it."""
    sources = POOLED if name == "pooled" else ("copy",) if name in ("generic", "nine") else (name,)

    def load(field: str) -> np.ndarray:
        arrays = [file[f"{source}.{field}"] for source in sources for file in files]
        return np.concatenate([array.reshape(-1, *array.shape[2:]) for array in arrays])

    fields = {field: torch.from_numpy(load(field)).to(device) for field in ("features", "available", "copied", "host")}
    target = files[0][f"{sources[0]}.host"].shape[1]
    groups = np.concatenate([np.repeat(file["groups"], target) for _ in sources for file in files])
    options = {"groups": groups, "steps": args.steps, "seed": args.seed}
    if name == "nine":
        gate: Any = NineWeights().to(device)
        record = fit_weights(gate, **fields, **options, learning_rate=0.05)
        save_arrays(args.save / name / "gate.safetensors", {"logit": gate.logit.detach().cpu().numpy()}, record)
    else:
        if name == "generic":
            config = GateConfig(sees_host=False)
        gate, record = fit_gate(**fields, **options, config=replace(config, training={"reads": list(sources)}))
        gate.save(args.save / name)
    print(f"gate {name}: " + ", ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}"
                                       for k, v in record.items()), flush=True)  # fmt: skip
    return gate


def load_gates(folder: Path, device: torch.device | str) -> dict[str, nn.Module]:
    """All gates as saved."""
    gates: dict[str, nn.Module] = {}
    for name in GATES:
        if name == "nine":
            gates[name] = NineWeights()
            logit = load_file(folder / name / "gate.safetensors")["logit"]
            gates[name].load_state_dict({"logit": torch.from_numpy(logit)})
        else:
            gates[name] = Gate.load(folder / name)
        gates[name].to(device).requires_grad_(False)
    return gates


def finished(folder: Path, name: str) -> Path:
    """The file that is written last for a gate."""
    return folder / name / ("gate.safetensors" if name == "nine" else "gate.json")


def about(args: argparse.Namespace) -> dict[str, Any]:
    """What another shard's or an earlier run's files must agree on."""
    return {"chunks": args.chunks, "gate_documents": args.gate_documents, "seed": args.seed}


def collect_losses(reader: Reader, args: argparse.Namespace, name: str, gates: dict[str, nn.Module]) -> None:
    """Measures this shard's part of an evaluation set; what is done so far is written after every block."""
    shard, shards = args.shard
    path = args.save / "losses" / f"{name}.{shard}of{shards}.safetensors"
    windows = Windows.load(args.data, name)
    order = chosen(windows.records, args.documents, args.seed)
    index, oracle = order[shard::shards], set(order[: args.oracle_documents].tolist())
    if path.exists() and about_of(path) == about(args) and len(load_file(path)["documents"]) == len(index):
        print(f"{name}: done before", flush=True)
        return
    progress, done, parts = Progress(name, len(index), reader), 0, []
    archives = archives_of(reader.layout, args.chunks)
    for block in blocks(reader, windows.ids, index, args.block, partners(windows.records, args.seed), archives):
        tried = [i for i, document in enumerate(block.index) if int(document) in oracle]
        found = measure(reader, block, args.chunks, gates, tried)
        parts.append({**found, "documents": block.index})
        keys = sorted(set().union(*parts))
        filled = [{**{k: missing(k, parts, len(p["documents"])) for k in keys if k not in p}, **p} for p in parts]
        save_arrays(path, {k: np.concatenate([p[k] for p in filled]) for k in keys}, about(args))
        progress(done := done + len(block.index))
    sets = {name: losses_of(args.save, name, args.data)}
    print(table(metrics(sets, args.chunks, args.seed, draws=200, slots=reader.layout)), flush=True)


def missing(key: str, parts: Sequence[dict[str, np.ndarray]], size: int) -> np.ndarray:
    """Stands for a figure that a block does not have: no document of it was tried with every pair."""
    like = next(part[key] for part in parts if key in part)
    return np.full((size, *like.shape[1:]), -1 if like.dtype.kind == "i" else np.nan, like.dtype)


def collect_pairs(reader: Reader, args: argparse.Namespace, gate: nn.Module) -> None:
    """For a recall scorer: the target's loss with each single chunk recalled, at several splits of a gate document.

    Written to `pairs.<shard>.safetensors`: `document`, `split` (by how many chunks it is earlier), `chunk` (-1: none),
    `loss` `[P, 2]`, without and with copying; `--pairs` windows at most over all shards, those of split 0 first.
    """
    shard, shards = args.shard
    left = -(-args.pairs // shards)
    parts: dict[str, list[np.ndarray]] = {}
    whole = reader.layout
    for split, (number, name) in itertools.product(range(whole.chunks - whole.recalled), enumerate(GATE_SETS)):
        windows = Windows.load(args.data, name)
        index = chosen(windows.records, None, args.seed)[shard::shards][:left]
        if not len(index):
            break
        left -= len(index)
        reader.layout = whole.moved(split)
        count = reader.layout.chunks
        progress, done = Progress(f"pairs {name}, split {split}", len(index), reader), 0
        ids = windows.ids[:, : reader.layout.length]
        for block in blocks(reader, ids, index, args.block, None, [(count, "")]):
            size = len(block.rows)
            losses = [single_losses(reader, block, count, gate, [(i, ()) for i in range(size)])]
            losses.append(
                single_losses(reader, block, count, gate, [(i, (c,)) for c in range(count) for i in range(size)])
            )
            values = {
                "set": np.full(size * (1 + count), number),
                "document": np.tile(block.index, 1 + count),
                "split": np.full(size * (1 + count), split),
                "chunk": np.repeat(np.arange(-1, count), size),
                "loss": np.concatenate(losses),
            }
            for key, value in values.items():
                parts.setdefault(key, []).append(value)
            path = args.save / f"pairs.{shard}of{shards}.safetensors"
            save_arrays(path, {key: np.concatenate(value) for key, value in parts.items()}, about(args))
            progress(done := done + size)
    reader.layout = whole


def layout_of(crouter: Any) -> Layout:
    """Of the sets' rows, for a crouter that cuts chunks of their length."""
    if crouter.config.chunk_length != CHUNK:
        raise InputError(f"expected a crouter for chunks of {CHUNK} tokens, got {crouter.config.chunk_length}")
    return Layout(latents=crouter.config.num_latents)


def run_collect(args: argparse.Namespace) -> None:
    """The stage on the accelerator."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with Searchers(args.workers) as searchers:  # forked before the accelerator is touched
        host, tokenizer = load_host(args.host, device, torch.bfloat16)
        crouter, _ = load_crouter(args.crouter, device)
        projector = find_projector(crouter, host).to(device)
        for model in (host, crouter, projector):
            model.requires_grad_(False)
        layout = layout_of(crouter)
        stop_ids = frozenset(tokenizer.all_special_ids)
        reader = Reader(host, crouter, projector, layout, stop_ids, searchers, args.tokens, args.seed)
        shard, shards = args.shard
        paths = [args.save / "gate_places" / f"{i}of{shards}.safetensors" for i in range(shards)]
        if not all(finished(args.save, name).exists() for name in GATES):
            if not paths[shard].exists():
                collect_gate_places(reader, args, paths[shard])
            wait_for(paths)
            for path in paths:
                if about_of(path) != about(args):
                    raise InputError(f"{path}: made with other settings; delete it")
            config = GateConfig(host_name=display_name(host), host_fingerprint=host_fingerprint(host))
            files = [load_file(path) for path in paths]
            for name in GATES[shard::shards]:
                if not finished(args.save, name).exists():
                    fit(name, files, config, args, device)
            del files
            wait_for([finished(args.save, name) for name in GATES])
        gates = load_gates(args.save, device)
        for name in args.sets:
            collect_losses(reader, args, name, gates)
        if args.pairs:
            collect_pairs(reader, args, gates["pooled"])
        print(f"{reader.forwarded:,} tokens forwarded", flush=True)


# The report.


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
    """Joins what the shards wrote for a set, in the order of its documents.

    Raises:
        InputError: there is nothing.
    """
    files = [load_file(path) for path in sorted((folder / "losses").glob(f"{name}.*of*.safetensors"))]
    if not files:
        raise InputError(f"{folder}: no losses of {name}; run the stage `collect`")
    keys = sorted(set().union(*files))
    filled = [{**{k: missing(k, files, len(f["documents"])) for k in keys if k not in f}, **f} for f in files]
    arrays = {key: np.concatenate([file[key] for file in filled]) for key in keys}
    _, rows = np.unique(arrays["documents"], return_index=True)
    records = Windows.load(data, name).records
    return Losses({k: v[rows] for k, v in arrays.items()}, [records[i] for i in arrays["documents"][rows]])


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
        if key.startswith(f"n{n}.") and key.count(".") == 1 and values.ndim == 1 and not key.endswith(".tra")
    ]
    owner = {key: name for name, arm in ARMS.items() for key in (name, *(r[0] for r in arm.readings))}
    owner |= {"oracle2": "bm25_2", "oracle2_copy": "bm25_2"}
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
        out[f"{key}.slots"] = arm.slots(layout, n)
        out[f"{key}.loss"] = float(part.arrays[f"n{n}.{key}"].mean())
        out |= interval(f"{key}.hgr", gain_ratio(part, key, "window", n, boot, names))
        if names:
            out |= interval(f"{key}.ratio", gain_ratio(part, key, "window", n, boot, []))
        base = "recent_same_slots_recall_copy" if arm.recall or arm.longer == "recall" else "recent_same_slots_copy"
        if key not in ("window", "full", "full_copy", "full_copy_pooled", base) and base in keys:
            out |= interval(f"{key}.diff", gain_ratio(part, key, base, n, boot, names))
    for name in ("window", "full"):
        out[f"loss.{name}"] = out[f"{name}.loss"]
    out |= interval("soft_minus_shuffled", gain_ratio(losses, "soft", "shuffled", n, bootstrap, domains))
    out["tra"] = float(losses.arrays[f"n{n}.tra"].mean())
    for key in GREEDY:
        if f"n{n}.{key}.right" in losses.arrays:
            out[f"{key}.accuracy"] = float(losses.arrays[f"n{n}.{key}.right"].mean())
    if f"n{n}.bm25_2.chunks" in losses.arrays:
        same = losses.arrays[f"n{n}.bm25_2.chunks"] == losses.arrays[f"n{n}.last2.chunks"]
        out["bm25_is_last2"] = float(same.all(1).mean())
    for alias, key in ALIASES.items():
        out |= {alias + name[len(key) :]: v for name, v in list(out.items()) if name.startswith(f"{key}.")}
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
        for key in ("copy", "all"):
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
        for arm in ("copy", "copy_rebuilt", "copy_pooled", "all"):
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
    """HGR, slots, loss and difference of every arm, a line each."""
    lines = []
    for key, value in found.items():
        if key.endswith(".hgr"):
            arm = key.removesuffix(".hgr")
            low, high = found.get(f"{key}.lo", math.nan), found.get(f"{key}.hi", math.nan)
            line = f"{arm:48} {value:7.3f} [{low:6.3f}, {high:6.3f}]"
            if f"{arm}.slots" in found:
                line += f" {found[f'{arm}.slots']:6.0f} slots, loss {found[f'{arm}.loss']:.4f}"
            if f"{arm}.diff" in found:
                line += f", diff {found[f'{arm}.diff']:+.3f} [{found[f'{arm}.diff.lo']:+.3f}, "
                line += f"{found[f'{arm}.diff.hi']:+.3f}]"
            lines.append(line)
    return "\n".join(lines)


def run_report(args: argparse.Namespace) -> None:
    """The stage on the CPU."""
    sets = {}
    for name in args.sets:
        try:
            sets[name] = losses_of(args.save, name, args.data)
        except InputError as error:
            print(error, flush=True)
    if not sets:
        raise InputError(f"{args.save}: no losses; run the stage `collect`")
    layout = Layout()
    found = metrics(sets, args.chunks, args.seed, slots=layout)
    for name in GATES:
        path = finished(args.save, name)
        if path.exists():
            record = about_of(path) if name == "nine" else json.loads(path.read_text())["training"]
            found |= {f"gate.{name}.{key}": record[key] for key in ("train_gain", "held_out_gain", "places", "groups")}
    arrays = {f"{name}.{key}": values for name, losses in sets.items() for key, values in losses.arrays.items()}
    save_arrays(args.save / "losses.safetensors", arrays, about(args))
    print(table(found))
    config = {"layout": asdict(layout), "chunks": args.chunks, "gate_documents": args.gate_documents}
    print(write_result(args.result, found, seed=args.seed, config=config, notes=NOTES))


def _shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    shard, shards = int(index), int(count or 1)
    if not 0 <= shard < shards:
        raise argparse.ArgumentTypeError(f"expected i/k with i from 0 to k - 1, got {text}")
    return shard, shards


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    cuda = torch.cuda.device_count() > 0  # does not start the accelerator
    parser.add_argument("stage", choices=["collect", "report"])
    parser.add_argument("--data", required=True, type=Path, help="folder of the sets of eval.documents")
    parser.add_argument("--save", required=True, type=Path, help="folder of gates and losses")
    parser.add_argument("--host", default="smollm2-135m")
    parser.add_argument("--crouter", help="the shipped one by default")
    parser.add_argument("--sets", nargs="+", choices=EVALUATION, default=list(EVALUATION))
    parser.add_argument("--chunks", nargs="+", type=int, default=[2, 4, 8])
    parser.add_argument("--documents", type=int, help="of an evaluation set, at most; all by default")
    parser.add_argument("--gate-documents", type=int, default=400, help="of each gate set, at most")
    parser.add_argument("--oracle-documents", type=int, default=150, help="of each set, tried with every pair")
    parser.add_argument("--pairs", type=int, default=0, help="windows of the gate sets for a recall scorer")
    parser.add_argument("--steps", type=int, default=600, help="of fitting a gate")
    parser.add_argument("--shard", type=_shard, default=(0, 1), help="i/k: this process of k that run at once")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) // 2), help="searching processes")
    parser.add_argument("--block", type=int, default=32 if cuda else 2, help="documents on their way at once")
    parser.add_argument("--tokens", type=int, default=65_536 if cuda else 8192, help="forwarded at once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--result", default="hgr")


def run(args: argparse.Namespace) -> None:
    """Collects or reports."""
    (run_collect if args.stage == "collect" else run_report)(args)
