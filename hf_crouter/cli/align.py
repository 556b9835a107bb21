"""`hf-crouter align`: stage 2, a projector and a gate let a frozen host read a compressed past."""

from __future__ import annotations

import argparse

from ..compressors.projector import align_command
from ..errors import InputError
from ..hosts.fetch import resolve_host
from ..hosts.loading import load_host_tokenizer
from ..training.align import AlignArguments, train_alignment
from ..training.copying import train_copying
from .arguments import add_options, from_options, prepared_data
from .console import print_json

NAME = "align"
HELP = "train the projector and the copying gate between a frozen host and a crouter (stage 2)"
EXAMPLE = align_command("smollm2-135m", "runs/code/crouter")


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument("--corpus", action="append", default=[], help="corpus to prepare first; may be repeated")
    parser.add_argument("--json", action="store_true", help="print the records of `projector` and `gate` as JSON")
    add_options(parser, AlignArguments)


def run(options: argparse.Namespace) -> int:
    """Prepares the corpora, unless `--data` names prepared ones, trains and prints where the projector is."""
    arguments = from_options(AlignArguments, options)
    for name in ("host", "crouter"):
        if not getattr(arguments, name):
            raise InputError(f"--{name}: expected a folder or a hub name, got none")
    if arguments.only != "gate":
        arguments.box(1)  # a wrong box is said before the corpora are prepared
    arguments.check()
    arguments.host = str(resolve_host(arguments.host))
    tokenizer = load_host_tokenizer(arguments.host)[1]
    arguments.data = prepared_data(options.corpus, arguments.data, arguments.output, tokenizer)
    records = {}
    if arguments.only != "gate":
        records["projector"] = train_alignment(arguments)
    if arguments.only != "projector":
        records["gate"] = train_copying(arguments)
    if options.json:
        print_json(records)
        return 0
    for part, record in records.items():
        if part == "projector":
            print(f"{record['path']}: {record['steps']:,} steps, {record['final']}")
        else:
            gain = f"{record['held_out_gain']:.4f} nats/token gained on those held out"
            print(f"{record['path']}: {record['documents']:,} documents, {gain}")
    return 0
