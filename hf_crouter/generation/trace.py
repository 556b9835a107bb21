"""What a report needs of a call that ended, without its keys and values."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ..cache.kv_cache import CompressedCache
from ..crouter import CRouterModel
from ..hosts.tokenizers import character_spans
from ..types import CopiedToken, Route, ScoreUse
from ..utils.batching import padded
from .report import ChunkRecord, CopyRecord, HistoryReport, RetrievalRecord, RouteRecord, RowRecord

BATCH = 4  # chunks rebuilt at once


class Trace:
    """State of a call, to report on.

    Args:
        cache: of the call.
        sequences: what it gave, `[sequences, T]`.
        entries: whether chunks put entries into the cache.
        uses: what changes of the scores brought.
        steps: of the host, and tokens that they gave.
    """

    def __init__(
        self,
        cache: CompressedCache,
        sequences: torch.Tensor,
        entries: bool,
        uses: Sequence[ScoreUse] = (),
        steps: tuple[int, int] = (0, 0),
    ):
        self.entries, self.steps = entries, steps
        copied = [token for use in uses for token in use.copied]
        self.copied = Counter((token.row, token.chunk) for token in copied)
        self.copies = copied_spans(copied)
        pads = [row.pad for row in cache.rows]
        self.texts = {(sequence, row): sequences[sequence, pads[row] :].cpu()
                      for sequence, row in dict.fromkeys((c.sequence, c.row) for c in self.copies)}  # fmt: skip
        self.archive = tuple(sum(getattr(use, name) for use in uses)
                             for name in ("archive_tokens", "archive_bytes", "index_bytes"))  # fmt: skip
        width, batch = cache.width, len(cache.rows)
        self.rows, self.chunks, self.retrievals, self.routes = [], [], [], []
        for i, row in enumerate(cache.rows):
            length = min(width - row.pad, row.end if row.end is not None else width)
            slots = [len(chunk.entries) if chunk.entries is not None else 0 for chunk in row.chunks]
            # without embeddings that stand aside; of a row that ended no slots are left
            coded = row.end is None and cache.places is None
            kept = int((cache.layout[i] < -1).sum()) if coded else sum(slots)
            prefix = min(row.prefix or 0, length)
            retrieved = sum(row.chunks[n].end - row.chunks[n].start for n in row.retrieved)
            raw = length - max(prefix, row.chunks[-1].end if row.chunks else 0)
            self.rows.append(RowRecord(length, prefix, kept, raw, retrieved))
            self.retrievals += [
                RetrievalRecord(i, made.at, chunk, scores)
                for made in row.retrievals
                for chunk, scores in zip(made.chunks, made.scores, strict=True)
            ]
            self.routes += [RouteRecord(i, r.at, *_decision(r.route)) for r in row.routes]
            self.chunks += [(i, j, c.start, c.end, c.ids, c.route, slots[j]) for j, c in enumerate(row.chunks)]
        self.slots, self.peak = cache.layout.shape[1] + cache.pair_slots, cache.peak
        self.kv_bytes = batch * cache.slot_bytes(cache.peak)
        self.kv_bytes_full = batch * cache.slot_bytes(max(row.tokens for row in self.rows))
        self.measured: list[tuple[float, float]] = []

    def report(self, crouter: CRouterModel | None, tokenizer: Any = None) -> HistoryReport:
        """The report; chunks are rebuilt by the crouter at the first time, a few at once.

        Args:
            crouter: None: they are not.
            tokenizer: of the host; None: without texts.
        """
        if crouter is not None and len(self.measured) < len(self.chunks):
            self.measured = _measure(crouter, [chunk[4] for chunk in self.chunks])
        records = []
        for k, (row, index, start, end, ids, route, slots) in enumerate(self.chunks):
            nll, accuracy = self.measured[k] if self.measured else (None, None)
            served = _decision(route) if route is not None else (None, "", None)
            copied = self.copied[row, index]
            records.append(ChunkRecord(row, index, start, end, len(ids), nll, accuracy, copied, *served, slots))
        steps, generated = self.steps
        return HistoryReport(
            tuple(records), tuple(self.rows), self.slots, self.peak, self.kv_bytes, self.kv_bytes_full, self.entries,
            self.copied.total(), *self.archive, retrievals=tuple(self.retrievals), routes=tuple(self.routes),
            steps=steps, generated=generated, copies=self._copies(tokenizer),
        )  # fmt: skip

    def _copies(self, tokenizer: Any) -> tuple[CopyRecord, ...]:
        if tokenizer is None:
            return tuple(self.copies)
        found = []
        for (sequence, row), text_ids in self.texts.items():
            ids = text_ids.tolist()
            some = [copy for copy in self.copies if (copy.sequence, copy.row) == (sequence, row)]
            spans = [(c.source_start, c.source_end) if c.source_start is not None and c.source_end is not None
                     else (0, 0) for c in some]  # fmt: skip
            places = character_spans(tokenizer, ids, spans)
            for copy, place in zip(some, places, strict=True):
                text = tokenizer.decode(ids[copy.start : copy.end])
                known = copy.source_start is not None
                found.append(replace(copy, text=text, characters=place if known else None))
        return tuple(found)


def copied_spans(copied: Sequence[CopiedToken]) -> list[CopyRecord]:
    """Copied tokens as spans: what follows each other on both sides is one."""
    spans: list[CopyRecord] = []
    for token in copied:
        last, at = spans[-1] if spans else None, token.source
        follows = last is not None and (last.sequence, last.end) == (token.sequence, token.position)
        if last is not None and follows and (at == last.source_end if at is not None
                                             else last.source_end is None and last.chunk == token.chunk):  # fmt: skip
            spans[-1] = replace(last, end=last.end + 1, source_end=at + 1 if at is not None else None)
        else:
            end = at + 1 if at is not None else None
            spans.append(
                CopyRecord(token.row, token.sequence, token.position, token.position + 1, token.chunk, at, end)
            )
    return spans


def _decision(route: Route) -> tuple[str | None, str, float | None]:
    """Expert, status and margin; JSON knows no infinity."""
    return route.expert, route.status, route.margin if math.isfinite(route.margin) else None


@torch.no_grad()
def _measure(crouter: CRouterModel, pieces: list[torch.Tensor]) -> list[tuple[float, float]]:
    """Reconstruction NLL (nats/token) and TRA of chunks; equal ones (of beams) are measured once."""
    unique = {piece.numpy().tobytes(): piece for piece in pieces}
    keys, values = list(unique), []
    for first in range(0, len(keys), BATCH):
        ids, mask = padded([unique[key] for key in keys[first : first + BATCH]])
        out = crouter(ids.to(crouter.device), mask.to(crouter.device))
        values += zip(out.reconstruction_nll.tolist(), out.reconstruction_accuracy.tolist(), strict=True)
    found = dict(zip(keys, values, strict=True))
    return [found[piece.numpy().tobytes()] for piece in pieces]
