"""Rows as a coding assistant reads them: other files of a package, the nearest last, then a file's own beginning."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath

import numpy as np

from eval.rows import Shape, place
from hf_crouter.data.documents import Document

OWN = 4096  # tokens of the file itself before the target, at most: the rest of the row is other files


def distance(path: str, other: str) -> int:
    """Folders between two files, up and down again."""
    own, others = PurePosixPath(path).parts[:-1], PurePosixPath(other).parts[:-1]
    shared = 0
    for one, two in zip(own, others, strict=False):
        if one != two:
            break
        shared += 1
    return len(own) + len(others) - 2 * shared


def repository_rows(
    documents: list[Document],
    package: list[Document],
    encode: Callable[[str], np.ndarray],
    shape: Shape,
    most: int,
    seed: int,
    dropped: Counter[str],
) -> Iterator[tuple[str, Document, np.ndarray]]:
    """Rows `[shape.length]` of some files, each behind as much of its package as fits.

    Args:
        documents: files to predict in, in a seeded order.
        package: all files of their package.
        encode: text to ids `[T]`, uint32.
        shape: of the rows; the window and the target are of the file itself.
        most: rows, at most.
        seed: of where in a file the target ends.
        dropped: what is left out, by rule.
    """
    ids: dict[str, np.ndarray] = {}

    def titled(document: Document) -> np.ndarray:
        if document.id not in ids:
            ids[document.id] = encode(f"# {document.id}\n{document.text.rstrip()}\n\n")
        return ids[document.id]

    made = 0
    for index, document in enumerate(documents):
        if made == most:
            dropped["cap"] += len(documents) - index
            return
        own = titled(document)
        least = shape.window + shape.target
        if len(own) < least:
            dropped["short"] += 1
            continue
        longest = min(len(own), OWN + shape.target, shape.length)
        beginning = own[: least + place(seed, f"{document.id}@") % (longest - least + 1)]
        room, parts = shape.length - len(beginning), [beginning]
        nearest = sorted(package, key=lambda d: (distance(d.id, document.id), place(seed, d.id)))
        for other in nearest:
            if room <= 0:
                break
            if other.id != document.id:
                parts.insert(0, titled(other)[-room:])
                room -= len(parts[0])
        if room > 0:
            dropped["small package"] += 1
            continue
        made += 1
        yield document.id, document, np.concatenate(parts)
