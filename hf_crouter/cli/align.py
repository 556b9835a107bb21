"""`hf-crouter align`: stage 2, a projector lets a frozen host read a crouter's latents."""

from __future__ import annotations

import argparse

from ..errors import InputError
from ..host.fetch import resolve_host
from ..host.projector import align_command
from ..loading import load_host_tokenizer
from ..training.align import AlignArguments, train_alignment
from .arguments import add_options, from_options, prepared_data
from .console import print_json

NAME = "align"
HELP = "train the projector between a frozen host and a crouter (stage 2)"
EXAMPLE = align_command("smollm2-135m", "runs/code/crouter")


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument("--corpus", action="append", default=[], help="corpus to prepare first; may be repeated")
    parser.add_argument("--json", action="store_true", help="print the record as JSON")
    add_options(parser, AlignArguments)


def run(options: argparse.Namespace) -> int:
    """Prepares the corpora, unless `--data` names prepared ones, trains and prints where the projector is."""
    arguments = from_options(AlignArguments, options)
    for name in ("host", "crouter"):
        if not getattr(arguments, name):
            raise InputError(f"--{name}: expected a folder or a hub name, got none")
    arguments.box(1)  # a wrong box is said before the corpora are prepared
    arguments.host = str(resolve_host(arguments.host))
    tokenizer = load_host_tokenizer(arguments.host)[1]
    arguments.data = prepared_data(options.corpus, arguments.data, arguments.output, tokenizer)
    record = train_alignment(arguments)
    if options.json:
        print_json(record)
    else:
        print(f"{record['path']}: {record['steps']:,} steps, {record['final']}")
    return 0
