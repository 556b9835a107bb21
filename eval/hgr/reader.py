"""A host's passes over documents: `[prefix | soft prompts | retrieved chunks | window]`, many rows at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from eval.documents import Record, place
from eval.hgr.arms import Arm, Layout
from eval.hgr.candidates import Search, Searchers, joined
from eval.hgr.places import Places
from hf_crouter.compressors.projector import Projector
from hf_crouter.ngram.mixture import Candidates
from hf_crouter.ngram.postings import ChunkIndex
from hf_crouter.ngram.scorers import QUERY, Bm25Scorer, OverlapScorer, RandomScorer, RecencyScorer, Scorer, top_k
from hf_crouter.training.align import compressed_logits

KEPT = 32  # joined candidates of a block that are held


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
        scorers: choose what is retrieved, by name.
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
            "overlap": OverlapScorer(),
            "bm25": Bm25Scorer(),
            "last": RecencyScorer(),
            "random": RandomScorer(seed),
        }
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
            wanted: document of the block, and the chunks that it retrieves.

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
        """Every document of a block, with the chunks that an arm retrieves."""
        if not arm.retrieve:
            return [(i, ()) for i in range(len(block.rows))]
        scorer = self.scorers[arm.retrieve]
        return [(i, retrieved(self.layout, row, count, scorer)) for i, row in enumerate(block.rows)]


def blocks(
    reader: DocumentReader, ids: np.ndarray, index: np.ndarray, size: int, partner: np.ndarray | None, archives: list
) -> Iterator[Block]:
    """Blocks of documents, two of them ahead so that the archives are searched meanwhile."""
    ahead: list[Block] = []
    for some in (index[i : i + size] for i in range(0, len(index), size)):
        others = ids[partner[some]].astype(np.int64) if partner is not None else None
        ahead.append(reader.prepare(some, ids[some].astype(np.int64), others, archives))
        if len(ahead) > 2:
            yield ahead.pop(0)
    yield from ahead


def retrieved(layout: Layout, row: np.ndarray, count: int, scorer: Scorer) -> tuple[int, ...]:
    """Numbers of the chunks that a scorer retrieves, ascending, 0 the oldest of the row."""
    index = ChunkIndex().extended(*layout.past(row, count).reshape(count, layout.chunk))
    recent = np.concatenate([row[: layout.prefix], row[layout.old - count * layout.chunk : layout.split]])[-QUERY:]
    return tuple((layout.chunks - count + top_k(scorer.scores(index, recent), layout.retrieved)).tolist())


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
