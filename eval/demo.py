"""The figures of `hf-crouter demo`: one file of the standard library, read eight ways by the real host."""

from __future__ import annotations

import argparse
import contextlib
import io
import json

from eval.results import write_result
from hf_crouter.cli.main import main as command
from hf_crouter.errors import InputError


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("--file", help="the demo's own file by default")
    parser.add_argument("--result", default="demo")


def run(args: argparse.Namespace) -> None:
    """Runs the command with `--json` and keeps its figures."""
    words = ["demo", "--json", *(["--file", args.file] if args.file else [])]
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        status = command(words)
    if status:
        raise InputError(f"demo: expected exit status 0, got {status}")
    found = json.loads(output.getvalue())
    metrics: dict[str, float] = {"tokens": found["tokens"], "worth": found["worth"]["full_history"]}
    for arm in found["arms"]:
        name = arm["key"]
        metrics |= {f"{name}.loss": arm["loss"], f"{name}.slots": arm["kv_slots"], f"{name}.kv_bytes": arm["kv_bytes"]}
    for name, share in found["worth"].items():
        if name != "full_history" and share is not None:
            metrics[f"{name}.recovered"] = share
    metrics["copied"] = found["copied"]
    nlls = sorted(chunk["reconstruction_nll"] for chunk in found["chunks"])
    metrics |= {
        "chunks": len(nlls),
        "reconstruction_nll.median": nlls[len(nlls) // 2],
        "tra.mean": sum(chunk["accuracy"] for chunk in found["chunks"]) / len(nlls),
        "chunks.routed": sum(route["expert"] is not None for route in found["routes"]),
    }
    config = {key: found[key] for key in ("file", "host", "crouter", "dtype", "threads", "last", "window")}
    path = write_result(
        args.result, metrics, seed=0, config=config, notes="One file, no interval: " + found["summary"]
    )
    print(path)
