"""Files of the package index, downloaded with the interpreter's own pip and never installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import InputError


def pip_download(
    requirements: Sequence[str],
    folder: Path,
    *,
    options: Sequence[str] = (),
    poll: Callable[[int], None] | None = None,
) -> list[Path]:
    """Downloads distributions without their dependencies and returns the files, sorted.

    Args:
        requirements: what to download, such as `numpy==2.1.0`.
        folder: an empty folder that receives the files.
        options: further options of `pip download`.
        poll: called several times a second with the bytes that have arrived.

    Raises:
        InputError: if pip is missing, the index cannot be reached, the disk is full, or there is no such distribution.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for requirement in requirements:
        if requirement.startswith("-"):
            raise InputError(f"expected the name of a package, not {requirement!r}")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--disable-pip-version-check"]
    command += ["--progress-bar", "off", *options, "--dest", str(folder), *requirements]
    status, output = run_pip(command, folder, poll)
    if status:
        raise InputError(_reason(output, ", ".join(requirements)))
    return sorted(path for path in folder.iterdir() if path.is_file())


def run_pip(command: list[str], folder: Path, poll: Callable[[int], None] | None) -> tuple[int, str]:
    """Runs pip and returns its exit status and output (tests put a runner of their own here)."""
    scratch = folder / "pip-scratch"
    scratch.mkdir(exist_ok=True)
    # pip downloads to the temporary folder and then copies: beneath ours, growth can be watched and nothing is left.
    environment = {**os.environ, "TMPDIR": str(scratch), "PIP_NO_PYTHON_VERSION_WARNING": "1"}
    log = scratch / "log"
    try:
        with (
            log.open("wb") as sink,
            subprocess.Popen(command, env=environment, stdout=sink, stderr=subprocess.STDOUT) as process,
        ):
            try:
                while process.poll() is None:
                    if poll is not None:
                        poll(_largest_file(folder))
                    time.sleep(0.1)
            except BaseException:
                process.kill()  # an interrupted command must not go on downloading
                raise
        return process.returncode, log.read_text(encoding="utf-8", errors="replace")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _largest_file(folder: Path) -> int:
    # The file that is arriving; pip's copy of it at the end would otherwise be counted twice.
    largest = 0
    for path in folder.rglob("*"):
        try:
            largest = max(largest, path.stat().st_size if path.is_file() else 0)
        except OSError:  # moved away meanwhile
            continue
    return largest


def _reason(output: str, wanted: str) -> str:
    lower = output.lower()
    if "no module named pip" in lower:
        return f"cannot download {wanted}: this Python has no pip (python -m ensurepip installs it)"
    if "no space left" in lower:
        return f"cannot download {wanted}: the disk is full"
    unreachable = ("connection", "temporary failure in name resolution", "timed out", "proxyerror", "sslerror")
    if any(sign in lower for sign in unreachable):
        return f"cannot download {wanted}: the package index cannot be reached (network, proxy or pip's configuration)"
    if "from versions: none" in lower:  # pip does not tell these two apart
        return f"cannot download {wanted}: the package index has no such distribution, or cannot be reached"
    if "no matching distribution" in lower:
        return f"cannot download {wanted}: the package index has no such distribution for this Python"
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines or ["no output"]
    return f"cannot download {wanted}: pip says: {errors[-1][:200]}"
