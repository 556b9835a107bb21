"""Experts on disk: a compressor that knows a domain, and the adapter of the host that serves it.

A set is a folder: one subfolder an expert, and `experts.json`, which says which of them are mounted and in what order.
An expert's folder is written once; mounting or removing others changes no byte of it.

    SET/experts.json
    SET/evidence.safetensors      how texts of each expert look to all of them (`profile`), if that was measured
    SET/NAME/expert.json          name, origin, and the checksum of every file beside it; written last
    SET/NAME/calibration.json     what is usual for it, by length
    SET/NAME/latents.safetensors  where its texts lie among the shared crouter's latents, for a shortlist
    SET/NAME/texts.safetensors    the held-out texts themselves, so that experts mounted later can be measured on them
    SET/NAME/compressor/          adapter of the crouter, as PEFT saves it
    SET/NAME/host/                adapter of the host
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from ..crouter.loading import SHIPPED
from ..errors import InputError, MismatchError
from ..utils.io import replaced_file, replaced_folder, temporary_folder_beside, write_json
from .adapters import CONFIG, WEIGHTS, Lora
from .calibration import CALIBRATION_FILE, LengthCalibration
from .profile import Evidence, Profile

EXPERT_FILE, SET_FILE = "expert.json", "experts.json"
LATENTS_FILE, TEXTS_FILE = "latents.safetensors", "texts.safetensors"
COMPRESSOR, HOST = "compressor", "host"
# a folder's name that is neither hidden, nor a way out of the set, nor a file's of the set
NAME = re.compile(r"(?!.*\.json$)[A-Za-z0-9_-][A-Za-z0-9._-]*")
_ADAPTERS = tuple(f"{part}/{name}" for part in (COMPRESSOR, HOST) for name in (CONFIG, WEIGHTS))


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
    """

    crouter_fingerprint: str
    crouter_tokenizer: str = ""
    host_name: str = ""
    host_fingerprint: str = ""
    host_tokenizer: str = ""
    training: dict[str, Any] = field(default_factory=dict)


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


@dataclass(frozen=True, eq=False)
class Expert:
    """One domain: what rebuilds it, what serves it, and what is usual for it.

    Attributes:
        name: also its folder's name.
        compressor: LoRA over the shared crouter.
        host: LoRA of the host.
        calibration: of the compressor, on held-out documents of its own domain.
        config: what it belongs to.
        centroid: for a shortlist; None where none was measured.
        profile: how its texts look to all experts of its set; None where that was not measured.
    """

    name: str
    compressor: Lora
    host: Lora
    calibration: LengthCalibration
    config: ExpertConfig
    centroid: Centroid | None = None
    profile: Profile | None = None

    def __post_init__(self) -> None:
        _check_name(self.name)
        made = (self.calibration.fingerprint, self.calibration.weights)
        if made != (self.config.crouter_fingerprint, self.compressor.checksum):
            what = "compressor" if made[0] == self.config.crouter_fingerprint else "crouter"
            expected, got = (self.compressor.checksum, made[1]) if what == "compressor" else (
                self.config.crouter_fingerprint, made[0])  # fmt: skip
            raise MismatchError(
                f"expert {self.name}: expected a calibration of its own {what} ({expected or 'not from a file'}), "
                f"got one made for other weights ({got or 'none named'})"
            )

    @property
    def digest(self) -> str:
        """Checksum of all that routes and what they lead to depend on."""
        content = [self.name, self.host.checksum, self.compressor.checksum, repr(self.calibration.reconstruction_nlls),
                   self.profile.digest if self.profile else ""]  # fmt: skip
        if self.centroid is not None:
            content += [part.numpy().tobytes().hex() for part in (self.centroid.mean, self.centroid.variance)]
        return hashlib.sha256("\n".join(content).encode()).hexdigest()

    @property
    def nbytes(self) -> int:
        """Bytes of both adapters in memory."""
        return self.compressor.nbytes + self.host.nbytes

    def save_description(self, folder: str | os.PathLike, texts: Texts | None = None) -> None:
        """Writes everything but the adapters, which PEFT has saved there; `expert.json`, with all checksums, last.

        Args:
            folder: holds `compressor/` and `host/`, from which this expert's adapters were read.
            texts: held-out ones that travel with it.

        Raises:
            InputError: an adapter's file is missing or another one, or the folder cannot be written.
        """
        folder = Path(folder)
        sums = {path: _checksum(folder / path) for path in _ADAPTERS}
        for part, adapter in ((COMPRESSOR, self.compressor), (HOST, self.host)):
            if sums[f"{part}/{WEIGHTS}"] != adapter.checksum:
                raise InputError(
                    f"{folder / part}: expected the adapter with checksum {adapter.checksum}, got another"
                )
        self.calibration.save(folder)
        sums[CALIBRATION_FILE] = _checksum(folder / CALIBRATION_FILE)
        if self.centroid is not None:
            data = save_safetensors({"mean": self.centroid.mean, "variance": self.centroid.variance}, {"format": "pt"})
            with replaced_file(folder / LATENTS_FILE) as part:
                part.write_bytes(data)
            sums[LATENTS_FILE] = hashlib.sha256(data).hexdigest()
        if texts is not None:
            texts.save(folder / TEXTS_FILE)
            sums[TEXTS_FILE] = _checksum(folder / TEXTS_FILE)
        write_json(folder / EXPERT_FILE, {"name": self.name, **asdict(self.config), "sha256": sums})

    @classmethod
    def load(cls, folder: str | os.PathLike) -> Expert:
        """Reads an expert's folder.

        Raises:
            InputError: missing, damaged or altered files, or a name that is not the folder's.
            MismatchError: a calibration made for other weights.
        """
        folder = Path(folder)
        name, config, sums = _read_description(folder)
        if name != folder.resolve().name:
            raise InputError(f"{folder / EXPERT_FILE}: expected the folder's name, got an expert named {name}")
        compressor, host = (Lora.load(folder / part) for part in (COMPRESSOR, HOST))
        expert = cls(name, compressor, host, LengthCalibration.load(folder), config, _load_centroid(folder, sums))
        for path, expected in sums.items():
            if _checksum(folder / path) != expected:
                raise InputError(f"{folder / path}: altered since {EXPERT_FILE} was written (checksum differs)")
        return expert


@dataclass(frozen=True, eq=False)
class ExpertSet:
    """Experts of one crouter and one host, in a fixed order.

    Attributes:
        experts: their numbers are their places; profiles that they had among others are dropped.

    Raises:
        InputError: two of one name.
        MismatchError: of different crouters, hosts or tokenizers.
    """

    experts: tuple[Expert, ...]

    def __post_init__(self) -> None:
        _check_unique(list(self.names), "expert set")
        for expert in self.experts[1:]:
            first = self.experts[0].config
            _compare(expert, "crouter", expert.config.crouter_fingerprint, first.crouter_fingerprint)
            _compare(expert, "host", expert.config.host_fingerprint, first.host_fingerprint)
            _compare(expert, "crouter's tokenizer", expert.config.crouter_tokenizer, first.crouter_tokenizer)
            _compare(expert, "host's tokenizer", expert.config.host_tokenizer, first.host_tokenizer)
        here = tuple(expert.compressor.checksum for expert in self.experts)
        kept = tuple(e if e.profile is None or e.profile.among == here else replace(e, profile=None)
                     for e in self.experts)  # fmt: skip
        object.__setattr__(self, "experts", kept)

    @property
    def names(self) -> tuple[str, ...]:
        """Names in the set's order."""
        return tuple(expert.name for expert in self.experts)

    def __len__(self) -> int:
        """Number of experts n."""
        return len(self.experts)

    def __iter__(self) -> Iterator[Expert]:
        """The experts in order."""
        return iter(self.experts)

    def __getitem__(self, name: str) -> Expert:
        """The expert of a name.

        Raises:
            InputError: there is none; says which there are.
        """
        for expert in self.experts:
            if expert.name == name:
                return expert
        raise InputError(f"expected one of the experts {', '.join(self.names) or '(none)'}, got {name}")

    @classmethod
    def load(cls, folder: str | os.PathLike) -> ExpertSet:
        """Reads the experts that `experts.json` names, in its order.

        Where `evidence.safetensors` holds reconstruction NLLs under all of them, each gets its profile.

        Raises:
            InputError: missing or damaged files, two experts of one name.
            MismatchError: experts of different crouters, hosts or tokenizers, or a calibration of other weights.
        """
        experts = [Expert.load(Path(folder) / name) for name in expert_names(folder)]
        evidence = Evidence.load(folder)
        if evidence is not None:
            profiles = evidence.profiles({expert.name: expert.compressor.checksum for expert in experts})
            experts = [replace(expert, profile=profiles[expert.name]) for expert in experts]
        return cls(tuple(experts))

    def first(self, count: int, evidence: Evidence | None = None) -> ExpertSet:
        """The first experts alone, with the profiles that they have among each other.

        Args:
            count: how many.
            evidence: what to fit them on; without it they have none.
        """
        some = self.experts[:count]
        found = evidence.profiles({e.name: e.compressor.checksum for e in some}) if evidence is not None else {}
        return ExpertSet(tuple(replace(expert, profile=found.get(expert.name)) for expert in some))

    def check(
        self, crouter: str, host: str | None = None, *, crouter_tokenizer: str = "", host_tokenizer: str = ""
    ) -> None:
        """Refuses another crouter, host or tokenizer than the experts were made for.

        Args:
            crouter: `crouter_fingerprint(crouter, decoder=True)`.
            host: `host_fingerprint(host)`; not compared by default.
            crouter_tokenizer: fingerprint; not compared where it is empty here or there.
            host_tokenizer: likewise.

        Raises:
            MismatchError: names the expert, what was expected and what came.
        """
        for expert in self.experts:
            _compare(expert, "crouter", expert.config.crouter_fingerprint, crouter)
            if host is not None:
                _compare(expert, "host", expert.config.host_fingerprint, host)
            _compare(expert, "crouter's tokenizer", expert.config.crouter_tokenizer, crouter_tokenizer)
            _compare(expert, "host's tokenizer", expert.config.host_tokenizer, host_tokenizer)


def expert_names(folder: str | os.PathLike) -> list[str]:
    """Names of a set's experts in order, from its `experts.json`; no expert is read.

    Raises:
        InputError: no such file, or it is damaged or names one expert twice.
    """
    path = Path(folder) / SET_FILE
    try:
        names = json.loads(path.read_text(encoding="utf-8"))["names"]
    except OSError as error:
        raise InputError(f"{path}: no set of experts ({error.strerror})") from error
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: not a set of experts, or damaged ({error!r})") from error
    if not isinstance(names, list):
        raise InputError(f"{path}: expected a list of names, got {names!r}")
    for name in names:
        _check_name(name)
    _check_unique(names, str(path))
    return names


def add_expert(set_folder: str | os.PathLike, expert_folder: str | os.PathLike) -> Expert:
    """Mounts an expert: copies its folder into the set, then names it last in `experts.json`.

    Interrupted in between, the set is what it was. A set that does not exist yet is made. Files that do not belong to
    an expert (PEFT's model card, say) are not copied.

    Args:
        set_folder: of the set.
        expert_folder: of the expert; may already be its place in the set.

    Raises:
        InputError: damaged files, a name that is taken, or the set cannot be written.
        MismatchError: of another crouter, host or tokenizer than the set's.
    """
    set_folder, expert_folder = Path(set_folder), Path(expert_folder)
    expert = Expert.load(expert_folder)
    names = expert_names(set_folder) if (set_folder / SET_FILE).exists() else []
    if expert.name in names:
        raise InputError(f"{set_folder}: there is an expert named {expert.name} already")
    ExpertSet((*(ExpertSet.load(set_folder) if names else ()), expert))
    place = set_folder / expert.name
    if place.resolve() != expert_folder.resolve():
        if place.exists() and not (place / EXPERT_FILE).exists():
            raise InputError(f"{place}: expected an expert or nothing there, got something else")
        with replaced_folder(place) as part:
            for path in [*_read_description(expert_folder)[2], EXPERT_FILE]:
                (part / path).parent.mkdir(exist_ok=True)
                shutil.copyfile(expert_folder / path, part / path)
    write_json(set_folder / SET_FILE, {"names": [*names, expert.name]})
    return expert


def remove_expert(set_folder: str | os.PathLike, name: str) -> None:
    """Takes an expert out of `experts.json`, then deletes its folder.

    Raises:
        InputError: no such expert, or the set cannot be written.
    """
    set_folder = Path(set_folder)
    names = expert_names(set_folder)
    left = NAME.fullmatch(name) is not None and (set_folder / name / EXPERT_FILE).exists()  # by an interruption
    if name not in names and not left:
        raise InputError(f"{set_folder}: expected one of the experts {', '.join(names) or '(none)'}, got {name}")
    write_json(set_folder / SET_FILE, {"names": [other for other in names if other != name]})
    place = set_folder / name
    if place.is_dir():
        with temporary_folder_beside(place) as away:  # half a folder is never seen under its name
            place.rename(away / name)


def _read_description(folder: Path) -> tuple[str, ExpertConfig, dict[str, str]]:
    path = folder / EXPERT_FILE
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        name, sums = record["name"], dict(record["sha256"])
        config = ExpertConfig(**{f.name: record[f.name] for f in fields(ExpertConfig)})
    except OSError as error:
        raise InputError(f"{path}: no expert ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not an expert's description, or damaged ({error!r})") from error
    texts = [value for key, value in asdict(config).items() if key != "training"]
    known = {*_ADAPTERS, CALIBRATION_FILE}
    if not all(isinstance(value, str) for value in (*texts, *sums.values())) or not isinstance(config.training, dict):
        raise InputError(f"{path}: not an expert's description, or damaged")
    if sums.keys() - {LATENTS_FILE, TEXTS_FILE} != known:
        raise InputError(f"{path}: expected checksums of {', '.join(sorted(known))}, got {', '.join(sums) or 'none'}")
    _check_name(name)
    return name, config, sums


def _load_centroid(folder: Path, sums: dict[str, str]) -> Centroid | None:
    if LATENTS_FILE not in sums:
        return None
    path = folder / LATENTS_FILE
    try:
        tensors = load_safetensors(path.read_bytes())
        return Centroid(tensors["mean"], tensors["variance"])
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except (SafetensorError, KeyError) as error:
        raise InputError(f"{path}: damaged ({error})") from error


def _checksum(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise InputError(f"expert: expected a name of letters, digits, '.', '_' and '-', not hidden, got {name!r}")


def _check_unique(names: list[str], where: str) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"{where}: expected every expert once, got two named {', '.join(twice)}")


def _compare(expert: Expert, what: str, expected: str, got: str) -> None:
    if not isinstance(got, str):
        raise TypeError(f"expected the {what}'s fingerprint (hf_crouter.hosts.fingerprint), got {type(got).__name__}")
    if expected and got and expected != got:
        raise MismatchError(f"expert {expert.name}: expected the {what} with fingerprint {expected}, got {got}")


SHIPPED_EXPERTS = SHIPPED.with_name("experts-smollm2-135m")  # of that crouter and this host


def expert_folder(name_or_path: str | os.PathLike | None = None) -> Path:
    """Folder of an expert set; by default, and for its own name, that of the set that comes with the package.

    Raises:
        InputError: this installation has none.
    """
    if name_or_path is None or (str(name_or_path) == SHIPPED_EXPERTS.name and not Path(name_or_path).exists()):
        if not (SHIPPED_EXPERTS / SET_FILE).is_file():
            raise InputError(f"{SHIPPED_EXPERTS}: the shipped experts are missing from this installation")
        return SHIPPED_EXPERTS
    return Path(name_or_path)
