"""How far work is, on standard error: rich's bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars


class Progress:
    """Steps of work, one after another, with rate and time left.

    Args:
        enabled: nothing is shown where false; what is done is counted all the same.
        interval: seconds between plain lines.
        transient: whether bars go when the work is done.

    Example:
        >>> with Progress() as progress:
        ...     progress.start("reading", total=20, unit="files", amount="bytes")
        ...     progress.advance(1, 1 << 20)
        ...     progress.finish()
    """

    def __init__(self, enabled: bool = True, interval: float = 5.0, transient: bool = False):
        self.enabled, self.interval = enabled, interval
        self.stream = sys.stderr  # bound now: work may redirect sys.stderr to silence others
        console = Console(file=self.stream)
        self._bars: Bars | None = None
        self._task = TaskID(0)
        if enabled and console.is_terminal:
            columns = [TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(show_speed=False),
                       TextColumn("{task.fields[text]}"), TimeRemainingColumn()]  # fmt: skip
            self._bars = Bars(*columns, console=console, transient=transient, redirect_stdout=False)
        self.start("")

    def __enter__(self) -> Progress:
        """Starts the display."""
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Stops the display, so that a traceback or the next line starts in a clean place."""
        if self._bars is not None:
            self._bars.stop()

    def start(
        self, label: str, total: float | None = None, unit: str = "", amount: str = "", *, done: float = 0.0
    ) -> None:
        """Begins a step.

        Args:
            label: what the step does.
            total: what there is to do, for the time left; None if unknown.
            unit: of `total`; "bytes" are shown in MB.
            amount: unit of a second count, which the rate is of; "" where there is none.
            done: what was done earlier; it says nothing about the time left.
        """
        self.label, self.total, self.unit, self.amount_unit = label, total, unit, amount
        self.done = self._first = done
        self.amount = 0.0
        self._began = self._shown = time.monotonic()
        if self._bars is not None and label:
            self._task = self._bars.add_task(label, total=total, completed=done, text="")  # type: ignore[arg-type]

    def advance(self, count: float = 1, amount: float = 0.0) -> None:
        """Adds to what is done, and to the second count."""
        self.amount += amount
        self.update(self.done + count)

    def update(self, done: float, total: float | None = None, text: str | None = None) -> None:
        """Says what is done.

        Args:
            done: since the step began, and before.
            total: what there is to do, where that was unknown.
            text: shown in place of counts and rate.
        """
        self.done, self.total = done, self.total if total is None else total
        text = self.counts() if text is None else text
        if self._bars is not None:
            self._bars.update(self._task, completed=done, total=self.total, text=text)
        elif self.enabled and time.monotonic() - self._shown >= self.interval:
            self._shown = time.monotonic()
            share = f" {self.done / self.total:6.1%}" if self.total else ""
            self._print(f"{self.label}{share}", text, self._time_left())

    def finish(self, note: str = "") -> None:
        """Ends a step, with `note` as its result."""
        if self._bars is not None:
            full = max(self.done, 1)
            self._bars.update(self._task, total=full, completed=full, text=f"{self.counts()}  {note}")
        elif self.enabled:
            self._print(self.label, self.counts(), f"in {self._seconds():.1f} s", note)

    def counts(self) -> str:
        """What is done and how fast."""
        done, amount = self.done - self._first, self.amount
        parts = [_shown(self.done, self.unit)] if self.unit else []
        if self.amount_unit:
            parts.append(_shown(amount, self.amount_unit))
            done = amount
        unit = self.amount_unit or self.unit
        return "  ".join([*parts, f"{_shown(done / self._seconds(), unit)}/s"] if unit else [])

    def _seconds(self) -> float:
        return max(time.monotonic() - self._began, 1e-6)

    def _time_left(self) -> str:
        done = self.done - self._first
        if self.total is None or done <= 0:
            return ""
        return f"{self._seconds() * (self.total - self.done) / done:,.0f} s left"

    def _print(self, *parts: str) -> None:
        print("  ".join(part for part in parts if part), file=self.stream, flush=True)


@contextmanager
def progress(
    label: str, unit: str = "", *, enabled: bool = True, transient: bool = True
) -> Iterator[Callable[[float, float], None]]:
    """One step of work whose size is told while it runs.

    Args:
        label: what it does.
        unit: what is counted.
        enabled: nothing is shown where false.
        transient: whether a bar goes when the work is done.

    Yields:
        A function that takes the units done and their total.
    """
    with Progress(enabled, transient=transient) as shown:
        shown.start(label, unit=unit)
        yield lambda done, total: shown.update(done, total)


def _shown(count: float, unit: str) -> str:
    if unit == "bytes":
        return f"{count / 1e6:,.1f} MB"
    return f"{count:,.1f} {unit}" if 0 < count < 10 and count % 1 else f"{count:,.0f} {unit}"
