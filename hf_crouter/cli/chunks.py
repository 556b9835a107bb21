"""The table of chunks that several commands end with."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, TextIO

from ..crouter import CRouterModel
from ..crouter.fingerprint import crouter_fingerprint
from ..generation.report import HistoryReport
from ..routing.calibration import UNCALIBRATED, Calibration, load_calibration, reconstruction_grade
from .console import Column, note, print_table

GRADES = ("rebuildable", "uncertain", "foreign")


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
    """One chunk for JSON; `start` and `end` count host tokens, `reconstruction_nll` is in nats/token."""
    record: dict[str, Any] = {"chunk": chunk}
    if span:
        record |= {"start": span[0], "end": span[1]}
    found = reconstruction_grade(calibration, reconstruction_nll) if reconstruction_nll is not None else None
    measured = {"accuracy": accuracy, "reconstruction_nll": reconstruction_nll, "reconstruction_grade": found}
    return record | {"tokens": tokens} | measured


def chunk_records(report: HistoryReport, calibration: Calibration | None) -> list[dict[str, Any]]:
    """The chunks of a report of one row; with experts also `expert`, `route_status` and `margin`."""
    return [
        chunk_record(c.index, c.tokens, c.accuracy, c.reconstruction_nll, calibration, (c.start, c.end))
        | ({"expert": c.expert, "route_status": c.route_status, "margin": c.margin} if c.route_status else {})
        for c in report.chunks
    ]


def print_chunks(records: Iterable[dict[str, Any]], stream: TextIO | None = None) -> None:
    """Prints chunks as a table, to stdout by default."""
    records = list(records)
    spans = any("start" in record for record in records)
    routed = any("route_status" in record for record in records)
    columns = [Column("chunk"), *([Column("host tokens")] if spans else []), Column("tokens"), Column("TRA %"),
               Column("NLL nats/token"), Column("grade", right=False),
               *([Column("expert", right=False)] if routed else [])]  # fmt: skip
    rows = []
    for record in records:
        measured = record["reconstruction_nll"] is not None
        rows.append((
            str(record["chunk"]),
            *([f"{record['start']}-{record['end']}"] if spans else []),
            str(record["tokens"]),
            f"{100 * record['accuracy']:.1f}" if measured else "-",
            f"{record['reconstruction_nll']:.3f}" if measured else "-",
            record["reconstruction_grade"] or "dropped",
            *([f"{record['expert'] or 'plain host'} ({record['route_status']})"] if routed else []),
        ))  # fmt: skip
    print_table(columns, rows, stream=stream or sys.stdout)


def summary(records: Sequence[dict[str, Any]]) -> str:
    """All chunks in one line: their number, the share of tokens rebuilt exactly, and how many got which grade."""
    tokens = sum(record["tokens"] for record in records)
    accuracy = sum(record["accuracy"] * record["tokens"] for record in records) / tokens
    counts = Counter(record["reconstruction_grade"] for record in records)
    grades = ", ".join(f"{counts[name]} {name}" for name in (*GRADES, UNCALIBRATED) if counts[name])
    plural = "chunk" if len(records) == 1 else "chunks"
    return f"{len(records)} {plural}: TRA {100 * accuracy:.1f}%; {grades}"
