"""What became of a history: chunks, residuals, slots and bytes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..cache.kv_cache import CompressedCache
from ..crouter import CRouterModel
from ..types import Route

BATCH = 4


@dataclass(frozen=True)
class ChunkRecord:
    """One compressed (or, without a crouter, dropped) span.

    Attributes:
        row: row of the batch.
        index: number of the chunk in its row.
        start: first host token of the span, counted from the row's first real token.
        end: host token after the span.
        tokens: crouter tokens of the chunk.
        reconstruction_nll: nats/token with which the latents rebuild it; None without a crouter.
        accuracy: share of its tokens rebuilt exactly at their position (TRA), 0 to 1; None without a crouter.
        copied: generated tokens that copying brought from it.
        expert: whose adapter served it; None: the plain host.
        verdict: on the expert, see `Route`; empty without experts.
        margin: see `Route`; None without experts, or where only one was compared.
    """

    row: int
    index: int
    start: int
    end: int
    tokens: int
    reconstruction_nll: float | None = None
    accuracy: float | None = None
    copied: int = 0
    expert: str | None = None
    verdict: str = ""
    margin: float | None = None


@dataclass(frozen=True)
class RouteRecord:
    """The expert of a row's raw window from some length on.

    Attributes:
        row: row of the batch.
        length: tokens of the row when it was decided.
        expert: whose adapter served; None: the plain host.
        verdict: see `Route`.
        margin: see `Route`; None where only one expert was compared.
    """

    row: int
    length: int
    expert: str | None
    verdict: str
    margin: float | None


@dataclass(frozen=True)
class RetrievalRecord:
    """One chunk that came back raw.

    Attributes:
        row: row of the batch.
        length: tokens of the row when it was chosen; it stood there until the row's next choice.
        chunk: its number in the row.
        scores: why: the parts of its score by name.
    """

    row: int
    length: int
    chunk: int
    scores: dict[str, float]

    @property
    def reason(self) -> str:
        """The parts of the score, such as "words 0.6, phrases 0.4, recency 0.1"."""
        return ", ".join(f"{name} {value:.1f}" for name, value in self.scores.items())


@dataclass(frozen=True)
class RowRecord:
    """Where one row's tokens stand at the end of the call; counts of slots.

    Attributes:
        tokens: real tokens of the row.
        prefix: slots of the raw prefix.
        soft: slots of soft prompts.
        raw: slots of the raw window.
        retrieved: slots of chunks that stand raw before the window.
    """

    tokens: int
    prefix: int
    soft: int
    raw: int
    retrieved: int = 0

    @property
    def slots(self) -> int:
        """All of the row's slots."""
        return self.prefix + self.soft + self.retrieved + self.raw


@dataclass(frozen=True)
class HistoryReport:
    """About the latest call.

    Attributes:
        chunks: every compressed span, row after row.
        rows: one record a row.
        slots: slots of the cache at the end, a row.
        peak_slots: most slots at any time, a row.
        kv_bytes: keys and values at the peak, all rows.
        kv_bytes_full: what the full history would take in the same layers and dtype, all rows.
        soft: whether chunks are read as soft prompts; otherwise the host attends to none of them.
        copied: generated tokens that copying brought.
        archive_tokens: tokens that can be copied, all rows.
        archive_bytes: their ids (and confidences) in main memory, indexes left out.
        index_bytes: bytes of the indexes over them, which are made again when needed.
        retrievals: every chunk of every choice of recall, row after row; the last of a row are those that stand there.
        routes: every decision on a raw window, row after row; empty without experts.
        steps: of the host in `generate`, the reading of the prompt included; 0 after `score`.
        generated: tokens a row that these steps gave; more than one a step where drafts were accepted.
    """

    chunks: tuple[ChunkRecord, ...]
    rows: tuple[RowRecord, ...]
    slots: int
    peak_slots: int
    kv_bytes: int
    kv_bytes_full: int
    soft: bool
    copied: int = 0
    archive_tokens: int = 0
    archive_bytes: int = 0
    index_bytes: int = 0
    retrievals: tuple[RetrievalRecord, ...] = ()
    routes: tuple[RouteRecord, ...] = ()
    steps: int = 0
    generated: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, for JSON."""
        return asdict(self)

    def _recalled(self, row: int) -> list[str]:
        """One line about the chunks of a row that stand raw now."""
        records = [record for record in self.retrievals if record.row == row]
        if not records:
            return []
        lengths = {record.length for record in records}
        last = [f"{r.chunk} ({r.reason})" for r in records if r.length == records[-1].length]
        times = f", chosen {len(lengths)} times" if len(lengths) > 1 else ""
        return [f"       recalled at {records[-1].length} tokens: chunks {', '.join(last)}{times}"]

    def __str__(self) -> str:
        if not self.rows:
            return "Nothing was read yet."
        lines = []
        for i, row in enumerate(self.rows):
            retrieved = f"{row.retrieved} recalled, " if row.retrieved else ""
            lines.append(
                f"row {i}: {row.tokens} tokens in {row.slots} slots "
                f"({row.prefix} prefix, {row.soft} soft, {retrieved}{row.raw} raw window)"
            )
            lines += self._recalled(i)
            lines += [f"       window from {r.length} tokens on: {r.expert or 'plain host'} ({r.verdict})"
                      for r in self.routes if r.row == i]  # fmt: skip
        if self.chunks:
            lines.append("row  chunk        span  tokens  residual   TRA  copied" + "  expert" * bool(self.routes))
            for c in self.chunks:
                reconstruction_nll = "       -" if c.reconstruction_nll is None else f"{c.reconstruction_nll:>8.3f}"
                accuracy = "   -" if c.accuracy is None else f"{c.accuracy:>4.0%}"
                span = f"{f'{c.start}-{c.end}':>10}"
                line = (
                    f"{c.row:>3}  {c.index:>5}  {span}  {c.tokens:>6}  {reconstruction_nll}  {accuracy}  {c.copied:>6}"
                )
                lines.append(line + (f"  {c.expert or 'plain host'} ({c.verdict})" if c.verdict else ""))
        else:
            lines.append("Nothing was compressed: the history is shorter than window and chunk together.")
        if self.archive_tokens:
            lines.append(
                f"Copying: {self.copied} tokens came from an archive of {self.archive_tokens:,} tokens "
                f"({self.archive_bytes:,} bytes of main memory, {self.index_bytes:,} of index)"
            )
        elif self.chunks and not self.soft and not self.retrievals:
            lines.append("The chunks are dropped: neither soft prompts nor copying reads them.")
        if self.steps:
            rate = self.generated / self.steps
            lines.append(f"Decoding: {self.generated} tokens in {self.steps} steps of the host, {rate:.2f} a step")
        lines.append(
            f"KV: {self.kv_bytes:,} bytes at the peak of {self.peak_slots} slots; "
            f"{self.kv_bytes_full:,} for the full history"
        )
        return "\n".join(lines)


class Trace:
    """What a report needs of a call, without its keys and values.

    Args:
        cache: of the call that ended.
        soft: whether chunks were read as soft prompts.
        copied: the tokens that copying brought: `row` and `chunk`.
        archives: of each row, with its `archive`.
        steps: of the host, and tokens that they gave.
    """

    def __init__(self, cache: CompressedCache, soft: bool, copied: Sequence[Any] = (), archives: Sequence[Any] = (),
                 steps: tuple[int, int] = (0, 0)):  # fmt: skip
        self.soft, self.steps = soft, steps
        self.copied = Counter((place.row, place.chunk) for place in copied)
        archives = list({id(past.archive): past.archive for past in archives}.values())  # beams share theirs
        self.archive = tuple(map(sum, ([len(a) for a in archives], [a.nbytes for a in archives],
                                       [a.index_bytes for a in archives])))  # fmt: skip
        width, batch = cache.width, len(cache.rows)
        self.rows, self.chunks, self.retrievals, self.routes = [], [], [], []
        for i, row in enumerate(cache.rows):
            length = width - row.pad
            latents = sum(len(c.soft) for c in row.chunks if c.soft is not None)
            prefix = min(row.prefix or 0, length) if row.chunks else 0
            retrieved = sum(c.end - c.start for c in row.retrieved)
            raw = length - (row.raw_start if row.chunks else 0)
            self.rows.append(RowRecord(length, prefix, latents, raw, retrieved))
            self.retrievals += [
                RetrievalRecord(i, choice.at, chunk, scores)
                for choice in row.choices
                for chunk, scores in zip(choice.chunks, choice.scores, strict=True)
            ]
            self.routes += [RouteRecord(i, r.at, *_decision(r.route)) for r in row.routes]
            self.chunks += [(i, j, c.start, c.end, c.ids, c.route) for j, c in enumerate(row.chunks)]
        self.slots, self.peak = cache.layout.shape[1], cache.peak
        self.kv_bytes = batch * cache.slot_bytes(cache.peak)
        self.kv_bytes_full = batch * cache.slot_bytes(max(row.tokens for row in self.rows))
        self.measured: list[tuple[float, float]] = []

    def report(self, crouter: CRouterModel | None) -> HistoryReport:
        """The report; chunks are rebuilt by the crouter at the first time, a few at once."""
        if crouter is not None and len(self.measured) < len(self.chunks):
            self.measured = _measure(crouter, [chunk[4] for chunk in self.chunks])
        records = []
        for k, (row, index, start, end, ids, route) in enumerate(self.chunks):
            reconstruction_nll, accuracy = self.measured[k] if self.measured else (None, None)
            served = _decision(route) if route is not None else (None, "", None)
            records.append(
                ChunkRecord(
                    row, index, start, end, len(ids), reconstruction_nll, accuracy, self.copied[row, index], *served
                )
            )
        steps, generated = self.steps
        return HistoryReport(
            tuple(records), tuple(self.rows), self.slots, self.peak, self.kv_bytes, self.kv_bytes_full, self.soft,
            self.copied.total(), *self.archive, retrievals=tuple(self.retrievals), routes=tuple(self.routes),
            steps=steps, generated=generated,
        )  # fmt: skip


def _decision(route: Route) -> tuple[str | None, str, float | None]:
    """Expert, verdict and margin; JSON knows no infinity."""
    return route.expert, route.verdict, route.margin if math.isfinite(route.margin) else None


@torch.no_grad()
def _measure(crouter: CRouterModel, pieces: list[torch.Tensor]) -> list[tuple[float, float]]:
    """Residual (nats/token) and TRA of chunks; equal ones (of beams) are measured once."""
    unique = {piece.numpy().tobytes(): piece for piece in pieces}
    keys, values = list(unique), []
    for first in range(0, len(keys), BATCH):
        batch = [unique[key] for key in keys[first : first + BATCH]]
        ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True)
        mask = torch.arange(ids.shape[1]) < torch.tensor([len(piece) for piece in batch])[:, None]
        out = crouter(ids.to(crouter.device), mask.to(crouter.device))
        values += zip(out.reconstruction_nll.tolist(), out.reconstruction_accuracy.tolist(), strict=True)
    found = dict(zip(keys, values, strict=True))
    return [found[piece.numpy().tobytes()] for piece in pieces]
