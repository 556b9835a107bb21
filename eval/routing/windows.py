"""The test windows of the routing measurement, and the parts of its data as they lie on disk; made by `data`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from eval.routing.mixed import Mixed
from hf_crouter.data.tokens import TokenArray
from hf_crouter.errors import InputError
from hf_crouter.utils.io import replaced_file, write_json

KNOWN = ("python", "wiki_en", "novels_en", "medquad", "de_law", "json_config", "latex_math", "dialogue_sgd")
NEAR = ("shakespeare", "speeches_en", "meetings_qmsum")
FAR = ("csv_tables", "zh_tech")
DOMAINS = (*KNOWN, *NEAR, *FAR)
WINDOW = 1024  # a chunk that decides, and the chunk after it


@dataclass(frozen=True)
class Record:
    """What is known of one test window.

    Attributes:
        domain: its domain.
        document: what is drawn together in a bootstrap.
        start: its first token in the document.
        overlap: share of the document's 13-grams that training or calibration hold, 0 to 0.5.
    """

    domain: str
    document: str
    start: int
    overlap: float


@dataclass(frozen=True)
class TestWindows:
    """All test windows.

    Attributes:
        ids: `[W, 1024]`, uint16.
        records: one for each row.
    """

    __test__ = False  # not for pytest

    ids: np.ndarray
    records: list[Record]

    @property
    def domains(self) -> np.ndarray:
        """Domain of every row, `[W]`."""
        return np.array([record.domain for record in self.records])

    @property
    def documents(self) -> list[str]:
        """Cluster of every row."""
        return [f"{record.domain}/{record.document}" for record in self.records]

    def save(self, folder: Path) -> None:
        """Writes `windows.safetensors` and `windows.json`."""
        with replaced_file(folder / "windows.safetensors") as temporary:
            save_file({"ids": self.ids}, temporary)
        write_json(folder / "windows.json", {"records": [asdict(record) for record in self.records]})

    @classmethod
    def load(cls, folder: Path) -> TestWindows:
        """Reads what `save` wrote.

        Raises:
            InputError: missing, or the two files do not fit each other.
        """
        path = folder / "windows.json"
        if not path.is_file():
            raise InputError(f"{folder}: expected the output of eval.routing.data, got no {path.name}")
        records = [Record(**record) for record in json.loads(path.read_text(encoding="utf-8"))["records"]]
        ids = load_file(folder / "windows.safetensors")["ids"]
        if len(ids) != len(records):
            raise InputError(f"{folder}: {len(records)} records do not fit {len(ids)} windows: build them again")
        return cls(ids, records)


def load_part(folder: Path, domain: str, part: str) -> TokenArray:
    """Tokens of one part of a known domain."""
    return TokenArray.load(folder / domain / f"{part}.safetensors")


def load_mixed(folder: Path) -> Mixed:
    """The real mixed documents."""
    return Mixed.load(folder)


def load_mixed_fit(folder: Path) -> Mixed | None:
    """Python files of the calibration part with docstrings; None where there are none."""
    return Mixed.load(folder, "mixed_fit") if (folder / "mixed_fit.json").is_file() else None
