"""The files of an expert: a set of experts is a folder, each of them a subfolder, which is written once.

SET/experts.json
SET/evidence.safetensors      how texts of each expert look to all of them (`profile`), if that was measured
SET/NAME/expert.json          name, what it belongs to, and the checksum of every file beside it; written last
SET/NAME/calibration.json     what is usual for it, by length
SET/NAME/latents.safetensors  where its texts lie among the shared crouter's latents, which finds the top k of a chunk
SET/NAME/texts.safetensors    the held-out texts themselves, so that later experts can be measured on them
SET/NAME/compressor/          adapter of the crouter, as PEFT saves it
SET/NAME/host/                adapter of the host
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from ..errors import InputError
from ..utils.io import replaced_file
from .adapters import CONFIG, WEIGHTS
from .calibration import CALIBRATION_FILE

EXPERT_FILE, SET_FILE = "expert.json", "experts.json"
LATENTS_FILE, TEXTS_FILE = "latents.safetensors", "texts.safetensors"
COMPRESSOR, HOST = "compressor", "host"
# a folder's name that is neither hidden, nor a way out of the set, nor a file's of the set
NAME = re.compile(r"(?!.*\.json$)[A-Za-z0-9_-][A-Za-z0-9._-]*")
ADAPTER_FILES = tuple(f"{part}/{name}" for part in (COMPRESSOR, HOST) for name in (CONFIG, WEIGHTS))


@dataclass(frozen=True)
class ExpertConfig:
    """What an expert fits and how it was trained.

    Attributes:
        crouter_fingerprint: of the shared crouter, decoder included.
        crouter_tokenizer: fingerprint; empty where none was known.
        host_name: name for people.
        host_fingerprint: of the host's weights.
        host_tokenizer: fingerprint; empty where none was known.
        training: record of the run that made it.
        host_architecture: see `hosts.fingerprint.host_architecture`; empty in files of 0.2 and before.
    """

    crouter_fingerprint: str
    crouter_tokenizer: str = ""
    host_name: str = ""
    host_fingerprint: str = ""
    host_tokenizer: str = ""
    training: dict[str, Any] = field(default_factory=dict)
    host_architecture: str = ""


@dataclass(frozen=True, eq=False)
class Centroid:
    """Where an expert's texts lie among the latents of the shared crouter: a Gaussian with a diagonal covariance.

    Attributes:
        mean: `[latent_size]`, of a chunk's mean latent.
        variance: `[latent_size]`.
    """

    mean: torch.Tensor
    variance: torch.Tensor

    @classmethod
    def fit(cls, latents: torch.Tensor) -> Centroid:
        """Centroid of the latents `[N, M, latent_size]` of N chunks, made without any adapter.

        Raises:
            InputError: fewer than two chunks.
        """
        if len(latents) < 2:
            raise InputError(f"centroid: expected the latents of at least 2 chunks, got {len(latents)}")
        pooled = latents.float().mean(1).cpu()
        return cls(pooled.mean(0), pooled.var(0).clamp(min=1e-4))

    def distance(self, latents: torch.Tensor) -> torch.Tensor:
        """Negative log-likelihood of chunks `[N, M, latent_size]`, `[N]`, up to a constant, a dimension's mean."""
        pooled = latents.float().mean(1).cpu()
        return ((pooled - self.mean) ** 2 / self.variance + self.variance.log()).mean(-1) / 2

    def save(self, path: Path) -> None:
        """Writes a safetensors file, whole or not at all."""
        data = save_safetensors({"mean": self.mean, "variance": self.variance}, {"format": "pt"})
        with replaced_file(path) as part:
            part.write_bytes(data)

    @classmethod
    def load(cls, path: Path) -> Centroid:
        """What `save` wrote.

        Raises:
            InputError: missing or damaged.
        """
        try:
            tensors = load_safetensors(path.read_bytes())
            return cls(tensors["mean"], tensors["variance"])
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from error
        except (SafetensorError, KeyError) as error:
            raise InputError(f"{path}: damaged ({error})") from error


@dataclass(frozen=True, eq=False)
class Texts:
    """Held-out texts of an expert's domain, by length in tokens.

    Attributes:
        ids: `[N, length]`, int64, in the crouter's tokens.
        documents: `[N]`, int64: which document each comes from.
    """

    ids: dict[int, np.ndarray]
    documents: dict[int, np.ndarray]

    @property
    def checksum(self) -> str:
        """Of ids and documents."""
        content = hashlib.sha256()
        for length in sorted(self.ids):
            for values in (self.ids[length], self.documents[length]):
                content.update(np.ascontiguousarray(values, np.int64).tobytes())
        return content.hexdigest()

    def save(self, path: Path) -> None:
        """Writes a safetensors file, whole or not at all."""
        tensors = {f"{length}/ids": torch.from_numpy(ids.astype(np.int32)) for length, ids in self.ids.items()}
        for length, documents in self.documents.items():
            tensors[f"{length}/documents"] = torch.from_numpy(documents.astype(np.int32))
        with replaced_file(path) as part:
            part.write_bytes(save_safetensors(tensors, {"format": "pt"}))

    @classmethod
    def load(cls, folder: str | os.PathLike) -> Texts | None:
        """Those in an expert's folder; None where it brings none.

        Raises:
            InputError: damaged.
        """
        path = Path(folder) / TEXTS_FILE
        if not path.exists():
            return None
        ids, documents = {}, {}
        try:
            for key, tensor in load_safetensors(path.read_bytes()).items():
                length, _, what = key.partition("/")
                {"ids": ids, "documents": documents}[what][int(length)] = tensor.numpy().astype(np.int64)
            shapes = {length: values.shape for length, values in ids.items()}
            if shapes != {length: (len(values), length) for length, values in documents.items()}:
                raise ValueError(f"texts of shapes {shapes}")
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from error
        except (SafetensorError, ValueError, KeyError) as error:
            raise InputError(f"{path}: not an expert's texts, or damaged ({error!r})") from error
        return cls(ids, documents)


def read_description(folder: Path) -> tuple[str, ExpertConfig, dict[str, str]]:
    """Name, description and checksums of files, by their paths in the folder, from an expert's `expert.json`.

    Raises:
        InputError: missing or damaged.
    """
    path = folder / EXPERT_FILE
    try:
        record = {"host_architecture": "", **json.loads(path.read_text(encoding="utf-8"))}
        name, sums = record["name"], dict(record["sha256"])
        config = ExpertConfig(**{f.name: record[f.name] for f in fields(ExpertConfig)})
    except OSError as error:
        raise InputError(f"{path}: no expert ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not an expert's description, or damaged ({error!r})") from error
    texts = [value for key, value in asdict(config).items() if key != "training"]
    required = {*ADAPTER_FILES, CALIBRATION_FILE}
    if not all(isinstance(value, str) for value in (*texts, *sums.values())) or not isinstance(config.training, dict):
        raise InputError(f"{path}: not an expert's description, or damaged")
    if sums.keys() - {LATENTS_FILE, TEXTS_FILE} != required:
        raise InputError(
            f"{path}: expected checksums of {', '.join(sorted(required))}, got {', '.join(sums) or 'none'}"
        )
    check_name(name)
    return name, config, sums


def checksum(path: Path) -> str:
    """SHA-256 of a file, hexadecimal.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def check_name(name: Any) -> None:
    """Refuses a name that could not be a folder's in a set.

    Raises:
        InputError: says which letters a name may have.
    """
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise InputError(f"expert: expected a name of letters, digits, '.', '_' and '-', not hidden, got {name!r}")
