"""One text of a corpus, and which source files are worth reading."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

MINIMUM, MAXIMUM = 256, 400_000  # characters


@dataclass(frozen=True)
class Document:
    """One text.

    Attributes:
        id: a stable name, such as the relative path `numpy/linalg/_linalg.py`.
        group: what it belongs to: a top-level package, a folder, a repository.
        text: the text itself.
    """

    id: str
    group: str
    text: str


def read_source(path: Path) -> str | None:
    """Text of a source file, or None if it is unreadable, undecodable, or of a useless size."""
    try:
        return decode_source(path.read_bytes())
    except OSError:
        return None


def decode_source(data: bytes) -> str | None:
    """Text of UTF-8 bytes with line feeds only, or None if undecodable, binary, or of a useless size."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text if MINIMUM <= len(text) <= MAXIMUM and "\0" not in text else None
