"""`hf-crouter budgets`: how many key-value pairs each layer of a host should keep, measured on documents."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from ..errors import InputError
from ..hosts.fetch import resolve_host
from ..hosts.loading import load_host
from ..training.budgets import BudgetArguments, measure_budgets
from .arguments import add_options, from_options, prepared_data
from .console import Column, print_json, print_table
from .inputs import add_device, add_json, device

NAME = "budgets"
HELP = "measure how many key-value pairs each layer of a host should keep, for Compact"
EXAMPLE = "hf-crouter budgets --host qwen2.5-coder-0.5b --corpus wheels:flask,tornado --output runs/budgets"


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument("--corpus", action="append", default=[], help="corpus to prepare first; may be repeated")
    add_device(parser)
    add_json(parser)
    add_options(parser, BudgetArguments)


def run(options: argparse.Namespace) -> int:
    """Prepares the corpora, unless `--data` names prepared ones, measures, and prints what each layer keeps of 32."""
    arguments = from_options(BudgetArguments, options)
    if not arguments.host:
        raise InputError("--host: expected a known name, a folder or a hub name, got none")
    arguments.check()
    arguments.host = str(resolve_host(arguments.host))
    host, tokenizer = load_host(arguments.host, device(options.device))
    arguments.data = prepared_data(options.corpus, arguments.data, arguments.output, tokenizer)
    budgets = measure_budgets(host, tokenizer, arguments)
    path = budgets.save(arguments.output)
    if options.json:
        print_json({"path": str(path), **asdict(budgets)})
        return 0
    print(f"{path}: pass it as Compact(budgets=...)")
    rows = [(str(n), f"{one[0]:.4f}", str(kept))
            for n, (one, kept) in enumerate(zip(budgets.losses, budgets.counts(32), strict=True)) if one]  # fmt: skip
    print_table([Column("layer"), Column(f"KL at {budgets.slots[0]}, nats/token"), Column("slots of 32")], rows)
    return 0
