"""The one split, fixed before compressor, projector, gate and experts, and shared by all of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..utils.io import write_json
from .dedup import GRAM, ngram_overlap, training_grams
from .documents import Document
from .installed import STDLIB

PARTS = ("train", "calibration", "files", "packages", "stdlib")
HELD_OUT_PACKAGES = ("networkx", "statsmodels", "rich", "jinja2", "botorch", "joblib")


@dataclass(frozen=True)
class SplitRules:
    """How documents are dealt out.

    Attributes:
        held_out_packages: packages that are tests, with the copies of them that other packages carry.
        files_share: share of the remaining documents that are tests, by a hash of the id.
        calibration_share: share that is in no training and no test: quantiles of the reconstruction NLL come from it.
        maximum_overlap: a held-out document of which more 13-grams than this share occur in training is dropped.
    """

    held_out_packages: tuple[str, ...] = HELD_OUT_PACKAGES
    files_share: float = 0.05
    calibration_share: float = 0.01
    maximum_overlap: float = 0.5

    def part(self, document: Document) -> str:
        """The part that a document belongs to, before overlaps are looked at."""
        if document.group == STDLIB:
            return "stdlib"
        names = {_plain(name) for name in self.held_out_packages}
        # Folders anywhere in the path, so that pip/_vendor/rich counts; a file only where it is a whole package.
        folders = document.id.split("/")
        file = folders.pop().removesuffix(".py")
        components = {_plain(folder) for folder in folders} | {_plain(document.group)}
        if not folders or folders[-1] in ("_vendor", "vendor", "_vendored", "extern", "vendored"):
            components.add(_plain(file))
        if components & names:
            return "packages"
        digest = hashlib.blake2b(document.id.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        share = int.from_bytes(digest, "big") / 2**64
        if share < self.files_share:
            return "files"
        return "calibration" if share < self.files_share + self.calibration_share else "train"


@dataclass(frozen=True)
class Part:
    """One part's record.

    Attributes:
        files: documents in it.
        characters: their length.
        ids_sha256: sha256 of its sorted ids, each followed by a line feed.
        dropped: documents left out because they overlap with training.
        overlap: mean share of 13-grams of the kept documents that occur in training; 0 for training itself.
    """

    files: int
    characters: int
    ids_sha256: str
    dropped: int = 0
    overlap: float = 0.0


@dataclass(frozen=True)
class Split:
    """What was held out, and by which rules.

    Attributes:
        rules: the rules.
        parts: record of each of `train`, `calibration`, `files`, `packages`, `stdlib`.
        held_out: ids of each part but `train`, sorted.
        dropped: ids of the dropped documents of each part but `train`, sorted.
        notes: anything else worth knowing, such as corpora and duplicates.
    """

    rules: SplitRules
    parts: dict[str, Part]
    held_out: dict[str, list[str]]
    dropped: dict[str, list[str]]
    notes: dict[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Writes the split as JSON, atomically.

        Raises:
            InputError: if it cannot be written.
        """
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> Split:
        """Reads what `save` wrote.

        Raises:
            InputError: if the file is missing, or is no split, or its ids do not fit their checksums.
        """
        try:
            raw = json.loads(Path(path).read_text(encoding="utf-8"))
            rules = dict(raw["rules"])
            rules["held_out_packages"] = tuple(rules["held_out_packages"])
            parts = {name: Part(**part) for name, part in raw["parts"].items()}
            split = cls(SplitRules(**rules), parts, raw["held_out"], raw["dropped"], raw["notes"])
            fits = all(parts[name].ids_sha256 == ids_sha256(ids) for name, ids in split.held_out.items())
        except OSError as error:
            raise InputError(f"cannot read the split {path}: {error.strerror}") from error
        except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path} is no split: expected the JSON that a data preparation writes") from error
        if not fits:
            raise InputError(f"{path} was altered: its ids do not fit their checksums")
        return split


def make_split(
    documents: Sequence[Document], rules: SplitRules | None = None, *, workers: int | None = None
) -> tuple[Split, dict[str, list[Document]]]:
    """Deals documents out by the rules, then drops held-out ones that training has mostly seen.

    Args:
        documents: documents of unique ids, without duplicates.
        rules: the rules; by default those of `SplitRules`.
        workers: processes; by default one for each core.

    Returns:
        The split, and the documents of each part in order of their ids.
    """
    rules = rules or SplitRules()
    dealt: dict[str, list[Document]] = {name: [] for name in PARTS}
    for document in sorted(documents, key=lambda document: document.id):
        dealt[rules.part(document)].append(document)
    grams = training_grams(dealt["train"], workers=workers)
    parts = {"train": _record(dealt["train"])}
    dropped: dict[str, list[str]] = {}
    for name in PARTS[1:]:
        overlap = ngram_overlap(dealt[name], grams, workers=workers)
        pairs = list(zip(dealt[name], overlap.tolist(), strict=True))
        dropped[name] = [document.id for document, share in pairs if share > rules.maximum_overlap]
        kept = [(document, share) for document, share in pairs if share <= rules.maximum_overlap]
        dealt[name] = [document for document, _ in kept]
        mean = sum(share for _, share in kept) / max(len(kept), 1)
        parts[name] = _record(dealt[name], len(dropped[name]), mean)
    held_out = {name: [document.id for document in dealt[name]] for name in PARTS[1:]}
    return Split(rules, parts, held_out, dropped, {"overlap_gram": GRAM}), dealt


def ids_sha256(ids: Sequence[str]) -> str:
    """sha256 of the sorted ids, each followed by a line feed, as hexadecimal digits."""
    text = "".join(f"{name}\n" for name in sorted(ids))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _record(documents: list[Document], dropped: int = 0, overlap: float = 0.0) -> Part:
    characters = sum(len(document.text) for document in documents)
    return Part(len(documents), characters, ids_sha256([d.id for d in documents]), dropped, overlap)


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")
