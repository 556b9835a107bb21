"""Real documents that hold code and prose, with their borders in tokens.

Python files with long docstrings, project descriptions with fenced Python, notebooks. Prose is whatever is not code;
no expert is "its" expert.

Axes: `P` pieces.
"""

from __future__ import annotations

import ast
import json
import re
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from eval.routing.splice import CHUNK
from eval.rows import place
from eval.sources import package_lists
from hf_crouter.data.documents import Document
from hf_crouter.data.wheels import fetch_archive
from hf_crouter.errors import InputError
from hf_crouter.utils.io import replaced_file, write_json

EDGE = 48  # tokens between a border and the piece's ends, or the next border: shorter stretches are their neighbour's
PROSE, CODE = 0, 1
CAPS = {"docstrings": 100, "descriptions": 60, "notebooks": 60}
_PYTHON = {"python", "py", "python3", "pycon"}


@dataclass(frozen=True)
class Mixed:
    """Real documents that hold code and prose.

    Attributes:
        ids: `[P, 512]`, uint16.
        labels: `[P, 512]`, uint8: `PROSE` or `CODE`.
        kinds: `docstrings`, `descriptions` or `notebooks`, for each.
        documents: clusters of a bootstrap.
    """

    ids: np.ndarray
    labels: np.ndarray
    kinds: list[str]
    documents: list[str]

    def borders(self, piece: int) -> np.ndarray:
        """First tokens of every stretch of a piece but its first."""
        return np.flatnonzero(np.diff(self.labels[piece].astype(np.int8))) + 1

    def save(self, folder: Path, name: str = "mixed") -> None:
        """Writes `NAME.safetensors` and `NAME.json`."""
        with replaced_file(folder / f"{name}.safetensors") as temporary:
            save_file({"ids": self.ids, "labels": self.labels}, temporary)
        write_json(folder / f"{name}.json", {"kinds": self.kinds, "documents": self.documents})

    @classmethod
    def load(cls, folder: Path, name: str = "mixed") -> Mixed:
        """Reads what `save` wrote."""
        about = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / f"{name}.safetensors")
        return cls(tensors["ids"], tensors["labels"], about["kinds"], about["documents"])


@dataclass(frozen=True)
class Labelled:
    """A text whose stretches are known.

    Attributes:
        kind: of document.
        document: its name.
        text: the text.
        code: half-open stretches of characters that are code, in order.
    """

    kind: str
    document: str
    text: str
    code: list[tuple[int, int]]


def docstrings(documents: Sequence[Document]) -> Iterator[Labelled]:
    """Python files; a docstring of 200 characters or more is prose."""
    for document in documents:
        try:
            tree = ast.parse(document.text)
        except (SyntaxError, ValueError, RecursionError):
            continue
        lines = np.cumsum([0, *(len(line) for line in document.text.splitlines(keepends=True))])
        prose = []
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
                first = node.body[0]
                if isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str):
                    start = int(lines[first.lineno - 1]) + first.col_offset  # columns are bytes: ASCII files only
                    prose.append((start, int(lines[(first.end_lineno or 1) - 1]) + (first.end_col_offset or 0)))
        prose = sorted(span for span in prose if span[1] - span[0] >= 200)
        if prose and document.text.isascii() and "\f" not in document.text:
            yield Labelled("docstrings", document.id, document.text, _complement(prose, len(document.text)))


def _complement(spans: Sequence[tuple[int, int]], length: int) -> list[tuple[int, int]]:
    ends = [0, *(edge for span in spans for edge in span), length]
    return [(start, end) for start, end in zip(ends[::2], ends[1::2], strict=True) if end > start]


def fenced(name: str, text: str) -> Labelled | None:
    """Markdown with fenced Python; None where no fence is Python or where a fence holds something else."""
    code = []
    for found in re.finditer(r"^```[ \t]*(\w*)[^\n]*\n(.*?)^```[ \t]*$", text, re.MULTILINE | re.DOTALL):
        language = found.group(1).lower()
        if language in _PYTHON:
            code.append(found.span(2))
        elif len(found.group(2)) > 150:
            text = text[: found.start()]  # what comes before it is still good
            break
    return Labelled("descriptions", name, text, code) if code else None


def notebook(name: str, data: bytes) -> Labelled | None:
    """Cells of a notebook, joined by blank lines; None where it is no Python notebook."""
    try:
        cells = json.loads(data)["cells"]
        pieces = [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
    except (ValueError, KeyError, TypeError):
        return None
    text, code = "", []
    for kind, source in pieces:
        if kind in ("code", "markdown") and source.strip():
            start = len(text)
            text += source.strip() + "\n\n"
            if kind == "code":
                code.append((start, len(text)))
    return Labelled("notebooks", name, text, code) if code else None


def archive_texts() -> Iterator[Labelled]:
    """Project descriptions and notebooks in the wheels of the measurements' packages."""
    lists = package_lists()
    for requirement in [*lists["packages"], *lists["young"], *lists["files"]]:
        archive = fetch_archive(requirement)
        if not zipfile.is_zipfile(archive):
            continue
        with zipfile.ZipFile(archive) as file:
            for entry in file.infolist():
                if entry.filename.endswith(".dist-info/METADATA"):
                    head, _, body = file.read(entry).decode("utf-8", "replace").partition("\n\n")
                    found = fenced(entry.filename, body) if "text/markdown" in head else None
                elif entry.filename.endswith(".ipynb") and entry.file_size < 4_000_000:
                    found = notebook(entry.filename, file.read(entry))
                else:
                    continue
                if found is not None:
                    yield found


def token_labels(text: Labelled, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Ids `[L]` and labels `[L]`; a token belongs to the stretch in which it begins."""
    encoding = tokenizer.encode(text.text, add_special_tokens=False)
    starts = np.array([start for start, _ in encoding.offsets])
    edges = np.array([edge for span in text.code for edge in span], dtype=np.int64)
    labels = (np.searchsorted(edges, starts, side="right") % 2).astype(np.uint8)
    return np.array(encoding.ids, dtype=np.uint16), labels


def smoothed(labels: np.ndarray, least: int) -> np.ndarray:
    """Labels without stretches of fewer than `least` tokens, the shortest first: each joins its neighbours."""
    labels = labels.copy()
    while True:
        edges = np.concatenate([[0], np.flatnonzero(np.diff(labels.astype(np.int8))) + 1, [len(labels)]])
        sizes = np.diff(edges)
        if len(sizes) < 2 or sizes.min() >= least:
            return labels
        i = int(sizes.argmin())
        labels[edges[i] : edges[i + 1]] = 1 - labels[edges[i]]


def mixed_documents(
    python: Sequence[Document], tokenizer: Tokenizer, *, seed: int, archives: bool = True, chunk: int = CHUNK
) -> Mixed:
    """Pieces of one chunk with at least one border, from every kind of document.

    Args:
        python: test documents.
        tokenizer: reads text only.
        seed: of order and offsets.
        archives: also read the wheels.
        chunk: tokens of a piece.

    Raises:
        InputError: no piece with a border was found.
    """
    texts = [*docstrings(python), *(archive_texts() if archives else ())]
    found: dict[str, list[tuple[str, np.ndarray, np.ndarray]]] = {kind: [] for kind in CAPS}
    edge = min(EDGE, chunk // 8)
    for text in sorted(texts, key=lambda text: place(seed, text.document)):
        most = 2 if text.kind == "docstrings" else 12
        if len(found[text.kind]) >= CAPS[text.kind] or len(text.text) < chunk:
            continue
        ids, labels = token_labels(text, tokenizer)
        labels = smoothed(labels, edge)
        borders = np.flatnonzero(np.diff(labels.astype(np.int8))) + 1
        taken, end = 0, 0
        for border in borders:
            start = border - edge - place(seed, f"{text.document}#{border}") % (chunk - 2 * edge + 1)
            start = int(max(start, end))
            stop = start + chunk
            inside = borders[(borders > start) & (borders < stop)]
            near = (inside < start + edge) | (inside > stop - edge)
            if stop > len(ids) or not len(inside) or near.any() or taken == most:
                continue
            found[text.kind].append((text.document, ids[start:stop], labels[start:stop]))
            taken, end = taken + 1, stop
    rows = [(kind, *row) for kind, some in found.items() for row in some[: CAPS[kind]]]
    if not rows:
        raise InputError("mixed documents: expected files with docstrings of 200 characters, got none")
    kinds, documents, ids, labels = zip(*rows, strict=True)
    return Mixed(np.stack(ids), np.stack(labels), list(kinds), list(documents))
