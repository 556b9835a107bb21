"""The corpus `text-files`: files, folders and globs."""

from __future__ import annotations

import glob
import gzip
import json
from collections.abc import Iterator
from pathlib import Path

from ..errors import InputError
from ..utils.progress import Progress
from .documents import Document

_SUFFIXES = """
.txt .text .md .markdown .rst .adoc .tex .org .html .xml .csv .tsv .json .jsonl .yaml .yml .toml .ini .cfg .log
.py .pyi .ipynb .c .h .cc .cpp .hpp .cu .rs .go .java .kt .scala .js .mjs .ts .tsx .jsx .css .rb .php .pl .lua
.r .jl .m .swift .cs .fs .hs .ml .ex .erl .clj .sh .bash .zsh .sql .proto .cmake .diff .patch
"""
SUFFIXES = frozenset(_SUFFIXES.split())


def text_files(argument: str, progress: Progress | None = None) -> Iterator[Document]:
    """Yields the text of files, of all text files below folders, and of what globs match.

    A `.jsonl` or `.jsonl.gz` file holds one document a line, in the field `text` (`id` and `group` if there). Files
    named outright are read whatever their suffix; ids are paths below the named folder, with its name in front.

    Args:
        argument: paths or globs, joined by commas.
        progress: shows it.

    Raises:
        InputError: if a path does not exist, a glob matches nothing, or a named file is not UTF-8 text.
    """
    progress = progress or Progress(enabled=False)
    entries = [entry.strip() for entry in argument.split(",") if entry.strip()]
    if not entries:
        raise InputError("text-files needs paths: text-files:PATH[,PATH...]")
    files: dict[str, tuple[Path, bool]] = {}
    for entry in entries:
        _collect(Path(entry).expanduser(), files)
    return _read_all(files, progress)


def _collect(path: Path, files: dict[str, tuple[Path, bool]]) -> None:
    if path.is_dir():
        name = path.resolve().name
        for file in sorted(path.rglob("*")):
            hidden = any(part.startswith(".") or part == "__pycache__" for part in file.relative_to(path).parts)
            if not hidden and file.is_file() and _is_text(file):
                _add(f"{name}/{file.relative_to(path).as_posix()}", file, False, files)
    elif path.is_file():
        _add(path.name, path, True, files)
    elif glob.has_magic(str(path)):
        matches = sorted(glob.glob(str(path), recursive=True))
        if not matches:
            raise InputError(f"no file matches {path}")
        # Below the part of the pattern that holds no wildcard, ids are unique.
        base = next(parent for parent in path.parents if not glob.has_magic(str(parent)))
        for match in matches:
            if Path(match).is_file():
                _add(Path(match).relative_to(base).as_posix(), Path(match), False, files)
    else:
        raise InputError(f"no such file or folder: {path}")


def _add(name: str, path: Path, strict: bool, files: dict[str, tuple[Path, bool]]) -> None:
    unique, number = name, 2
    while unique in files and files[unique][0].resolve() != path.resolve():
        unique = f"{name}@{number}"
        number += 1
    files[unique] = (path, strict)


def _is_text(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES or path.name.lower().endswith(".jsonl.gz")


def _read_all(files: dict[str, tuple[Path, bool]], progress: Progress) -> Iterator[Document]:
    progress.start("reading text files", len(files), "files", "bytes")
    for name in sorted(files):
        path, strict = files[name]
        group = name.rpartition("/")[0] or path.resolve().parent.name
        read = 0
        try:
            for document in _documents(name, group, path):
                read += len(document.text)
                yield document
        except (UnicodeDecodeError, OSError, EOFError) as error:
            if strict:
                raise InputError(f"cannot read {path} as UTF-8 text: {error}") from error
        progress.advance(1, read)
    progress.finish()


def _documents(name: str, group: str, path: Path) -> Iterator[Document]:
    lower = path.name.lower()
    if not lower.endswith((".jsonl", ".jsonl.gz")):
        text = path.read_text(encoding="utf-8-sig")
        if "\0" in text:
            raise UnicodeDecodeError("utf-8", b"\0", 0, 1, "binary data")
        if text.strip():
            yield Document(name, group, text)
        return
    with gzip.open(path, "rt", encoding="utf-8") if lower.endswith(".gz") else path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                text = row["text"]
                if not isinstance(text, str):
                    raise TypeError
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise InputError(f'{path}, line {number + 1}: expected a JSON object with a string "text"') from error
            if text.strip():
                identity = f"{name}/{row.get('id', f'{number:08d}')}"
                yield Document(identity, str(row.get("group", group)), text)
