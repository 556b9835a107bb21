"""Temporary folders that processes left behind when they were killed."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # no such locks on this system: only age tells
    fcntl = None

_LOCK = "in-use"
_OLD = 86_400  # seconds


@contextlib.contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """Marks a temporary folder as this process's for as long as the block, and the process, live."""
    if fcntl is None:
        yield
        return
    new = folder / f"{_LOCK}.new"
    with new.open("w") as file:
        with contextlib.suppress(OSError):  # a disk without locks
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            new.rename(folder / _LOCK)  # only now does another process look at it
        yield


def remove_leftovers(target: Path) -> None:
    """Removes temporary folders beside `target`, as `temporary_folder_beside` makes them, whose process is gone."""
    for path in target.parent.glob(f".{target.name}.*"):
        with contextlib.suppress(OSError):
            if path.is_dir() and _is_abandoned(path):
                shutil.rmtree(path, ignore_errors=True)


def _is_abandoned(folder: Path) -> bool:
    lock = folder / _LOCK
    if fcntl is None or not lock.exists():
        return time.time() - folder.stat().st_mtime > _OLD
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True
