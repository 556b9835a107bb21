"""Progress of a fetch: a bar on a terminal, one line a step elsewhere."""

from __future__ import annotations

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class FetchProgress:
    """Shows steps on standard error.

    Args:
        enabled: nothing is shown where false.
    """

    def __init__(self, enabled: bool = True):
        self.enabled = enabled
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        # Bound to this stream: the conversion silences what others write to sys.stderr.
        console = Console(file=sys.stderr)
        if enabled and console.is_terminal:
            columns = [TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()]
            self._bar = Progress(*columns, console=console, redirect_stdout=False, redirect_stderr=False)

    def __enter__(self) -> FetchProgress:
        """Starts the display."""
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Stops the display."""
        if self._bar is not None:
            if kind is None:
                self._complete()
            self._bar.stop()

    def start(self, label: str, total: int | None = None) -> None:
        """Begins a step of `total` bytes, or of unknown size; the step before is complete."""
        if self._bar is not None:
            self._complete()
            self._task = self._bar.add_task(label, total=total)
        elif self.enabled:
            size = f" ({total / 1e6:.0f} MB)" if total else ""
            print(f"{label}{size}", file=sys.stderr, flush=True)

    def update(self, done: int) -> None:
        """Sets the bytes done in this step."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done)

    def _complete(self) -> None:
        if self._bar is None or self._task is None:
            return
        total = next(task.total for task in self._bar.tasks if task.id == self._task) or 1
        self._bar.update(self._task, total=total, completed=total)
