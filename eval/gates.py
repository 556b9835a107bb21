"""The gate of copying for all hosts: `python -m eval.gates record` reads texts with one, `fit` fits over several.

What is recorded are the features of positions and what came (`training.copying`), of the sets that are for gates
(`eval.documents`). A host that is left out of `fit` is one that the gate never saw.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from eval.rows import Rows
from hf_crouter.chunking import tokenizer_fingerprint
from hf_crouter.errors import InputError
from hf_crouter.hosts.loading import load_host
from hf_crouter.ngram.gate import Gate, GateConfig
from hf_crouter.training.copying import GateExamples, GateReader, read_examples, train_gate
from hf_crouter.training.gate import mixture_log_likelihood
from hf_crouter.utils.io import replaced_file

SETS = ("gate_code", "gate_prose", "gate_repo")


def record(args: argparse.Namespace) -> None:
    """Reads the rows of all sets with a host and writes what a gate would learn from.

    Raises:
        InputError: a set is missing or was made for another tokenizer.
    """
    cuda = torch.cuda.is_available()
    host, tokenizer = load_host(args.host, "cuda" if cuda else "cpu", torch.bfloat16 if cuda else torch.float32)
    reader, shard, shards = GateReader(host, tokenizer), *map(int, args.shard.split("/"))
    found = []
    for name in args.sets:
        rows = Rows.load(args.data, name, tokenizer_fingerprint(tokenizer))
        some = range(len(rows.ids))[: args.documents][shard::shards]
        texts = [(rows.ids[i].astype(np.int64), rows.records[i].cluster) for i in some]
        found += read_examples(reader, texts, rows.shape.target, seed=[shard, SETS.index(name)], title=name)
    if not found:
        raise InputError(f"record: expected texts in which anything matches, got none in shard {args.shard}")
    parts, groups = zip(*found, strict=True)
    names = sorted(set(groups))
    number = [np.full(len(part.host), names.index(group), np.int32) for part, group in found]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with replaced_file(args.out) as temporary:
        save_file({**vars(GateExamples.joined(parts)), "groups": torch.from_numpy(np.concatenate(number))}, temporary,
                  {"host": Path(args.host).name, "groups": json.dumps(names)})  # fmt: skip
    print(f"{args.out}: {sum(map(len, number)):,} positions of {len(found):,} texts")


def read(path: Path) -> tuple[str, list[tuple[GateExamples, str]]]:
    """The host of a file that `record` wrote, and its examples with their groups.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata()
            names = json.loads(about["groups"])
            groups = file.get_tensor("groups")
            known = [file.get_tensor(name) for name in GateExamples.__dataclass_fields__]
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise InputError(f"{path}: expected a file of eval.gates record, got {error!r}") from error
    parts = [(GateExamples(*(value[groups == n] for value in known)), name) for n, name in enumerate(names)]
    return about["host"], parts


def fit(args: argparse.Namespace) -> None:
    """Fits a gate over the recorded hosts and writes it, and prints what it gains on each host.

    Raises:
        InputError: no host is left.
    """
    recorded: dict[str, list[tuple[GateExamples, str]]] = {}
    for path in args.examples:
        host, parts = read(path)
        recorded.setdefault(host, []).extend(parts)
    unknown = sorted(set(args.leave_out) - set(recorded))
    if unknown:
        raise InputError(f"--leave-out: expected hosts among {sorted(recorded)}, got {', '.join(unknown)}")
    hosts = sorted(host for host in recorded if host not in args.leave_out)
    if not hosts:
        raise InputError(f"fit: expected examples of a host that is not left out, got those of {sorted(recorded)}")
    examples = [part for host in hosts for part in recorded[host]]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    gate, fitted = train_gate(examples, GateConfig(training={"hosts": hosts}), seed=args.seed, device=device)
    gate.save(args.out)
    print(f"{args.out}: {', '.join(hosts)}; {fitted['places']:,} positions, "
          f"{fitted['held_out_gain']:.4f} nats gained on those held out")  # fmt: skip
    for host in sorted(recorded):
        print(f"  {host}: {gain(gate, recorded[host]):.4f} nats gained on all of its positions")


@torch.no_grad()
def gain(gate: Gate, examples: Sequence[tuple[GateExamples, str]]) -> float:
    """Nats that a gate gains over the host, at positions where anything matches."""
    known = GateExamples.joined([part for part, _ in examples])
    total = mixture_log_likelihood(gate, known.features, known.available, known.copied, known.host) - known.host
    return float(total.double().mean())


def main(argv: list[str] | None = None) -> int:
    """Runs one step; exit status 2 on bad input."""
    parser = argparse.ArgumentParser(prog="python -m eval.gates", description=__doc__)
    steps = parser.add_subparsers(dest="step", required=True)
    step = steps.add_parser("record")
    step.add_argument("--host", required=True, help="known name, folder or hub name")
    step.add_argument("--data", type=Path, required=True, help="folder of the sets of eval.documents")
    step.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    step.add_argument("--documents", type=int, default=200, help="of each set, at most")
    step.add_argument("--shard", default="0/1", help="this process's share: number/of how many")
    step.add_argument("--out", type=Path, required=True, help="file, .safetensors")
    step.set_defaults(run=record)
    step = steps.add_parser("fit")
    step.add_argument("examples", nargs="+", type=Path, help="files of record")
    step.add_argument("--leave-out", nargs="+", default=[], help="hosts")
    step.add_argument("--seed", type=int, default=0)
    step.add_argument("--out", type=Path, required=True, help="folder of the gate")
    step.set_defaults(run=fit)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except InputError as error:
        print(f"eval.gates: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
