"""`hf-crouter train`: stage 1, a crouter learns to rebuild chunks."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..hosts.fetch import resolve_host
from ..training.reconstruct import ReconstructArguments, read_config, read_tokenizer, train_reconstruction
from .arguments import add_options, from_options, prepared_data
from .console import print_json

NAME = "train"
HELP = "train a crouter on a corpus (stage 1)"
EXAMPLE = "hf-crouter train --corpus installed-python --tokenizer smollm2-135m --output runs/code --seconds 600"


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument("--corpus", action="append", default=[], help="corpus to prepare first; may be repeated")
    parser.add_argument("--json", action="store_true", help="print the record as JSON")
    add_options(parser, ReconstructArguments)


def run(options: argparse.Namespace) -> int:
    """Prepares the corpora, unless `--data` names prepared ones, trains and prints where the crouter is."""
    arguments = from_options(ReconstructArguments, options)
    arguments.box(1)  # what is wrong is said before the corpora are prepared
    name = arguments.tokenizer or arguments.init or ""
    arguments.tokenizer = str(resolve_host(name)) if name else ""
    tokenizer = read_tokenizer(arguments.tokenizer)
    read_config(arguments.config, len(tokenizer))
    arguments.data = prepared_data(options.corpus, arguments.data, arguments.output, tokenizer)
    record = train_reconstruction(arguments)
    crouter = Path(arguments.output) / "crouter"
    if options.json:
        print_json({"path": str(crouter), **record})
    else:
        print(f"{crouter}: {record['parameters']:,} parameters, {record['tokens']:,} tokens")
    return 0
