"""`hf-crouter expert`: experts of a set: trained for a new domain, listed, removed, tested."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..crouter.fingerprint import crouter_fingerprint
from ..crouter.loading import load_crouter
from ..data.corpora import load_corpus
from ..data.tokens import TokenArray, encode_documents
from ..errors import InputError
from ..routing.experts import SHIPPED_EXPERTS, Expert, ExpertSet, expert_folder, remove_expert
from ..routing.router import Router
from ..training.experts import (
    ExpertArguments,
    RoutedDomain,
    check_name,
    expert_config,
    join,
    load_models,
    load_tokens,
    matching_set,
    measure_cross_scores,
    route_domains,
    train_expert,
)
from ..utils.progress import progress
from .arguments import add_options, from_options, prepared_data
from .console import Column, note, print_json, print_table, size
from .inputs import add_crouter, add_device, add_json, device, host_dtype, positive

NAME = "expert"
HELP = "train an expert for a domain (stage 3), and list, remove, compare or test the experts of a set"
EXAMPLE = "hf-crouter expert add legal --corpus text-files:contracts --host smollm2-135m"
TESTS = ("files", "packages", "stdlib")  # parts of prepared data that no training reads


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    add = actions.add_parser("add", help="train an expert's two adapters, calibrate it and add it to the set")
    add.add_argument("name", metavar="NAME", help="of the new expert")
    add.add_argument("--corpus", action="append", default=[], help="corpus to prepare first; may be repeated")
    add_json(add)
    add_options(add, ExpertArguments)
    show = actions.add_parser("list", help="show a set's experts and what was measured when they were trained")
    remove = actions.add_parser("remove", help="take an expert out of a set and delete it")
    remove.add_argument("name", metavar="NAME", help="of the expert")
    compare = actions.add_parser("compare", help="measure how the texts of a set's experts look to each other, which "
                                 "tells what is none of theirs; `add` does so itself")  # fmt: skip
    test = actions.add_parser("test", help="route texts that no expert was trained on")
    for sub in (show, remove, compare, test):
        shipped = f", or {SHIPPED_EXPERTS.name}" if sub in (show, test) else ""
        sub.add_argument("--experts", default="experts", metavar="SET",
                         help=f"folder of the set (default: experts){shipped}")  # fmt: skip
        add_json(sub)
    test.add_argument("--data", nargs="+", default=[], metavar="NAME=PATH",
                      help="texts by the name of their expert, or by another name for texts of none: a folder of "
                      "prepared data, whose tests are taken, or new text files; by default what `expert add --corpus` "
                      "prepared")  # fmt: skip
    test.add_argument("--limit", type=positive, default=64, metavar="N", help="chunks of each (default: 64)")
    test.add_argument("--host", help="also measure this host's loss without and with the adapters")
    for sub in (compare, test):
        add_crouter(sub)
        add_device(sub)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    return {"add": _add, "list": _list, "remove": _remove, "compare": _compare, "test": _test}[args.action](args)


def data_folder(name: str) -> Path:
    """Where `expert add --corpus` puts prepared data by default."""
    return Path("runs") / "experts" / name / "data"


def _add(args: argparse.Namespace) -> int:
    arguments = from_options(ExpertArguments, args)
    if arguments.experts == SHIPPED_EXPERTS.name:  # would hide the set of that name from then on
        raise InputError(f"--experts: expected a folder of yours, got the name of the shipped set {arguments.experts}")
    arguments.check()  # what is wrong is said before anything is loaded or prepared
    check_name(args.name, arguments.experts)
    if not args.corpus and not (arguments.data or data_folder(args.name).exists()):
        raise InputError("--data: expected a folder of prepared data, or a --corpus to prepare, got none")
    models = load_models(arguments)
    matching_set(arguments.experts, expert_config(models))
    output = str(data_folder(args.name).parent)
    arguments.data = prepared_data(args.corpus, arguments.data, output, models.crouter_tokenizer)
    record = train_expert(args.name, arguments, models)
    if args.json:
        print_json({"name": args.name, **record})
        return 0
    if "held_out" in record:  # by the first of several processes
        found = record["held_out"]
        print(
            f"{record['path']}: on {found['documents']} documents kept out, "
            f"reconstruction NLL {found['residual']['base']:.3f} -> {found['residual']['adapter']:.3f} nats/token, "
            f"host loss {found['host_loss']['base']:.3f} -> {found['host_loss']['adapter']:.3f}"
        )
    return 0


def _list(args: argparse.Namespace) -> int:
    folder = expert_folder(args.experts)
    records = [describe(expert, folder / expert.name) for expert in ExpertSet.load(folder)]
    if args.json:
        print_json(records)
        return 0
    columns = [Column("expert", right=False), Column("size"), Column("crouter tokens"), Column("host tokens"),
               Column("reconstruction NLL 50%"), Column("reconstruction NLL 99%"), Column("host loss"),
               Column("with adapter"), Column("told by", right=False)]  # fmt: skip
    rows = []
    for record in records:
        trained, reconstruction_nll, loss = (
            record[key] or {} for key in ("tokens", "reconstruction_nll", "host_loss")
        )
        rows.append((
            record["name"], size(record["bytes"]),
            *(_number(trained.get(part), ",d") for part in ("compressor", "host")),
            *(_number(reconstruction_nll.get(level), ".3f") for level in ("0.5", "0.99")),
            *(_number(loss.get(key), ".3f") for key in ("base", "adapter")),
            "pattern" if record["profile"] else "NLL",
        ))  # fmt: skip
    print_table(columns, rows)
    return 0


def describe(expert: Expert, folder: Path) -> dict[str, Any]:
    """An expert for JSON.

    `reconstruction_nll` is that of held-out full chunks, nats/token by quantile; `tokens` and `host_loss` (nats/token)
    are None where the record of the training does not tell. `profile`: whether the pattern of its texts was measured.
    """
    training = expert.config.training
    length = max(expert.calibration.reconstruction_nlls)
    parts = {part: training.get(part, {}).get("tokens") for part in ("compressor", "host")}
    return {
        "name": expert.name,
        "host": expert.config.host_name,
        "bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        "tokens": parts if any(parts.values()) else None,
        "reconstruction_nll": {
            "tokens": length,
            **{f"{level:g}": expert.calibration.reconstruction_nll(length, level) for level in (0.5, 0.99)},
        },
        "host_loss": training.get("held_out", {}).get("host_loss"),
        "profile": expert.profile is not None,
    }


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _remove(args: argparse.Namespace) -> int:
    remove_expert(args.experts, args.name)
    left = list(ExpertSet.load(args.experts).names)
    if args.json:
        print_json({"removed": args.name, "experts": left})
    else:
        print(f"{args.name} removed; {args.experts} holds {', '.join(left) or 'no expert'}")
    return 0


def _compare(args: argparse.Namespace) -> int:
    experts = ExpertSet.load(args.experts)
    crouter, _ = load_crouter(args.crouter, device=device(args.device))
    experts.check(crouter_fingerprint(crouter, decoder=True))
    measure_cross_scores(args.experts, crouter)
    told = {expert.name: expert.profile is not None for expert in ExpertSet.load(args.experts)}
    if args.json:
        print_json(told)
        return 0
    for name, there in told.items():
        print(f"{name}: {'told by the pattern of its texts' if there else 'told by its NLL: too few texts of it'}")
    return 0


def _test(args: argparse.Namespace) -> int:
    found, names = route_texts(args.experts, args.data, args.host, args.crouter, device(args.device), args.limit)
    if args.json:
        print_json({name: asdict(domain) for name, domain in found.items()})
    else:
        print_routes(found, names)
    return 0


def route_texts(
    folder: str, data: list[str], host: str | None, crouter_folder: str | None, where: torch.device, limit: int
) -> tuple[dict[str, RoutedDomain], tuple[str, ...]]:
    """How held-out texts are routed by an expert set, and the names of its experts; arguments of `expert test`.

    Raises:
        InputError: a word that is no NAME=PATH, or something to read is missing or damaged.
        MismatchError: experts of another crouter or host.
    """
    experts = ExpertSet.load(expert_folder(folder))
    named = _named(data, experts)
    models = None
    if host:
        bf16 = host_dtype(where) == torch.bfloat16
        models = load_models(ExpertArguments(crouter=crouter_folder or "", host=host, bf16=bf16))
        matching_set(expert_folder(folder), expert_config(models))
        nn.Module.to(models.host, where)
        crouter, tokenizer = models.crouter, models.crouter_tokenizer
    else:
        crouter, tokenizer = load_crouter(crouter_folder)
        experts.check(crouter_fingerprint(crouter, decoder=True))
    nn.Module.to(crouter, where)
    domains = {name: read_texts(path, tokenizer) for name, path in named.items()}
    router = Router(crouter, experts, fewest=min(64, max(1, crouter.config.chunk_length // 8)))
    try:
        with progress("routing", "chunks") as update:
            return route_domains(models, router, domains, limit=limit, advance=update), router.names
    finally:
        router.remove()


def _named(words: list[str], experts: ExpertSet) -> dict[str, str]:
    """Paths by name."""
    named = {}
    for word in words:
        name, _, path = word.partition("=")
        if not name or not path:
            raise InputError(f"--data: expected NAME=PATH, got {word!r}")
        if name in named:
            raise InputError(f"--data: expected every name once, got {name} twice")
        named[name] = path
    if not words:
        named = {name: str(data_folder(name)) for name in experts.names if data_folder(name).exists()}
    if not named:
        raise InputError(f"--data: expected NAME=PATH for {', '.join(experts.names) or 'some text'}, got none")
    return named


def read_texts(path: str, tokenizer: Any) -> TokenArray:
    """Documents that no training read: the tests of prepared data, or all of the text files at `path`.

    Prepared data without tests gives its calibration part, with a note: thresholds, but no weights, come from it.

    Raises:
        InputError: nothing there, or data of another tokenizer.
    """
    folder = Path(path)
    if not (folder / "train.safetensors").exists():
        documents = list(load_corpus(f"text-files:{path}"))
        if not documents:
            raise InputError(f"{path}: expected prepared data or text files, got none")
        return encode_documents(documents, tokenizer, separator_id=0)  # counted in no chunk
    for parts in (TESTS, ("calibration",)):
        arrays = [load_tokens(file, tokenizer) for file in (folder / f"{part}.safetensors" for part in parts)
                  if file.exists()]  # fmt: skip
        if any(len(array) for array in arrays):
            if parts != TESTS:
                note(f"note: {path} holds no tests; its calibration documents are taken")
            return join(arrays)
    raise InputError(f"{path}: expected documents that were kept out of training, got none")


def print_routes(found: dict[str, RoutedDomain], names: Iterable[str]) -> None:
    """Prints accuracy and losses, and beside them how many texts went where."""
    targets = [*names, ""]
    kinds = ("base", "routed", "own", "oracle")
    losses = [key for key in kinds if any(key in domain.loss for domain in found.values())]
    columns = [Column("texts", right=False), Column("chunks"), Column("right %"),
               *(Column(f"to {name}" if name else "to none") for name in targets),
               *(Column(f"loss {key}") for key in losses)]  # fmt: skip
    rows = [
        (name, str(domain.pieces), f"{100 * domain.accuracy:.1f}",
         *(str(domain.routes.get(target, 0)) for target in targets),
         *(_number(domain.loss.get(key), ".3f") for key in losses))
        for name, domain in found.items()
    ]  # fmt: skip
    print_table(columns, rows)
