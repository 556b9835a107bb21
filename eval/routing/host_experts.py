"""What an expert set is worth to a host: its loss routed by content, beside plain, own adapter and the best of all.

The set is made by `hf-crouter expert add`, the texts are folders of prepared data in the crouter's tokens.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from eval.results import host_key, host_note, write_result
from hf_crouter.cli.expert import route_texts

NOTES = (
    "Nats/token of the host on held-out chunks of each kind, each read from its start: base (the plain host), routed "
    "(under the adapter that the crouter's reconstruction NLL chose, or the plain host), own (the adapter of the "
    "kind's name), oracle (of plain host and adapters the best for each chunk). accuracy: chunks that went to their "
    "own expert, or to the plain host where there is none. oracle_share: what routing gains over the plain host, of "
    "what the oracle gains."
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("--host", required=True, help="known name, folder or hub name")
    parser.add_argument("--experts", required=True, type=Path, help="folder of the set")
    parser.add_argument("--crouter", help="the shipped one by default")
    parser.add_argument("--data", nargs="+", required=True, metavar="NAME=PATH", help="held-out texts by kind")
    parser.add_argument("--limit", type=int, default=128, help="chunks of each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--result", help="experts-HOST by default")


def run(args: argparse.Namespace) -> None:
    """Measures and writes the result.

    Raises:
        InputError: a word that is no NAME=PATH, or something to read is missing.
    """
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found, experts = route_texts(str(args.experts), args.data, args.host, args.crouter, where, args.limit)
    metrics: dict[str, float] = {}
    for name, domain in found.items():
        metrics |= {f"{name}.{key}": value for key, value in domain.loss.items()}
        metrics |= {f"{name}.accuracy": domain.accuracy, f"{name}.chunks": domain.pieces}
        best = domain.loss["base"] - domain.loss["oracle"]
        if best > 0:
            metrics[f"{name}.oracle_share"] = (domain.loss["base"] - domain.loss["routed"]) / best
        print(name, {key: round(value, 3) for key, value in domain.loss.items()}, f"{domain.accuracy:.2f}", flush=True)
    known = [name for name in found if name in experts]
    for key in ("base", "routed", "own", "oracle"):
        if known:
            metrics[f"known.{key}"] = sum(found[name].loss[key] for name in known) / len(known)
    result = args.result or f"experts-{host_key(args.host)}"
    config = {"limit": args.limit, "experts": list(experts)}
    print(write_result(result, metrics, seed=args.seed, config=config, notes=f"{host_note(args.host)} {NOTES}"))
