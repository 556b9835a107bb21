"""The corpus `installed-python`: Python source of the packages on this machine, and its standard library."""

from __future__ import annotations

import hashlib
import os
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..errors import InputError
from ..utils.progress import Progress
from .documents import MAXIMUM, MINIMUM, Document, read_source

STDLIB = "<stdlib>"
FAMILY_CAP = 40_000_000  # characters: generated families (clients of web services and the like) would drown the rest
# The evaluation harness is in no corpus; our own source would leak the tests.
_SKIPPED = frozenset({"lm_eval", "hf_crouter"})
_PACKAGE_FOLDERS = ("site-packages", "dist-packages")


def installed_python(argument: str = "", progress: Progress | None = None) -> Iterator[Document]:
    """Yields source files of every package folder of this interpreter, then of its standard library, by id.

    Ids are paths below the package folder, groups are top-level packages; the standard library's ids begin with
    `<stdlib>/` and their group is `<stdlib>`. Of a package of more than 40 MB a hash-ordered 40 MB are read.

    Args:
        argument: must be empty.
        progress: shows it.

    Raises:
        InputError: if an argument is given.
    """
    if argument:
        raise InputError(f"the corpus installed-python takes no argument, not {argument!r}")
    progress = progress or Progress(enabled=False)
    families: dict[str, dict[str, tuple[Path, int]]] = {}
    for root in package_folders():
        for path, size in _python_files(root):
            relative = path.relative_to(root)
            group = relative.parts[0].removesuffix(".py")
            if group not in _SKIPPED:
                # Folders are in order of import, so the first one is what `import` would find.
                families.setdefault(group, {}).setdefault(relative.as_posix(), (path, size))
    library = Path(sysconfig.get_path("stdlib"))
    families[STDLIB] = {
        f"{STDLIB}/{path.relative_to(library).as_posix()}": (path, size) for path, size in _python_files(library)
    }
    progress.start("reading installed Python source", sum(map(len, families.values())), "files", "bytes")
    with ThreadPoolExecutor(8) as pool:
        for group in sorted(families):
            yield from _family(group, families[group], progress, pool)
    progress.finish()


def package_folders() -> list[Path]:
    """Existing package folders: on `sys.path`, the interpreter's own, and those of the interpreter beneath a venv."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    folders = [Path(entry) for entry in sys.path if Path(entry).name in _PACKAGE_FOLDERS]
    folders += [Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")]
    for prefix in (sys.base_prefix, sys.base_exec_prefix):
        for middle in (f"lib/{version}", f"local/lib/{version}", f"lib64/{version}", "lib/python3"):
            folders += [Path(prefix, middle, name) for name in _PACKAGE_FOLDERS]
    # The same folder may be named twice through a link.
    return list({folder.resolve(): None for folder in folders if folder.is_dir()})


def _python_files(root: Path) -> Iterator[tuple[Path, int]]:
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in ("__pycache__", *_PACKAGE_FOLDERS))
        for name in sorted(names):
            path = Path(folder, name)
            if not name.endswith(".py"):
                continue
            try:
                size = path.stat().st_size
            except OSError:  # a broken link
                continue
            if MINIMUM <= size <= 4 * MAXIMUM:
                yield path, size


def _family(
    group: str, files: dict[str, tuple[Path, int]], progress: Progress, pool: ThreadPoolExecutor
) -> Iterator[Document]:
    # The standard library is never in training, so its size harms nothing.
    capped = group != STDLIB and sum(size for _, size in files.values()) > FAMILY_CAP
    order = sorted(files, key=_hash if capped else None)
    chosen: list[Document] = []
    characters = 0
    for start in range(0, len(order), 256):
        names = order[start : start + 256]
        read = 0
        for name, text in zip(names, pool.map(read_source, (files[name][0] for name in names)), strict=True):
            if text is not None and not (capped and characters + len(text) > FAMILY_CAP):
                chosen.append(Document(name, group, text))
                characters += len(text)
                read += len(text)
        progress.advance(len(names), read)
        if capped and characters > 0.999 * FAMILY_CAP:
            progress.advance(len(order) - start - len(names), 0)
            break
    yield from sorted(chosen, key=lambda document: document.id)


def _hash(name: str) -> bytes:
    return hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=16).digest()
