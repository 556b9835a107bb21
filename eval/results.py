"""One format for every measured figure: `eval/results/NAME.json`."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

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
    """The checkout's commit, with `+` when tracked files differ from it; `CROUTER_COMMIT` where there is no git."""
    root = Path(__file__).parent.parent
    try:
        git = ["git", "-C", str(root)]
        name = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("CROUTER_COMMIT", "unknown")
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


def write_result(
    name: str,
    metrics: dict[str, float],
    *,
    seed: int,
    config: dict[str, Any],
    notes: str = "",
    folder: Path | None = None,
) -> Path:
    """Writes a result atomically and returns its path.

    Args:
        name: file name without suffix.
        metrics: figures by dotted key; intervals as `key.lo` and `key.hi`.
        seed: of everything random in the measurement.
        config: arguments that shaped it, without paths of one machine.
        notes: what a reader must know beside the figures.
        folder: `eval/results` by default.
    """
    arguments = [a for a in sys.argv[1:] if not a.startswith("/")]
    result = {
        "name": name,
        "command": shlex.join(["python", "-m", "eval.run", *arguments]),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "device": device_name(),
        "versions": versions(),
        "seed": seed,
        "config": config,
        "metrics": {k: round(float(v), 6) for k, v in metrics.items()},
        "notes": notes,
    }
    folder = folder or Path(os.environ.get("CROUTER_RESULTS", FOLDER))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    temporary = path.with_suffix(".json.part")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.replace(path)
    return path


def read_result(name: str) -> dict[str, Any]:
    """A result as written."""
    return json.loads((FOLDER / f"{name}.json").read_text())
