"""Where downloads and data live, and how a file or folder is written: whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import InputError

_UMASK = os.umask(0)
os.umask(_UMASK)


def cache_home() -> Path:
    """The folder of everything downloaded: `$HF_CROUTER_HOME`, else `~/.cache/hf_crouter`."""
    home = os.environ.get("HF_CROUTER_HOME")
    return Path(home).expanduser() if home else Path.home() / ".cache" / "hf_crouter"


@contextlib.contextmanager
def clear_write_errors(target: str | Path) -> Iterator[None]:
    """Turns a full disk, a missing right or quota under `target` into one line.

    Raises:
        InputError: in place of an `OSError` while writing.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(f"cannot write {target}: the disk is full") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST):
            raise InputError(f"cannot write {target}: {error.strerror}") from error
        raise
    except Exception as error:
        if "no space left" in str(error).lower():  # safetensors hides the error's number in its text
            raise InputError(f"cannot write {target}: the disk is full") from error
        raise


@contextlib.contextmanager
def replaced_file(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`, moved over it if the block succeeds and removed if it fails.

    Raises:
        InputError: if the disk is full or `path` cannot be written.
    """
    path = Path(path)
    with clear_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # In the same folder: only a rename within one file system is atomic.
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        try:
            yield Path(name)
            os.chmod(name, path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~_UMASK)
            os.replace(name, path)
        finally:
            Path(name).unlink(missing_ok=True)


@contextlib.contextmanager
def temporary_folder_beside(path: str | Path) -> Iterator[Path]:
    """A new empty folder next to `path`, on the same file system, removed at the end if it still exists.

    Raises:
        InputError: if the disk is full or the folder cannot be written.
    """
    path = Path(path)
    with clear_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def replaced_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place if the block succeeds and is removed if it fails.

    What stood at `path` before is gone afterwards, but only once the new folder stands there.

    Raises:
        InputError: if the disk is full or the folder cannot be written.
    """
    path = Path(path)
    with temporary_folder_beside(path) as temporary:
        yield temporary
        temporary.chmod(0o777 & ~_UMASK)  # made for its owner alone
        if not path.exists():
            temporary.rename(path)
            return
        # Two folders cannot be exchanged in one step everywhere.
        old = temporary.with_name(f"{temporary.name}.old")
        path.rename(old)
        try:
            temporary.rename(path)
        except BaseException:
            old.rename(path)
            raise
        shutil.rmtree(old, ignore_errors=True)


def write_json(path: str | Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically."""
    with replaced_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
