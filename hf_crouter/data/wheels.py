"""The corpus `wheels`: packages by name, downloaded and unpacked, not installed."""

from __future__ import annotations

import hashlib
import io
import os
import re
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from ..errors import InputError
from ..utils.io import cache_home, temporary_folder_beside
from ..utils.pip_download import pip_download
from ..utils.progress import Progress
from .documents import MAXIMUM, MINIMUM, Document, decode_source


def wheels(argument: str, progress: Progress | None = None) -> Iterator[Document]:
    """Yields the Python source in packages' wheels (or source archives, where there is no wheel), by package and id.

    Archives are kept below the cache folder and read from memory, so no member can write anywhere. A source archive
    makes pip run its build backend for the metadata, as any installation of it would.

    Args:
        argument: requirements joined by commas, such as `numpy==2.1.0,flask`.
        progress: shows it.

    Raises:
        InputError: if pip or the index cannot be reached, an archive is damaged, or a package holds the texts of
            benchmarks (`lm_eval`).
    """
    progress = progress or Progress(enabled=False)
    requirements = [entry.strip() for entry in argument.split(",") if entry.strip()]
    if not requirements:
        raise InputError("wheels needs package names: wheels:numpy==2.1.0,flask")
    for requirement in requirements:
        if re.match(r"lm[-_.]+eval($|[^A-Za-z0-9_.-])", requirement, re.IGNORECASE):
            raise InputError(f"wheels: expected packages without evaluation data, got {requirement}")
    return _documents(requirements, progress)


def _documents(requirements: list[str], progress: Progress) -> Iterator[Document]:
    progress.start("downloading packages", len(requirements), "packages", "bytes")
    for requirement in sorted(requirements):
        archive = fetch_archive(requirement)
        group = _distribution(archive.name)
        read = 0
        for name, data in sorted(_members(archive)):
            text = decode_source(data)
            if text is not None:
                read += len(text)
                yield Document(name, group, text)
        progress.advance(1, read)
    progress.finish()


def fetch_archive(requirement: str) -> Path:
    """Path of a package's wheel or source archive in the cache, downloaded if it is not there.

    Args:
        requirement: a name with or without a version, such as `numpy==2.1.0`.

    Raises:
        InputError: if it cannot be downloaded.
    """
    # Wheels differ by Python version only in compiled parts, but a name without version is kept as first fetched.
    key = re.sub(r"[^A-Za-z0-9.]+", "-", requirement) + "-" + hashlib.sha256(requirement.encode()).hexdigest()[:8]
    folder = cache_home() / "wheels" / key
    for path in sorted(folder.glob("*")) if folder.is_dir() else ():
        return path
    with temporary_folder_beside(folder) as temporary:
        try:
            pip_download([requirement], temporary, options=["--only-binary", ":all:"])
        except InputError as error:
            if "no such distribution" not in str(error):
                raise
            pip_download([requirement], temporary)
        try:
            os.rename(temporary, folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
    return sorted(folder.glob("*"))[0]


def _distribution(name: str) -> str:
    stem = re.sub(r"\.(whl|zip|tar\.\w+|tgz)$", "", name)
    found = re.match(r"(.+?)-\d", stem)
    return (found.group(1) if found else stem).replace("_", "-").lower()


def _members(archive: Path) -> Iterator[tuple[str, bytes]]:
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as file:
                for entry in file.infolist():
                    if _wanted(entry.filename, entry.file_size):
                        yield entry.filename, file.read(entry)
        else:
            with tarfile.open(fileobj=io.BytesIO(archive.read_bytes())) as file:
                for member in file:
                    stream = file.extractfile(member) if member.isfile() else None
                    if stream is not None and _wanted(member.name, member.size):
                        # Source archives put all below NAME-VERSION/, which no import path has.
                        yield member.name.partition("/")[2] or member.name, stream.read()
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, OSError) as error:
        raise InputError(f"{archive.name} is damaged ({error}): delete {archive.parent} to fetch it again") from error


def _wanted(name: str, size: int) -> bool:
    return name.endswith(".py") and MINIMUM <= size <= 4 * MAXIMUM
