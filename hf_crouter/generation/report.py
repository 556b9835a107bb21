"""What became of a history: chunks, how well they can be rebuilt, slots and bytes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..types import Fitted

_COPIES = 12  # spans that are printed


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
        route_status: how clearly, see `Route.status`; empty without experts.
        margin: see `Route`; None without experts, or where only one was compared.
        slots: of its entries.
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
    route_status: str = ""
    margin: float | None = None
    slots: int = 0


@dataclass(frozen=True)
class RouteRecord:
    """The expert of a row's raw window from some length on.

    Attributes:
        row: row of the batch.
        length: tokens of the row when it was decided.
        expert: whose adapter served; None: the plain host.
        route_status: see `Route.status`.
        margin: see `Route`; None where only one expert was compared.
    """

    row: int
    length: int
    expert: str | None
    route_status: str
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
class CopyRecord:
    """A span of generated tokens that copying brought, and the span that it repeats.

    Places are tokens of the row, counted from its first real one.

    Attributes:
        row: row of the batch.
        sequence: of those that came; the row's own number where each row gave one.
        start: first generated token.
        end: token after the last.
        chunk: number of the chunk that the first one was copied from.
        source_start: first token that is repeated (by `Copy(source="rebuilt")` what was rebuilt there, which may
            be another); None where places in a chunk are not known (a crouter with another tokenizer).
        source_end: token after the last; likewise.
        text: what was copied; empty without a tokenizer.
        characters: `(start, end)` of the source in the row's text (decoded, without special tokens at its very
            start, so behind a chat template's first mark); None without a tokenizer, or without places.
    """

    row: int
    sequence: int
    start: int
    end: int
    chunk: int
    source_start: int | None
    source_end: int | None
    text: str = ""
    characters: tuple[int, int] | None = None

    def __str__(self) -> str:
        where = f"chunk {self.chunk}"
        if self.source_start is not None:
            where = f"{self.source_start}-{self.source_end} ({where})"
        if self.characters is not None:
            where += f", characters {self.characters[0]}-{self.characters[1]}"
        return f"{self.start}-{self.end} from {where}" + (f": {_shown(self.text)}" if self.text else "")


def _shown(text: str, most: int = 60) -> str:
    """A text in quotes on one line, its middle left out where it is long."""
    half = most // 2
    return repr(text if len(text) <= most else f"{text[:half]} … {text[-half:]}")


@dataclass(frozen=True)
class RowRecord:
    """Where one row's tokens stand at the end of the call; counts of slots.

    Attributes:
        tokens: real tokens of the row.
        prefix: slots of the raw prefix.
        entries: slots of chunks' entries.
        raw: slots of the raw window.
        retrieved: slots of chunks that stand raw before the window.
    """

    tokens: int
    prefix: int
    entries: int
    raw: int
    retrieved: int = 0

    @property
    def slots(self) -> int:
        """All of the row's slots."""
        return self.prefix + self.entries + self.retrieved + self.raw


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
        entries: whether chunks put entries into the cache; otherwise the host attends to none of them.
        copied: generated tokens that copying brought.
        copies: in spans, and where what they repeat stands.
        archive_tokens: tokens that can be copied, all rows.
        archive_bytes: their ids (and confidences) in main memory, indexes left out.
        index_bytes: bytes of the indexes over them, which are made again when needed.
        retrievals: every chunk of every retrieval, row after row; the last of a row are those that stand there.
        routes: every decision on a raw window, row after row; empty without experts.
        steps: of the host in `generate`, the reading of the prompt included; 0 after `score`.
        generated: tokens a row that these steps gave; more than one a step where drafts were accepted.
        modes: names of the ways to read.
        fitted: whether each part that reads (projector, gate, experts) was fitted to this very copy of the host or to
            a twin of it.
    """

    chunks: tuple[ChunkRecord, ...]
    rows: tuple[RowRecord, ...]
    slots: int
    peak_slots: int
    kv_bytes: int
    kv_bytes_full: int
    entries: bool
    copied: int = 0
    archive_tokens: int = 0
    archive_bytes: int = 0
    index_bytes: int = 0
    retrievals: tuple[RetrievalRecord, ...] = ()
    routes: tuple[RouteRecord, ...] = ()
    steps: int = 0
    generated: int = 0
    modes: tuple[str, ...] = ()
    fitted: tuple[Fitted, ...] = ()
    copies: tuple[CopyRecord, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, for JSON."""
        return asdict(self)

    def _retrieved(self, row: int) -> list[str]:
        """One line about the chunks of a row that stand raw now."""
        records = [record for record in self.retrievals if record.row == row]
        if not records:
            return []
        lengths = {record.length for record in records}
        last = [f"{r.chunk} ({r.reason})" for r in records if r.length == records[-1].length]
        times = f", chosen {len(lengths)} times" if len(lengths) > 1 else ""
        return [f"       retrieved at {records[-1].length} tokens: chunks {', '.join(last)}{times}"]

    def __str__(self) -> str:
        if not self.rows:
            return "Nothing was read yet."
        lines = []
        for i, row in enumerate(self.rows):
            retrieved = f"{row.retrieved} retrieved, " if row.retrieved else ""
            lines.append(
                f"row {i}: {row.tokens} tokens in {row.slots} slots "
                f"({row.prefix} prefix, {row.entries} entries, {retrieved}{row.raw} raw window)"
            )
            lines += self._retrieved(i)
            lines += [f"       window from {r.length} tokens on: {r.expert or 'plain host'} ({r.route_status})"
                      for r in self.routes if r.row == i]  # fmt: skip
        if self.modes:
            lines.append(f"Read by: {', '.join(self.modes)}")
        lines += map(str, self.fitted)
        if self.chunks:
            lines.append("row  chunk        span  tokens  nats/token   TRA  copied" + "  expert" * bool(self.routes))
            for c in self.chunks:
                nll = "         -" if c.reconstruction_nll is None else f"{c.reconstruction_nll:>10.3f}"
                accuracy = "   -" if c.accuracy is None else f"{c.accuracy:>4.0%}"
                span = f"{f'{c.start}-{c.end}':>10}"
                line = f"{c.row:>3}  {c.index:>5}  {span}  {c.tokens:>6}  {nll}  {accuracy}  {c.copied:>6}"
                lines.append(line + (f"  {c.expert or 'plain host'} ({c.route_status})" if c.route_status else ""))
        else:
            prefix = max(row.prefix for row in self.rows)
            behind = f" behind the first {prefix} tokens, which stay raw," if prefix else ""
            lines.append(f"Nothing was compressed:{behind} the history is shorter than window and chunk together.")
        if self.archive_tokens:
            lines.append(
                f"Copying: {self.copied} tokens came from an archive of {self.archive_tokens:,} tokens "
                f"({self.archive_bytes:,} bytes of main memory, {self.index_bytes:,} of index)"
            )
            lines += [f"       tokens {copy}" for copy in self.copies[:_COPIES]]
            if len(self.copies) > _COPIES:
                lines.append(f"       and {len(self.copies) - _COPIES} spans more (report().copies)")
        elif self.chunks and not self.entries and not self.retrievals:
            lines.append("The chunks are dropped: no mode reads them.")
        if self.steps:
            rate = self.generated / self.steps
            lines.append(f"Decoding: {self.generated} tokens in {self.steps} steps of the host, {rate:.2f} a step")
        if not self.peak_slots:
            return "\n".join(lines)
        lines.append(
            f"KV: {self.kv_bytes:,} bytes at the peak of {self.peak_slots} slots; "
            f"{self.kv_bytes_full:,} for the full history"
        )
        return "\n".join(lines)
