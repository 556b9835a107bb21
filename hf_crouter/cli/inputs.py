"""What several commands take: text files, output paths, devices, crouters and hosts."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

from ..errors import InputError


def add_crouter(parser: argparse.ArgumentParser) -> None:
    """Adds `--crouter`."""
    parser.add_argument("--crouter", metavar="FOLDER", help="folder or hub name of the crouter; by default the one "
                        "that comes with the package")  # fmt: skip


def add_device(parser: argparse.ArgumentParser) -> None:
    """Adds `--device`."""
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; by default a GPU where there is one")


def add_json(parser: argparse.ArgumentParser) -> None:
    """Adds `--json`."""
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of tables")


def positive(word: str) -> int:
    """An argument type: a whole number of at least 1."""
    try:
        value = int(word)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {word!r}")
    return value


def device(name: str) -> torch.device:
    """The device called `name`, which was tried.

    Raises:
        InputError: unknown, or not on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(name)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch without CUDA
        raise InputError(f"--device {name}: not usable here ({str(error).splitlines()[0]})") from error
    if chosen.type == "meta":
        raise InputError("--device meta: holds no values")
    return chosen


def read_text(path: str) -> str:
    """The text of a UTF-8 file, to the last byte; `-` reads stdin.

    Raises:
        InputError: empty, binary or not UTF-8.
        OSError: missing or unreadable.
    """
    data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    name = "stdin" if path == "-" else path
    if not data:
        raise InputError(f"{name}: empty, expected text")
    if b"\0" in data:
        raise InputError(f"{name}: a binary file (a zero byte at position {data.index(0)}), expected text")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: not UTF-8 text (byte {error.start})") from error


def check_output(path: str, source: str) -> None:
    """Refuses an output path before the work begins.

    Args:
        path: file to write.
        source: file that is read.

    Raises:
        InputError: the source itself, a folder, a device, or in a folder that is missing or not writable.
    """
    target = Path(path)
    if target.exists() and Path(source).exists() and target.samefile(source):
        raise InputError(f"{path}: would overwrite what is read from; name another file")
    if target.exists() and not target.is_file():
        raise InputError(f"{path}: expected a file to write, got a folder or device")
    if not target.parent.is_dir():
        raise InputError(f"{path}: the folder {target.parent} does not exist")
    if not os.access(target.parent, os.W_OK):
        raise InputError(f"{path}: the folder {target.parent} is not writable")


def share(word: str) -> float:
    """An argument type: a number from 0 to 1."""
    try:
        value = float(word)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {word!r}")
    return value


def host_dtype(where: torch.device) -> torch.dtype:
    """bfloat16 where the device computes in it, else float32: many CPUs only emulate bfloat16, and slowly."""
    native = where.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()  # as torch's own compiler asks
    return torch.bfloat16 if native else torch.float32
