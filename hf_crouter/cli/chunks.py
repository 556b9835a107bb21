"""The table of chunks that several commands end with."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, TextIO

from ..crouter import CRouterModel
from ..crouter.fingerprint import crouter_fingerprint
from ..generation.report import HistoryReport
from ..routing.calibration import UNCALIBRATED, Calibration, load_calibration, verdict
from .console import Column, note, print_table

VERDICTS = ("rebuildable", "uncertain", "foreign")


def calibration_of(crouter: CRouterModel, name: str | None) -> Calibration | None:
    """The calibration beside a crouter; None, with a note, where it belongs to other weights.

    Args:
        crouter: as loaded.
        name: what it was loaded by; None for the shipped one.
    """
    calibration = load_calibration(name)
    if calibration and calibration.fingerprint != crouter_fingerprint(crouter, decoder=True):
        note("note: calibration.json belongs to other weights and is not used (hf-crouter doctor tells more)")
        return None
    return calibration


def chunk_record(
    chunk: int,
    tokens: int,
    accuracy: float | None,
    reconstruction_nll: float | None,
    calibration: Calibration | None,
    span: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """One chunk for JSON: `chunk`, `start` and `end` (host tokens), `tokens`, `accuracy`, `reconstruction_nll`, `verdict`."""
    record: dict[str, Any] = {"chunk": chunk}
    if span:
        record |= {"start": span[0], "end": span[1]}
    found = verdict(calibration, reconstruction_nll) if reconstruction_nll is not None else None
    return record | {"tokens": tokens, "accuracy": accuracy, "residual": reconstruction_nll, "verdict": found}


def chunk_records(report: HistoryReport, calibration: Calibration | None) -> list[dict[str, Any]]:
    """The chunks of a history's report, one row of the batch; with experts also `expert`, `route` and `margin`."""
    return [
        chunk_record(c.index, c.tokens, c.accuracy, c.reconstruction_nll, calibration, (c.start, c.end))
        | ({"expert": c.expert, "route": c.verdict, "margin": c.margin} if c.verdict else {})
        for c in report.chunks
    ]


def print_chunks(records: Iterable[dict[str, Any]], stream: TextIO | None = None) -> None:
    """Prints chunks as a table, to stdout by default."""
    records = list(records)
    spans = any("start" in record for record in records)
    routed = any("route" in record for record in records)
    columns = [Column("chunk"), *([Column("host tokens")] if spans else []), Column("tokens"), Column("TRA %"),
               Column("residual nats/token"), Column("verdict", right=False),
               *([Column("expert", right=False)] if routed else [])]  # fmt: skip
    rows = []
    for record in records:
        measured = record["residual"] is not None
        rows.append((
            str(record["chunk"]),
            *([f"{record['start']}-{record['end']}"] if spans else []),
            str(record["tokens"]),
            f"{100 * record['accuracy']:.1f}" if measured else "-",
            f"{record['residual']:.3f}" if measured else "-",
            record["verdict"] or "dropped",
            *([f"{record['expert'] or 'plain host'} ({record['route']})"] if routed else []),
        ))  # fmt: skip
    print_table(columns, rows, stream=stream or sys.stdout)


def summary(records: Sequence[dict[str, Any]]) -> str:
    """All chunks in one line: their number, the share of tokens rebuilt exactly, and how many got which verdict."""
    tokens = sum(record["tokens"] for record in records)
    accuracy = sum(record["accuracy"] * record["tokens"] for record in records) / tokens
    counts = Counter(record["verdict"] for record in records)
    verdicts = ", ".join(f"{counts[name]} {name}" for name in (*VERDICTS, UNCALIBRATED) if counts[name])
    plural = "chunk" if len(records) == 1 else "chunks"
    return f"{len(records)} {plural}: TRA {100 * accuracy:.1f}%; {verdicts}"
