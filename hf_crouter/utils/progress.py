"""A progress line of the data steps: rich's bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class Meter:
    """Counts files and characters of one step after another and shows them.

    Args:
        enabled: nothing is shown where false; the counts are kept all the same.
        interval: seconds between plain lines.
    """

    def __init__(self, enabled: bool = True, interval: float = 5.0):
        console = Console(stderr=True)
        self.enabled = enabled
        self.interval = interval
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        if enabled and console.is_terminal:
            columns = [TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[counts]}")]
            self._bar = Progress(*columns, TimeRemainingColumn(), console=console)
        self.label = ""
        self.total: int | None = None
        self.files = self.characters = 0
        self._begin = self._shown = time.monotonic()

    def __enter__(self) -> Meter:
        """Starts the display."""
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Stops the display, so that a traceback or the next line starts in a clean place."""
        if self._bar is not None:
            self._bar.stop()

    def start(self, label: str, total: int | None = None) -> None:
        """Begins a step.

        Args:
            label: what the step does.
            total: files to expect, for the time left; None if unknown.
        """
        self.label, self.total = label, total
        self.files = self.characters = 0
        self._begin = self._shown = time.monotonic()
        if self._bar is not None:
            self._task = self._bar.add_task(label, total=total, counts="")

    def advance(self, files: int, characters: int) -> None:
        """Adds to the step's counts."""
        self.files += files
        self.characters += characters
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self.files, counts=self._counts())
        elif self.enabled and time.monotonic() - self._shown > self.interval:
            self._shown = time.monotonic()
            left = ""
            if self.total and self.files:
                left = f", {(self._shown - self._begin) * (self.total - self.files) / self.files:.0f} s left"
            print(f"{self.label}: {self._counts()}{left}", file=sys.stderr, flush=True)

    def finish(self, note: str = "") -> None:
        """Ends the step, with `note` as its result."""
        seconds = time.monotonic() - self._begin
        if self._bar is not None and self._task is not None:
            counts = f"{self._counts()}  {note}"
            self._bar.update(self._task, total=max(self.files, 1), completed=max(self.files, 1), counts=counts)
        elif self.enabled:
            print(f"{self.label}: {self._counts()} in {seconds:.1f} s{', ' if note else ''}{note}", file=sys.stderr)

    def _counts(self) -> str:
        seconds = max(time.monotonic() - self._begin, 1e-6)
        return f"{self.files:,} files, {self.characters / 1e6:,.1f} MB, {self.characters / 1e6 / seconds:.1f} MB/s"
