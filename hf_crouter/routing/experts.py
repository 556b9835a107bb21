"""Experts and sets of them: a compressor that knows a domain, and the adapter of the host that serves it.

A set's `experts.json` says which experts are in it and in what order (`expert_files` shows all files). When others
join or leave, no byte of an expert changes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ..crouter.loading import SHIPPED
from ..errors import InputError, MismatchError
from ..fitting import check_fit
from ..utils.io import replaced_folder, temporary_folder_beside, write_json
from .adapters import WEIGHTS, Lora
from .calibration import CALIBRATION_FILE, LengthCalibration
from .expert_files import (
    ADAPTER_FILES,
    COMPRESSOR,
    EXPERT_FILE,
    HOST,
    LATENTS_FILE,
    NAME,
    SET_FILE,
    TEXTS_FILE,
    Centroid,
    ExpertConfig,
    Texts,
    check_name,
    checksum,
    read_description,
)
from .profile import Evidence, Profile

SHIPPED_EXPERTS = SHIPPED.with_name("experts-smollm2-135m")  # of that crouter and this host


@dataclass(frozen=True, eq=False)
class Expert:
    """One domain: what rebuilds it, what serves it, and what is usual for it.

    Attributes:
        name: also its folder's name.
        compressor: LoRA over the shared crouter.
        host: LoRA of the host.
        calibration: of the compressor, on held-out documents of its own domain.
        config: what it belongs to.
        centroid: finds the experts nearest to a chunk; None where none was measured.
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
        check_name(self.name)
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
        sums = {path: checksum(folder / path) for path in ADAPTER_FILES}
        for part, adapter in ((COMPRESSOR, self.compressor), (HOST, self.host)):
            if sums[f"{part}/{WEIGHTS}"] != adapter.checksum:
                raise InputError(
                    f"{folder / part}: expected the adapter with checksum {adapter.checksum}, got another"
                )
        self.calibration.save(folder)
        sums[CALIBRATION_FILE] = checksum(folder / CALIBRATION_FILE)
        if self.centroid is not None:
            self.centroid.save(folder / LATENTS_FILE)
            sums[LATENTS_FILE] = checksum(folder / LATENTS_FILE)
        if texts is not None:
            texts.save(folder / TEXTS_FILE)
            sums[TEXTS_FILE] = checksum(folder / TEXTS_FILE)
        write_json(folder / EXPERT_FILE, {"name": self.name, **asdict(self.config), "sha256": sums})

    @classmethod
    def load(cls, folder: str | os.PathLike) -> Expert:
        """Reads an expert's folder.

        Raises:
            InputError: missing, damaged or altered files, or a name that is not the folder's.
            MismatchError: a calibration made for other weights.
        """
        folder = Path(folder)
        name, config, sums = read_description(folder)
        if name != folder.resolve().name:
            raise InputError(f"{folder / EXPERT_FILE}: expected the folder's name, got an expert named {name}")
        compressor, host = (Lora.load(folder / part) for part in (COMPRESSOR, HOST))
        centroid = Centroid.load(folder / LATENTS_FILE) if LATENTS_FILE in sums else None
        expert = cls(name, compressor, host, LengthCalibration.load(folder), config, centroid)
        for path, expected in sums.items():
            if checksum(folder / path) != expected:
                raise InputError(f"{folder / path}: altered since {EXPERT_FILE} was written (checksum differs)")
        return expert


@dataclass(frozen=True, eq=False)
class ExpertSet:
    """Experts of one crouter and one host or its twins, in a fixed order.

    Attributes:
        experts: their numbers are their positions; profiles that they had among others are dropped.

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
            _compare_host(expert, first)
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
        self,
        crouter: str,
        host: str | None = None,
        *,
        crouter_tokenizer: str = "",
        host_tokenizer: str = "",
        host_architecture: str = "",
    ) -> None:
        """Refuses another crouter, host or tokenizer than the experts were made for; a twin of the host is none.

        Args:
            crouter: `crouter_fingerprint(crouter, decoder=True)`.
            host: `host_fingerprint(host)`, empty where its weights cannot be read; not compared by default.
            crouter_tokenizer: fingerprint; not compared where it is empty here or there.
            host_tokenizer: likewise; a twin must have it.
            host_architecture: `host_architecture(host)`; without it no twin is known.

        Raises:
            MismatchError: names the expert, what was expected and what came.
        """
        for expert in self.experts:
            _compare(expert, "crouter", expert.config.crouter_fingerprint, crouter)
            if host is not None:
                _compare_host(expert, ExpertConfig("", "", "", host, host_tokenizer, {}, host_architecture))
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
        check_name(name)
    _check_unique(names, str(path))
    return names


def add_expert(set_folder: str | os.PathLike, expert_folder: str | os.PathLike) -> Expert:
    """Adds an expert to a set: copies its folder there, then names it last in `experts.json`.

    Interrupted in between, the set is what it was. A set that does not exist yet is made. Files that do not belong to
    an expert (PEFT's model card, say) are not copied.

    Args:
        set_folder: of the set.
        expert_folder: of the expert; may already stand in the set.

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
    target = set_folder / expert.name
    if target.resolve() != expert_folder.resolve():
        if target.exists() and not (target / EXPERT_FILE).exists():
            raise InputError(f"{target}: expected an expert or nothing there, got something else")
        with replaced_folder(target) as part:
            for path in [*read_description(expert_folder)[2], EXPERT_FILE]:
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
    target = set_folder / name
    if target.is_dir():
        with temporary_folder_beside(target) as away:  # half a folder is never seen under its name
            target.rename(away / name)


def _check_unique(names: list[str], where: str) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"{where}: expected every expert once, got two named {', '.join(twice)}")


def _compare(expert: Expert, what: str, expected: str, got: str) -> None:
    _check_type(what, got)
    if expected and got and expected != got:
        raise MismatchError(f"expert {expert.name}: expected the {what} with fingerprint {expected}, got {got}")


def _check_type(what: str, got: str) -> None:
    if not isinstance(got, str):
        raise TypeError(f"expected the {what}'s fingerprint (hf_crouter.hosts.fingerprint), got {type(got).__name__}")


def _compare_host(expert: Expert, host: ExpertConfig) -> None:
    _check_type("host", host.host_fingerprint)
    if host.host_fingerprint or host.host_architecture:
        check_fit(f"expert {expert.name}", expert.config, host, advice="hf-crouter expert add")


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
