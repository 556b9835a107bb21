"""One format for every measured figure: `eval/results/NAME.json`."""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from hf_crouter.hosts.known_hosts import KNOWN_HOSTS
from hf_crouter.utils.io import write_json

FOLDER = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "accelerate", "numpy", "hf_crouter")


def device_name() -> str:
    """The GPU's name, or the processor's model and its core count."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), None)
    return f"{model or platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def commit() -> str:
    """The checkout's commit, with `+` when tracked files differ from it; `CROUTER_COMMIT` says it for a mere copy."""
    if "CROUTER_COMMIT" in os.environ:
        return os.environ["CROUTER_COMMIT"]
    root = Path(__file__).parent.parent
    try:
        git = ["git", "-C", str(root)]
        name = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    lines = [line for line in changed.stdout.splitlines() if "eval/results/" not in line]
    return name.stdout.strip() + ("+" if lines else "")


def versions() -> dict[str, str]:
    """Installed versions of what a figure depends on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "source"
    return found


def provenance() -> dict[str, Any]:
    """Where figures are collected that another machine reports: commit, device and versions; see `write_result`."""
    return {"commit": commit(), "device": device_name(), "versions": versions()}


def plain_command(arguments: Sequence[str]) -> str:
    """The command as another machine can read it: of a path only its last part is kept.

    Args:
        arguments: words behind `python -m eval.run`.
    """
    return shlex.join(["python", "-m", "eval.run", *(_without_folders(word) for word in arguments)])


def _without_folders(word: str) -> str:
    name, equals, value = word.rpartition("=")  # --option=PATH and NAME=PATH
    # one slash may be a name on the hub; a path of this machine exists or shows itself
    local = value.startswith(("/", "~", ".")) or value.count("/") > 1 or ("/" in value and Path(value).exists())
    return name + equals + (Path(value).name or "." if local else value)


def write_result(
    name: str,
    metrics: dict[str, float],
    *,
    seed: int,
    config: dict[str, Any],
    notes: str = "",
    folder: Path | None = None,
    device: str | None = None,
    made: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a result atomically and returns its path.

    Args:
        name: file name without suffix.
        metrics: figures by dotted key; intervals as `key.lo` and `key.hi`. JSON knows no infinity: a figure that is
            not finite is left out.
        seed: of everything random in the measurement.
        config: arguments that shaped it, without paths of one machine.
        notes: what a reader must know beside the figures.
        folder: `eval/results` by default.
        device: where it was measured; this machine by default.
        made: device, commit and versions of where the figures were collected, if that was another machine or day.
    """
    made = made or {}
    result = {
        "name": name,
        "command": plain_command(sys.argv[1:]),
        "commit": made.get("commit") or commit(),
        "date": datetime.date.today().isoformat(),
        "device": device or made.get("device") or device_name(),
        "versions": made.get("versions") or versions(),
        "seed": seed,
        "config": config,
        "metrics": {k: round(float(v), 6) for k, v in metrics.items() if math.isfinite(v)},
        "notes": notes,
    }
    path = (folder or Path(os.environ.get("CROUTER_RESULTS", FOLDER))) / f"{name}.json"
    write_json(path, result)
    return path


def host_key(name: str) -> str:
    """How a result's name calls a host: the last part of its name or folder, short for known families."""
    last = Path(name).name.lower().removesuffix("-instruct")
    return last.replace("qwen2.5-coder-", "qwen")


def size_name(length: int) -> str:
    """How keys call a number of tokens: "32k" are 32,768."""
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)


def size_of(name: str) -> int:
    """The number of tokens that keys call so."""
    return 1024 * int(name[:-1]) if name.endswith("k") else int(name)


def host_note(name: str) -> str:
    """What a result's notes say of its host first: a known one's title and what was done to its weights."""
    known = KNOWN_HOSTS.get(Path(name).name)
    return f"Host: {known.title}, weights {known.quantization}." if known else f"Host: {Path(name).name}."


def read_result(name: str) -> dict[str, Any]:
    """A result as written."""
    return json.loads((FOLDER / f"{name}.json").read_text())
