"""`hf-crouter doctor`: whether versions, device, host, crouter, projector, gate and experts fit each other."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from packaging.requirements import Requirement
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..chunking import tokenizer_fingerprint
from ..compressors.projector import align_command, find_projector
from ..context import compress_text
from ..crouter import CRouterModel
from ..crouter.fingerprint import crouter_fingerprint
from ..crouter.loading import load_crouter
from ..errors import InputError, MismatchError
from ..fitting import HostInUse, fitted
from ..hosts.families import CHECKS, check_family, family_of, is_tested
from ..hosts.fetch import cached_host, list_hosts
from ..hosts.fingerprint import host_fingerprint
from ..hosts.loading import load_host
from ..hosts.pair_probe import check_pairs
from ..hosts.probe import check_reading
from ..ngram.gate import find_gate
from ..routing.calibration import load_calibration, reconstruction_grade
from ..routing.experts import ExpertSet, expert_folder
from .console import Column, print_json, print_table
from .inputs import add_crouter, add_json

NAME = "doctor"
HELP = "check that versions, device, host, tokenizer, crouter, projector and gate fit; exit 1 if one does not"
EXAMPLE = "hf-crouter doctor --host smollm2-135m"
DEFAULT_HOST = "smollm2-135m"


@dataclass(frozen=True)
class Check:
    """One line of the doctor.

    Attributes:
        name: what was looked at.
        status: `ok`, `warn` (works, but something is missing) or `fail`.
        detail: what was found.
        advice: what to do about it; empty when all is well.
    """

    name: str
    status: str
    detail: str
    advice: str = ""


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("--host", help=f"known name, folder or hub name; {DEFAULT_HOST} by default, once it is there")
    add_crouter(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    checks = [*versions(), device_check(), *parts(args.host, args.crouter)]
    if args.json:
        print_json([asdict(check) for check in checks])
    else:
        columns = [Column(name, right=False) for name in ("check", "status", "found", "what to do")]
        print_table(columns, [(c.name, c.status, c.detail, c.advice) for c in checks])
    return int(any(check.status == "fail" for check in checks))


def versions() -> Iterator[Check]:
    """Python and every dependency against the ranges that the package states."""
    yield Check("python", "ok", platform.python_version())
    try:
        required = importlib.metadata.requires("hf_crouter") or []
    except importlib.metadata.PackageNotFoundError:
        yield Check("hf_crouter", "warn", "run from its source, not installed: versions not checked")
        return
    for line in required:
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield Check(requirement.name, "fail", "not installed", f'pip install "{requirement}"')
            continue
        if requirement.specifier.contains(version, prereleases=True):
            yield Check(requirement.name, "ok", version)
        else:
            yield Check(requirement.name, "fail", f"{version}, expected {requirement.specifier}",
                        f'pip install "{requirement}"')  # fmt: skip


def device_check() -> Check:
    """The device that commands choose by themselves."""
    if not torch.cuda.is_available():
        return Check("device", "ok", f"cpu, {os.cpu_count()} cores, {torch.get_num_threads()} threads")
    properties = torch.cuda.get_device_properties(0)
    return Check("device", "ok", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")


def parts(host_name: str | None, crouter_name: str | None) -> Iterator[Check]:
    """Crouter, calibration, host, tokenizers and projector; what cannot be loaded fails, what it needs is skipped."""
    crouter = host = None
    try:
        crouter, crouter_tokenizer = load_crouter(crouter_name)
        yield from crouter_checks(crouter, crouter_tokenizer, crouter_name)
    except InputError as error:
        yield Check("crouter", "fail", str(error), "" if "--crouter" in str(error) else "get or train it again")
    name = host_name or DEFAULT_HOST
    try:
        if name in list_hosts() and cached_host(name, thorough=True) is None:
            yield Check("host", "warn", f"{name} is not fetched yet", f"hf-crouter host get {name}")
            return
        host, host_tokenizer = load_host(name, dtype=torch.bfloat16)
        yield Check("host", "ok", f"{host.config._name_or_path}, {type(host).__name__}, {host_fingerprint(host)[:8]}")
        family = family_check(host)
        yield family
        if family.status == "ok":
            yield compact_check(host)
    except InputError as error:
        yield Check("host", "fail", str(error), f"hf-crouter host get {DEFAULT_HOST} --force, or name another host")
    if crouter is None or host is None:
        return
    if tokenizer_fingerprint(host_tokenizer) == tokenizer_fingerprint(crouter_tokenizer):
        yield Check("tokenizers", "ok", "host and crouter share one tokenizer")
    elif getattr(crouter_tokenizer, "is_fast", False):
        yield Check("tokenizers", "ok", "host and crouter differ: chunks are cut by character offsets")
    else:
        yield Check("tokenizers", "fail", "they differ and the crouter's gives no character offsets",
                    "use a crouter with a fast tokenizer")  # fmt: skip
    known = HostInUse(host, host_tokenizer)
    try:
        projector = find_projector(crouter, known)
        yield Check("projector", "ok", projector.check(known, crouter).origin)
    except InputError as error:
        yield Check("projector", "fail", str(error),
                    align_command(name, str(crouter.name_or_path)))  # fmt: skip
    try:
        found = find_gate(crouter, known).fitted(known)
        own = found.fit != "general"
        yield Check("gate", "ok", found.origin if own else "the general one copies for any host",
                    "" if own else f"{align_command(name, str(crouter.name_or_path))} --only gate")  # fmt: skip
    except InputError as error:
        yield Check("gate", "fail", str(error), "fit it again: hf-crouter align --only gate")
    yield from expert_checks(crouter, known)


def expert_checks(crouter: CRouterModel, host: HostInUse) -> Iterator[Check]:
    """The experts that come with the package, where they are of this crouter and of this host or a twin of it."""
    try:
        experts = ExpertSet.load(expert_folder())
        experts.check(
            crouter_fingerprint(crouter, decoder=True), host.host_fingerprint,
            host_tokenizer=host.host_tokenizer, host_architecture=host.host_architecture,
        )  # fmt: skip
    except MismatchError:
        return
    except InputError as error:
        yield Check("experts", "warn", str(error), "install the package again")
        return
    for expert in experts:
        yield Check(f"expert {expert.name}", "ok", fitted("", expert.config, host).origin)


def family_check(host: PreTrainedModel) -> Check:
    """Whether histories of such a host were tested, are refused, or read this one right at a trial."""
    try:
        check_family(host)
        check_reading(host)
    except InputError as error:
        return Check("family", "fail", str(error), "name another host; docs/hosts.md lists those that are served")
    family = family_of(host)
    if family is None or not is_tested(host):
        return Check(
            "family", "ok", f"{host.config.model_type}: not in the list, read a short text right in two pieces"
        )
    checks = len(CHECKS) - len(family.without)
    return Check(
        "family", "ok", f"{family.name}: passes {checks} of {len(CHECKS)} checks{family.note and ', '}{family.note}"
    )


def compact_check(host: PreTrainedModel) -> Check:
    """Whether `Compact` reads such a host, or why not."""
    try:
        check_pairs(host)
    except InputError as error:
        return Check("compact", "warn", str(error), "read it by other modes, such as --retrieve 2")
    tried = "" if is_tested(host) else ", tried on a short text"
    return Check("compact", "ok", f"{host.config.model_type}: key-value pairs can be compacted{tried}")


def crouter_checks(crouter: CRouterModel, tokenizer: PreTrainedTokenizerBase, name: str | None) -> Iterator[Check]:
    """The crouter itself, what it makes of a text that everyone has, and its calibration."""
    config = crouter.config
    fingerprint = crouter_fingerprint(crouter, decoder=True)
    yield Check("crouter", "ok", f"{crouter.name_or_path}, {config.chunk_length} tokens to {config.num_latents} "
                f"latents, {crouter.num_parameters() / 1e6:.1f} M parameters, {fingerprint[:8]}")  # fmt: skip
    calibration = load_calibration(name)
    calibrate = f"hf-crouter calibrate --crouter {crouter.name_or_path} --corpus CORPUS"
    if calibration is None:
        yield Check("calibration", "warn", "none: chunks get no grade", calibrate)
    elif calibration.fingerprint != fingerprint:
        yield Check("calibration", "fail", f"made for crouter {calibration.fingerprint[:8]}", calibrate)
        calibration = None
    else:
        few = calibration.chunks < 100
        yield Check("calibration", "warn" if few else "ok",
                    f"{calibration.chunks} chunks of {calibration.documents} documents",
                    "fewer than 100 chunks cannot give a 99% quantile" if few else "")  # fmt: skip
    sample = Path(argparse.__file__).read_text(encoding="utf-8")
    words = tokenizer(sample, add_special_tokens=False, verbose=False)["input_ids"][: config.chunk_length]
    context = compress_text(str(tokenizer.decode(words)), crouter, tokenizer)
    found = reconstruction_grade(calibration, float(context.reconstruction_nll[0]))
    yield Check("compression", "warn" if found == "foreign" else "ok",
                f"argparse.py, first chunk: TRA {100 * float(context.accuracy[0]):.1f}%, reconstruction NLL "
                f"{float(context.reconstruction_nll[0]):.3f} nats/token, {found}")  # fmt: skip
