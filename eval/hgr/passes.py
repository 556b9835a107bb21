"""What the HGR measurement reads: rows, arms, archives, and the passes of a host over them.

Axes: `D` documents, `N` places (a document's `target` tokens, one after another), `V` vocabulary, `K` orders.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from eval.documents import CHUNK, CHUNKS, PREFIX, SCORED, WINDOW, Record, place
from hf_crouter.compressors.projector import Projector
from hf_crouter.ngram.archive import ORDERS, Archive
from hf_crouter.ngram.mixture import Candidates, HostView, collect, gate_features
from hf_crouter.ngram.postings import ChunkIndex
from hf_crouter.ngram.scorers import QUERY, Bm25Scorer, OverlapScorer, RandomScorer, RecencyScorer, Scorer, choose
from hf_crouter.training.align import compressed_logits
from hf_crouter.training.gate import mixture_log_likelihood

KEPT = 32  # joined candidates of a block that are held
DENSE = 2048  # places whose whole distribution is held in float32 at once


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
        retrieved: chunks that a recall arm reads.
    """

    prefix: int = PREFIX
    chunk: int = CHUNK
    chunks: int = CHUNKS
    window: int = WINDOW
    target: int = SCORED
    latents: int = 8
    retrieved: int = 2

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
        """Tokens by which a raw window is longer: `""`, `soft`, `retrieve` (as many slots as those take), `full`."""
        if kind == "full":
            return count * self.chunk
        return {"": 0, "soft": count * self.latents, "retrieve": count * self.latents + self.retrieved * self.chunk}[
            kind
        ]

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
        retrieved = [row[s : s + self.chunk] for s in starts]
        return np.concatenate([*retrieved, row[self.old - extra : self.length - 1]])


@dataclass(frozen=True)
class Arm:
    """What a host reads.

    Attributes:
        soft: whose soft prompts: `""` nobody's, `own`, `other` another document's, `mean` as many means of the chunks'
            token embeddings.
        longer: by what the raw window is longer, as in `Layout.extra`.
        retrieve: whose choice of chunks is raw again, a name of `Reader.scorers`.
        readings: name of each variant with copying, and what it copies from: `past` or `rebuilt`.
    """

    soft: str = ""
    longer: str = ""
    retrieve: str = ""
    readings: tuple[tuple[str, str, str], ...] = ()  # key, archive, gate

    def slots(self, layout: Layout, count: int) -> int:
        """Positions before the target."""
        retrieved = layout.retrieved * layout.chunk if self.retrieve else 0
        soft = count * layout.latents if self.soft else 0
        return layout.prefix + soft + retrieved + layout.extra(self.longer, count) + layout.window

    def exists(self, layout: Layout, count: int) -> bool:
        """Whether recalling is less than reading everything."""
        return count > layout.retrieved or not (self.retrieve or self.longer == "retrieve")


def _fitted(key: str, archive: str = "past") -> tuple[str, str, str]:
    return f"{key}_fitted", archive, f"{key}_fitted"


ARMS = {
    "window": Arm(readings=(_fitted("copy"), ("copy", "past", "shipped"), ("copy_generic", "past", "generic"),
                            ("copy_nine_weights", "past", "nine_weights"), _fitted("copy_rebuilt", "rebuilt"),
                            ("copy_rebuilt", "rebuilt", "shipped"),
                            ("copy_rebuilt_generic", "rebuilt", "generic"))),
    "soft": Arm("own", readings=(_fitted("soft_copy"), ("soft_copy", "past", "shipped"),
                                 _fitted("soft_copy_rebuilt", "rebuilt"))),
    "shuffled": Arm("other"),
    "mean_pool": Arm("mean"),
    "longer_same_slots": Arm(longer="soft", readings=(_fitted("longer_same_slots_copy"),)),
    "longer_same_slots_retrieve2": Arm(longer="retrieve", readings=(_fitted("longer_same_slots_retrieve2_copy"),)),
    "retrieve2_last": Arm(retrieve="last", readings=(_fitted("retrieve2_last_copy"),)),
    "retrieve2_bm25": Arm(retrieve="bm25", readings=(_fitted("retrieve2_bm25_copy"),
                                                     ("retrieve2_bm25_copy", "past", "shipped"))),
    "retrieve2_random": Arm(retrieve="random", readings=(_fitted("retrieve2_random_copy"),)),
    "retrieve2_learned": Arm(retrieve="learned", readings=(("retrieve2_learned_copy", "past", "shipped"),)),
    "soft_retrieve2_bm25": Arm("own", retrieve="bm25", readings=(_fitted("soft_retrieve2_bm25_copy"),
                                                                 ("soft_retrieve2_bm25_copy", "past", "shipped"))),
    "soft_retrieve2_learned": Arm("own", retrieve="learned",
                                  readings=(("soft_retrieve2_learned_copy", "past", "shipped"),)),
    "retrieve2": Arm(retrieve="overlap", readings=(("retrieve2_copy", "past", "shipped"),)),
    "soft_retrieve2": Arm("own", retrieve="overlap", readings=(("soft_retrieve2_copy", "past", "shipped"),)),
    "full": Arm(longer="full", readings=(_fitted("full_copy"), ("full_copy", "past", "shipped"))),
}  # fmt: skip
"""By name. A variant with copying is called after what it reads; it weighs by the gate that ships, unless it says so:
`_fitted` (to what this arm reads), `_generic` (does not see the host), `_nine_weights`."""
SOURCES = {key: (name, archive) for name, arm in ARMS.items() for key, archive, gate in arm.readings if key == gate}
SHIPPED = tuple(f"{key}_fitted" for key in ("copy", "copy_rebuilt", "soft_copy", "soft_copy_rebuilt",
                                            "retrieve2_bm25_copy", "soft_retrieve2_bm25_copy", "full_copy"))  # fmt: skip
"""What the gate that ships is fitted to."""
GATES = (*SOURCES, "shipped", "generic", "nine_weights")
GREEDY = ("window", "copy", "soft_retrieve2_copy", "full")
KVPRESS = ("snapkv", "snapkv_window", "expected_attention", "streaming", "knorm")
"""Methods of `eval.kvpress_arms`: as many slots as `longer_same_slots` (`.at8`), or `longer_same_slots_retrieve2`
(`.at8_retrieve2`)."""


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


def retrieved(layout: Layout, row: np.ndarray, count: int, scorer: Scorer) -> tuple[int, ...]:
    """Numbers of the chunks that a scorer recalls, ascending, 0 the oldest of the row."""
    index = ChunkIndex().extended(*layout.past(row, count).reshape(count, layout.chunk))
    recent = row[layout.split - min(QUERY, layout.window) : layout.split]
    return tuple((layout.chunks - count + choose(scorer.scores(index, recent), layout.retrieved)).tolist())


def partners(records: Sequence[Record], seed: int) -> np.ndarray:
    """For every document one of another text: of its package or domain where there is one, else of the set."""
    names = [record.cluster if record.domain == "code" else record.domain for record in records]
    texts = [record.name.partition("#")[0] for record in records]  # `#k`: window k of a text
    order = sorted(range(len(records)), key=lambda i: (names[i], place(seed, records[i].name)))
    at = {document: n for n, document in enumerate(order)}
    partner = np.arange(len(records))
    for i, name in enumerate(names):
        behind = [order[(at[i] + n) % len(order)] for n in range(1, len(order))]
        others = [j for j in behind if texts[j] != texts[i]]
        partner[i] = next((j for j in others if names[j] == name), others[0] if others else i)
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
        # where there is nothing, the entry named is none of another text's, nor one behind the last
        "best": np.concatenate(
            [np.where(part["available"], part["best"].astype(np.int64) + first[i], 0) for i, part in enumerate(parts)]
        ),
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
        soft: soft prompts `[D, chunks · latents, H]`: of their own chunks, their partners', and mean embeddings.
        latents: `[D, chunks, M · d]` of their own chunks, float32.
        tra: `[D, chunks]`, share of tokens that the crouter rebuilds.
        waiting: for the candidates of each document.
    """

    index: np.ndarray
    rows: np.ndarray
    soft: dict[str, torch.Tensor]
    latents: torch.Tensor
    tra: np.ndarray
    waiting: list[Callable[[], dict]]
    found: list[dict] = field(default_factory=list)
    kept: dict[tuple, Candidates] = field(default_factory=dict)  # by documents, count and kind: most arms share them

    def candidates(self, documents: Sequence[int], count: int, kind: str, places: int, device: Any) -> Candidates:
        """Of some documents of the block, which may come more than once; `places` of each."""
        if not self.found:
            self.found = [wait() for wait in self.waiting]
        key = (tuple(documents), count, kind)
        if key not in self.kept:
            if len(self.kept) == KEPT:
                self.kept.pop(next(iter(self.kept)))  # the oldest one
            self.kept[key] = joined([self.found[i][count, kind] for i in documents], places, device)
        return self.kept[key]


class DocumentReader:
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

    Attributes:
        scorers: choose what is recalled, by name; `learned` is there once it is fitted.
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
        self.stop_ids, self.searchers, self.tokens = stop_ids, searchers, tokens
        self.scorers: dict[str, Scorer] = {
            "bm25": Bm25Scorer(), "last": RecencyScorer(), "random": RandomScorer(seed),
            "overlap": OverlapScorer(),
        }  # fmt: skip
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
        latents, soft = {}, {"mean": self.means(rows)}
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
        own = latents["own"].float().flatten(1).unflatten(0, (len(rows), -1))
        return Block(index, rows, soft, own, tra, waiting)

    def means(self, rows: np.ndarray) -> torch.Tensor:
        """Mean embeddings of equal spans of the chunks of rows `[D, length]`: `[D, chunks · latents, H]`."""
        layout, embed = self.layout, self.host.get_input_embeddings()
        ids = torch.from_numpy(rows[:, layout.prefix : layout.old]).to(self.device)
        return torch.stack(
            [embed(row).float().unflatten(0, (layout.chunks * layout.latents, -1)).mean(1) for row in ids]
        )

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
        # Equal batches within each run of the documents, so that another choice of chunks meets the same candidates.
        run = len({i for i, _ in wanted})
        size = -(-run // -(-run // max(1, self.tokens // length)))
        for start in (first + i for first in range(0, len(wanted), run) for i in range(0, run, size)):
            some = wanted[start : min(start + size, (start // run + 1) * run)]
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
        if not arm.retrieve:
            return [(i, ()) for i in range(len(block.rows))]
        scorer = self.scorers[arm.retrieve]
        return [(i, retrieved(self.layout, row, count, scorer)) for i, row in enumerate(block.rows)]

    def reads(self, arm: Arm, count: int) -> bool:
        """Whether an arm can be measured: it is less than reading everything, and what it recalls can be chosen."""
        return arm.exists(self.layout, count) and (not arm.retrieve or arm.retrieve in self.scorers)


def archive_of(arm: Arm, archive: str) -> str:
    """The kind of archive that `search` makes: what is rebuilt, or what the arm's raw window does not hold."""
    return "rebuilt" if archive == "rebuilt" else "" if arm.longer == "full" else arm.longer


def archives_of(layout: Layout, counts: Sequence[int], arms: Sequence[str] = tuple(ARMS)) -> list[tuple[int, str]]:
    """All archives that the arms read."""
    kinds = {
        (count, archive_of(ARMS[name], archive))
        for count in counts
        for name in arms
        if ARMS[name].exists(layout, count)
        for _, archive, _ in ARMS[name].readings
    }
    return sorted(kinds)


def record_places(reader: DocumentReader, block: Block, count: int) -> dict[str, np.ndarray]:
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
    reader: DocumentReader,
    block: Block,
    counts: Sequence[int],
    gates: dict[str, nn.Module],
    oracle: Sequence[int] = (),
    arms: Sequence[str] = tuple(ARMS),
) -> dict[str, np.ndarray]:
    """Figures of every document, `[D]` each: `n<k>.<arm>`, loss in nats/token; `.right`, greedy accuracy, and more.

    Args:
        reader: the host.
        block: the documents.
        counts: of chunks.
        gates: by name.
        oracle: documents of the block whose every pair of chunks is tried.
        arms: what is read.
    """
    layout, size = reader.layout, len(block.rows)
    out: dict[str, np.ndarray] = {}

    def put(key: str, documents: Sequence[int], places: torch.Tensor) -> None:
        values = places.float().unflatten(0, (len(documents), layout.target)).mean(1).cpu().numpy()
        out.setdefault(key, np.full(size, np.nan, np.float32))[list(documents)] = values

    for name, count in itertools.product(arms, counts):
        arm = ARMS[name]
        if not reader.reads(arm, count) or (name == "window" and count != counts[0]):
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
        if arm.retrieve:
            out[f"n{count}.{name}.chunks"] = np.array([chunks for _, chunks in wanted], np.int16)
    for count in counts:
        if "window" in arms:  # not of arms that are measured beside the others
            out[f"n{count}.tra"] = block.tra[:, -count:].mean(1).astype(np.float32)
        if len(oracle) and count > layout.retrieved:
            out |= best_pairs(reader, block, count, gates["retrieve2_bm25_copy_fitted"], oracle)
    return out


def single_losses(
    reader: DocumentReader, block: Block, count: int, gate: nn.Module, wanted: Sequence[tuple[int, tuple[int, ...]]]
) -> np.ndarray:
    """Losses without and with copying, `[len(wanted), 2]`, of documents that recall given chunks."""
    layout, parts = reader.layout, []
    arm = Arm(retrieve="given") if wanted[0][1] else Arm()
    for documents, places in reader.forward(block, arm, count, wanted):
        seen = places.beside(block.candidates(documents, count, "", layout.target, reader.device))
        both = torch.stack([-places.host, -mixture_log_likelihood(gate, *seen, places.host)], dim=1)
        parts.append(both.unflatten(0, (len(documents), layout.target)).mean(1).cpu().numpy())
    return np.concatenate(parts)


def best_pairs(
    reader: DocumentReader, block: Block, count: int, gate: nn.Module, oracle: Sequence[int]
) -> dict[str, np.ndarray]:
    """`retrieve2_oracle` and `retrieve2_oracle_copy_fitted`: the least loss of any pair of chunks, without and with copying, and the pair."""
    layout = reader.layout
    pairs = list(itertools.combinations(range(layout.chunks - count, layout.chunks), layout.retrieved))
    wanted = [(i, pair) for pair in pairs for i in oracle]
    losses = single_losses(reader, block, count, gate, wanted).reshape(len(pairs), len(oracle), 2).swapaxes(0, 1)
    out = {}
    for column, key in enumerate(("retrieve2_oracle", "retrieve2_oracle_copy_fitted")):
        out[f"n{count}.{key}"] = np.full(len(block.rows), np.nan, np.float32)
        out[f"n{count}.{key}"][list(oracle)] = losses[:, :, column].min(1)
        out[f"n{count}.{key}.chunks"] = np.full((len(block.rows), layout.retrieved), -1, np.int16)
        out[f"n{count}.{key}.chunks"][list(oracle)] = np.array(pairs)[losses[:, :, column].argmin(1)]
    return out
