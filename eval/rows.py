"""Rows of token ids that readings are measured on: where what stands in a row, sets of them, files.

A row is `[raw prefix | older chunks | raw window | scored tokens]`; fewer chunks use the same row without its oldest
ones.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from hf_crouter.data.dedup import GRAM
from hf_crouter.data.shingles import gram_hashes, sorted_unique
from hf_crouter.errors import InputError
from hf_crouter.utils.io import replaced_file, write_json


@dataclass(frozen=True)
class Shape:
    """Where what stands in a row `[prefix | chunks | window | target]`, in tokens.

    Attributes:
        prefix: raw tokens at the start.
        chunk: of a chunk.
        chunks: older chunks.
        window: raw tokens before the target.
        target: tokens that are scored.
    """

    prefix: int = 4
    chunk: int = 512
    chunks: int = 8
    window: int = 512
    target: int = 512

    @property
    def old(self) -> int:
        """End of the chunks."""
        return self.prefix + self.chunks * self.chunk

    @property
    def split(self) -> int:
        """End of the window."""
        return self.old + self.window

    @property
    def length(self) -> int:
        """Of a row."""
        return self.split + self.target

    def latest(self, rows: np.ndarray, count: int, extra: int = 0) -> np.ndarray:
        """Rows `[D, length]` without all but the last `count` chunks, or of those but their last `extra` tokens.

        Args:
            rows: token ids.
            count: chunks before the window that are left.
            extra: tokens before the window that are left beside them.
        """
        first = self.old - count * self.chunk - extra
        return np.concatenate([rows[:, : self.prefix], rows[:, first:]], axis=1)


@dataclass(frozen=True)
class Record:
    """What is known of one row.

    Attributes:
        name: package and file, or domain and record; `#k` for window k of a long one that gave several.
        cluster: what is drawn together in a bootstrap: the package, or the record of prose.
        domain: of prose; "code" otherwise.
        repetition: share of the scored tokens' 13-grams that already stand before them, 0 to 0.5.
        overlap: share of 13-grams that the set's reference holds, 0 to 0.5; None where it has no reference.
    """

    name: str
    cluster: str
    domain: str
    repetition: float
    overlap: float | None = None


@dataclass(frozen=True, eq=False)
class Rows:
    """One set, in the tokens of one tokenizer.

    Attributes:
        ids: `[D, shape.length]`, uint32.
        lines: `[D, shape.target]`, int16, see `line_numbers`.
        records: one for each row.
        shape: of the rows.
        tokenizer: fingerprint.
        dropped: documents (or rows) left out, by rule.
    """

    ids: np.ndarray
    lines: np.ndarray
    records: list[Record]
    shape: Shape
    tokenizer: str
    dropped: dict[str, int]

    def save(self, folder: Path, name: str, seed: int) -> None:
        """Writes `name.safetensors` and `name.json`, each atomically.

        Raises:
            InputError: they cannot be written.
        """
        with replaced_file(folder / f"{name}.safetensors") as temporary:
            save_file({"ids": self.ids, "lines": self.lines}, temporary)
        about = {"set": name, "seed": seed, "tokenizer": self.tokenizer, "layout": asdict(self.shape), "gram": GRAM,
                 "dropped": self.dropped}  # fmt: skip
        write_json(folder / f"{name}.json", {**about, "documents": [asdict(record) for record in self.records]})

    @classmethod
    def load(cls, folder: Path, name: str, tokenizer: str = "") -> Rows:
        """Reads what `save` wrote.

        Args:
            folder: of the sets.
            name: of the set.
            tokenizer: fingerprint that is expected; empty: any.

        Raises:
            InputError: there is no such set, its files do not fit each other, or it was made for another tokenizer.
        """
        try:
            about = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
            arrays = load_file(folder / f"{name}.safetensors")
            shape, records = Shape(**about["layout"]), [Record(**record) for record in about["documents"]]
            ids, lines = arrays["ids"], arrays["lines"]
        except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
            raise InputError(f"{folder}: expected the set {name} (python -m eval.documents), got {error!r}") from error
        if ids.shape != (len(records), shape.length) or lines.shape != (len(records), shape.target):
            raise InputError(f"{name}: expected {len(records)} rows of {shape.length} ids and {shape.target} "
                             f"line numbers, got {ids.shape} and {lines.shape}")  # fmt: skip
        if tokenizer and about["tokenizer"] != tokenizer:
            raise InputError(
                f"{name}: expected rows of tokenizer {tokenizer}, got {about['tokenizer']}: build it anew"
            )
        return cls(ids, lines, records, shape, about["tokenizer"], about["dropped"])


def breaks_lines(tokenizer: Any) -> np.ndarray:
    """`[V]`, bool: whether a token's text holds a line break, for a tokenizer of transformers."""
    return np.array(["\n" in tokenizer.decode([number]) for number in range(len(tokenizer))])


def line_numbers(targets: np.ndarray, breaks: np.ndarray) -> np.ndarray:
    """`[T]`, int16: which whole line each token belongs to, -1 where none.

    A line ends with the token that holds a line break, which may hold the next one's indentation too; a line of one
    token is blank and does not count, nor does one that begins before the targets or ends behind them.

    Args:
        targets: `[T]`, token ids.
        breaks: `[V]`, see `breaks_lines`.
    """
    numbers = np.full(len(targets), -1, np.int16)
    ends = np.flatnonzero(breaks[targets])
    count = 0
    for before, end in zip(ends[:-1], ends[1:], strict=True):
        if end - before > 1:
            numbers[before + 1 : end + 1] = count
            count += 1
    return numbers


def right_lines(lines: np.ndarray, right: np.ndarray) -> np.ndarray:
    """`[D]`: whole lines of each row all of whose tokens are right.

    Args:
        lines: `[D, T]`, from `line_numbers`.
        right: `[D, T]`, bool.
    """
    counts = []
    for numbers, hits in zip(lines, right, strict=True):
        inside = numbers >= 0
        wrong = np.unique(numbers[inside & ~hits])
        counts.append(int(numbers.max(initial=-1)) + 1 - len(wrong))
    return np.array(counts, np.int64)


def repetition(row: np.ndarray, target: int) -> float:
    """Share of the 13-grams of the last `target` tokens of a row `[L]` that already stand before them."""
    past, scored = (gram_hashes(part.astype(np.uint64), GRAM) for part in (row[:-target], row[-target:]))
    return float(np.isin(scored, past).mean())


def row_grams(rows: Iterable[np.ndarray]) -> np.ndarray:
    """Sorted unique hashes of the token 13-grams of all rows `[L]`, uint64."""
    grams = [gram_hashes(row.astype(np.uint64), GRAM) for row in rows]
    return sorted_unique(np.concatenate(grams)) if grams else np.empty(0, dtype=np.uint64)


def place(seed: int, name: str) -> int:
    """64 random bits of a name: order and offsets do not depend on which other documents there are."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode("utf-8", "surrogatepass"), digest_size=8).digest())


def in_turns(records: Sequence[Record], seed: int) -> list[int]:
    """Numbers of the records in a seeded order in which clusters take turns: any first part is a fair sample."""
    keys: dict[int, tuple[int, int]] = {}
    turns: dict[str, int] = {}
    for i in sorted(range(len(records)), key=lambda i: place(seed, records[i].name)):
        cluster = records[i].cluster
        keys[i] = turns.get(cluster, 0), place(seed, cluster)
        turns[cluster] = turns.get(cluster, 0) + 1
    return sorted(keys, key=keys.__getitem__)
