"""What commands print: tables for people on a terminal, aligned text in a pipe, JSON for programs.

Results go to stdout, notes and progress to stderr.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TextIO

import rich.console
import rich.table
from rich.text import Text
from transformers.utils import logging as transformers_logging

COLOURS = {
    "rebuildable": "green",
    "uncertain": "yellow",
    "foreign": "red",
    "ok": "green",
    "warn": "yellow",
    "fail": "red",
}


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        header: its name, with the unit where it has one.
        right: aligned to the right, as numbers are.
    """

    header: str
    right: bool = True


def print_table(columns: Sequence[Column], rows: Sequence[Sequence[str]], stream: TextIO | None = None) -> None:
    """Prints a table: framed and coloured on a terminal, aligned text in a pipe.

    Args:
        columns: one per cell of a row.
        rows: cells that are already formatted.
        stream: stdout by default.
    """
    stream = stream or sys.stdout
    console = rich.console.Console(file=stream)
    if console.is_terminal:
        table = rich.table.Table()
        for column in columns:
            table.add_column(column.header, justify="right" if column.right else "left", overflow="fold")
        for row in rows:
            table.add_row(*(Text(cell, style=COLOURS.get(cell, "")) for cell in row))
        console.print(table)
        return
    lines = [[column.header for column in columns], *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    for line in lines:
        cells = zip(line, widths, columns, strict=True)
        print("  ".join(c.rjust(w) if column.right else c.ljust(w) for c, w, column in cells).rstrip(), file=stream)


def print_json(value: Any) -> None:
    """Prints one JSON document to stdout; refuses NaN and infinities, which JSON does not have."""
    print(json.dumps(value, indent=2, allow_nan=False))


def note(message: str) -> None:
    """Prints one line to stderr."""
    print(message, file=sys.stderr, flush=True)


@contextmanager
def quiet() -> Iterator[None]:
    """Silences transformers' log lines, progress bars and warnings while a command runs, and only then."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def size(count: float) -> str:
    """Bytes for people, for example `1.50 MiB`."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.2f} {unit}"
        count /= 1024
    return f"{count:,.2f} GiB"
