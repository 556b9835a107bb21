"""What the peers read and write: rows of documents, files of questions, arrays of results; no transformers here."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save_file


class BadInput(ValueError):
    """Something to read is missing or does not fit."""


@dataclass(frozen=True)
class Layout:
    """Of a row `[prefix | chunks | window | target]`, in tokens."""

    prefix: int
    chunk: int
    chunks: int
    window: int
    target: int

    @property
    def length(self) -> int:
        """Of a row."""
        return self.prefix + self.chunks * self.chunk + self.window + self.target

    def context(self, rows: np.ndarray, count: int) -> np.ndarray:
        """Rows `[D, length]` to what is read before the target, `[D, prefix + count · chunk + window]`."""
        end = self.length - self.target
        start = end - self.window - count * self.chunk
        return np.concatenate([rows[:, : self.prefix], rows[:, start:end]], axis=1)


def budget(prefix: int, window: int, count: int, entries: int) -> int:
    """Positions to keep of every layer and KV head, on average: the raw ones, and so many entries for each chunk."""
    return prefix + count * entries + window


@dataclass(frozen=True, eq=False)
class Rows:
    """A set of documents.

    Attributes:
        ids: `[D, length]`, token ids.
        lines: `[D, target]`, number of the whole line that a target token belongs to, -1 where none.
        names: of the documents.
        layout: of a row.
    """

    ids: np.ndarray
    lines: np.ndarray
    names: Sequence[str]
    layout: Layout


def _json(path: Path) -> Any:
    if not path.is_file():
        raise BadInput(f"{path}: expected a file, found none")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInput(f"{path}: expected JSON, got {error}") from None


def read_set(folder: Path, name: str) -> Rows:
    """A set of documents, `<name>.json` and `<name>.safetensors`.

    Raises:
        BadInput: a file is missing, or the two do not fit each other.
    """
    about, path = _json(folder / f"{name}.json"), folder / f"{name}.safetensors"
    try:
        layout = Layout(**about["layout"])
        names = [str(record["name"]) for record in about["documents"]]
        lengths = vars(layout).values()
        if not all(isinstance(n, int) and n > 0 for n in lengths):
            raise ValueError(f"lengths {list(lengths)}")
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{folder / name}.json: expected a layout and named documents, got {error!r}") from None
    if not path.is_file():
        raise BadInput(f"{path}: expected a file, found none")
    arrays = load_file(path)
    for key, width in (("ids", layout.length), ("lines", layout.target)):
        shape = arrays[key].shape if key in arrays else "none"
        if shape != (len(names), width):
            raise BadInput(f"{path}: expected {key} of shape {(len(names), width)}, got {shape}")
    return Rows(arrays["ids"], arrays["lines"], names, layout)


def sets_in(folder: Path) -> list[str]:
    """Names of the sets in a folder."""
    return sorted(path.stem for path in folder.glob("*.json") if path.with_suffix(".safetensors").is_file())


@dataclass(frozen=True)
class Question:
    """A prompt to be answered.

    Attributes:
        ids: of the prompt, with the chat template around it.
        prefix: tokens at its start that are always kept.
        count: whole chunks between those and the window.
    """

    ids: tuple[int, ...]
    prefix: int
    count: int


@dataclass(frozen=True)
class Questions:
    """Of one file: the questions, raw tokens at a prompt's end, and how an answer ends."""

    questions: Sequence[Question]
    window: int
    most: int
    stop: frozenset[int]


def read_questions(path: Path) -> Questions:
    """The questions of a file `<set>.<length>.json`.

    Raises:
        BadInput: it is missing or lacks something.
    """
    content = _json(path)
    try:
        chunk, window = int(content["chunk"]), int(content["window"])
        questions = []
        for question in content["questions"]:
            ids, prefix = tuple(map(int, question["ids"])), int(question["prefix"])
            if len(ids) < 2 or prefix < 0 or chunk < 1:
                raise ValueError(f"{len(ids)} ids, prefix {prefix}, chunk {chunk}")
            questions.append(Question(ids, prefix, max(0, (len(ids) - prefix - window) // chunk)))
        stop = frozenset(map(int, content.get("stop_ids", ())))
        return Questions(questions, window, int(content["max_new_tokens"]), stop)
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{path}: expected questions with ids and a prefix, got {error!r}") from None


def chosen(count: int, most: int | None, shard: tuple[int, int]) -> np.ndarray:
    """Numbers of a shard's part of the first `most` of so many documents: any first part is a fair sample."""
    return np.arange(count if most is None else min(count, most), dtype=np.int64)[shard[0] :: shard[1]]


def save_arrays(path: Path, arrays: dict[str, np.ndarray], about: dict[str, Any]) -> None:
    """Writes a safetensors file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, part, {"about": json.dumps(about)})
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def about_of(path: Path) -> dict[str, Any]:
    """What `save_arrays` noted."""
    with safe_open(path, "np") as file:
        return json.loads((file.metadata() or {}).get("about", "{}"))


def save_json(path: Path, content: Any) -> None:
    """Writes a JSON file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_text(json.dumps(content), encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def same_about(path: Path, found: dict[str, Any], about: dict[str, Any]) -> None:
    """Raises unless results that were begun can be gone on with.

    Raises:
        BadInput: they are of other documents, another host or another way to measure.
    """
    if other := sorted(key for key in found.keys() | about.keys() if found.get(key) != about.get(key)):
        old, new = found.get(other[0]), about.get(other[0])
        raise BadInput(f"{path}: expected results of {other[0]} {new!r}, got {old!r}; remove it or save elsewhere")
