"""History gain recovered on a real host: soft prompts, copying and retrieval beside windows of the same slots.

Two stages. `collect` (accelerator) records passes on the gate sets, fits the gates, and writes the loss of every
document, arm and chunk count; it can be split over processes (`--shard i/k`) that wait for each other's files.
`report` (CPU) turns these losses into `hgr-HOST.json`. Rows are those of
`eval.documents`; fewer chunks are the latest ones. An arm is what the host reads; its archive is what is older than
its raw window.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file
from torch import nn

from eval.arrays import about_of, chosen, joined_arrays, save_arrays, shard_of, wait_for
from eval.documents import CHUNK, EVALUATION, Windows
from eval.hgr.arms import ARMS, GATES, Layout, archives_of
from eval.hgr.candidates import Searchers
from eval.hgr.gates import finished, fit, load_gates
from eval.hgr.passes import measure, record_places
from eval.hgr.reader import DocumentReader, blocks, partners
from eval.hgr.report import losses_of, metrics, table
from eval.results import write_result
from hf_crouter.compressors.projector import find_projector
from hf_crouter.crouter.loading import load_crouter
from hf_crouter.errors import InputError
from hf_crouter.hosts.fingerprint import host_fingerprint
from hf_crouter.hosts.loading import load_host
from hf_crouter.hosts.unwrap import display_name
from hf_crouter.ngram.gate import GateConfig
from hf_crouter.training.loop import compiled_layers
from hf_crouter.utils.progress import Progress

GATE_SETS = ("gate_code", "gate_prose")
NOTES = (
    "Host: SmolLM2-135M-Instruct, 4-bit weights in bf16. hgr: share of what full history is worth over the window"
    " (a ratio of means; for prose the mean of the domains' ratios, and .ratio over all documents); intervals: "
    "paired bootstrap clustered by package, or by record of prose. diff.<arm>.<other>: hgr minus that of the other. "
    "Arms: soft prompts, retrieved chunks and copying are those that the name says. copy: the gate that ships, fitted "
    "to seven ways of reading; copy_fitted: one fitted on the gate sets to what that arm reads; copy_generic: one "
    "that does not see the host; copy_nine_weights: one weight an order. retrieve2: two chunks by the default scorer, "
    "retrieve2_<scorer> by another (retrieve2_oracle: the best pair by the target's loss, which copies by the gate "
    "fitted for retrieve2_bm25). longer_same_slots: a raw window longer by 8 tokens a chunk, as many as soft prompts "
    "take; longer_same_slots_retrieve2: by 8 a chunk and two chunks. snapkv, snapkv_window (its observation window "
    "is the raw one), expected_attention, streaming and knorm are kvpress 0.5.5 at these slots (.at8, "
    ".at8_retrieve2), at the kept tokens' own positions; mean_pool: means of token embeddings. Arms on fewer "
    "documents (.documents, .domains) were collected beside the others, retrieve2 on a CPU; window and full are "
    "taken over the same documents."
)


def about(args: argparse.Namespace) -> dict[str, Any]:
    """What another shard's or an earlier run's files must agree on."""
    return {"chunks": args.chunks, "gate_documents": args.gate_documents, "seed": args.seed}


@contextlib.contextmanager
def progress_of(name: str, documents: int, reader: DocumentReader) -> Iterator[Callable[[int], None]]:
    """A function that says that so many more documents are read; shown with the host's tokens a second."""
    with Progress() as progress:
        progress.start(name, documents, "documents", "tokens")
        before = reader.forwarded

        def advance(count: int) -> None:
            nonlocal before
            progress.advance(count, reader.forwarded - before)
            before = reader.forwarded

        yield advance
        progress.finish()


def collect_gate_places(reader: DocumentReader, args: argparse.Namespace, path: Path) -> None:
    """Records this shard's part of the gate sets."""
    count, parts, groups, first = max(args.chunks), [], [], 0
    shard, shards = args.shard
    archives = archives_of(reader.layout, [count])
    for name in GATE_SETS:
        windows = Windows.load(args.data, name)
        index = chosen(windows.records, args.gate_documents, args.seed)[shard::shards]
        clusters = {cluster: first + i for i, cluster in enumerate(sorted({r.cluster for r in windows.records}))}
        first += len(clusters)
        with progress_of(name, len(index), reader) as advance:
            for block in blocks(reader, windows.ids, index, args.block, None, archives):
                parts.append(record_places(reader, block, count))
                groups += [clusters[windows.records[i].cluster] for i in block.index]
                advance(len(block.index))
    arrays = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    save_arrays(path, {**arrays, "groups": np.array(groups, np.int64)}, about(args))


def collect_losses(reader: DocumentReader, args: argparse.Namespace, name: str, gates: dict[str, nn.Module]) -> None:
    """Measures this shard's part of an evaluation set; what is done so far is written after every block."""
    shard, shards = args.shard
    label = f".{'+'.join(sorted(args.arms))}" if args.arms else ""
    path = args.save / "losses" / f"{name}{label}.{shard}of{shards}.safetensors"
    windows = Windows.load(args.data, name)
    order = chosen(windows.records, args.documents, args.seed)
    index, oracle = order[shard::shards], set(order[: 0 if label else args.oracle_documents].tolist())
    arms = args.arms or list(ARMS)
    if path.exists() and about_of(path) == about(args) and len(load_file(path)["documents"]) == len(index):
        print(f"{name}: done before", flush=True)
        return
    archives, others, parts = archives_of(reader.layout, args.chunks, arms), partners(windows.records, args.seed), []
    with progress_of(name, len(index), reader) as advance:
        for block in blocks(reader, windows.ids, index, args.block, others, archives):
            tried = [i for i, document in enumerate(block.index) if int(document) in oracle]
            found = measure(reader, block, args.chunks, gates, tried, arms)
            parts.append({**found, "documents": block.index})
            save_arrays(path, joined_arrays(parts), about(args))
            advance(len(block.index))
    if not label:
        sets = {name: losses_of(args.save, name, args.data)}
        print(table(metrics(sets, args.chunks, args.seed, draws=200, slots=reader.layout)), flush=True)


def layout_of(crouter: Any) -> Layout:
    """Of the sets' rows, for a crouter that cuts chunks of their length."""
    if crouter.config.chunk_length != CHUNK:
        raise InputError(f"expected a crouter for chunks of {CHUNK} tokens, got {crouter.config.chunk_length}")
    return Layout(latents=crouter.config.num_latents)


def run_collect(args: argparse.Namespace) -> None:
    """The stage on the accelerator."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Searchers are forked before the accelerator is touched.
    with Searchers(args.workers) as searchers, contextlib.ExitStack() as compiling:
        host, tokenizer = load_host(args.host, device, torch.bfloat16)
        crouter, _ = load_crouter(args.crouter, device)
        projector = find_projector(crouter, host).to(device)
        for model in (host, crouter, projector):
            model.requires_grad_(False)
        compiling.enter_context(compiled_layers(host, args.compile, dynamic=True))
        layout = layout_of(crouter)
        stop_ids = frozenset(tokenizer.all_special_ids)
        reader = DocumentReader(host, crouter, projector, layout, stop_ids, searchers, args.tokens, args.seed)
        shard, shards = args.shard
        paths = [args.save / "gate_places" / f"{i}of{shards}.safetensors" for i in range(shards)]
        if not all(finished(args.save, name).exists() for name in GATES):
            if not paths[shard].exists():
                collect_gate_places(reader, args, paths[shard])
            wait_for(paths)
            for path in paths:
                if about_of(path) != about(args):
                    raise InputError(f"{path}: made with other settings; delete it")
            config = GateConfig(host_name=display_name(host), host_fingerprint=host_fingerprint(host))
            files = [load_file(path) for path in paths]
            for name in GATES[shard::shards]:
                if not finished(args.save, name).exists():
                    fit(name, files, config, args, device)
            del files
            wait_for([finished(args.save, name) for name in GATES])
        gates = load_gates(args.save, device)
        for name in args.sets:
            collect_losses(reader, args, name, gates)
        print(f"{reader.forwarded:,} tokens forwarded", flush=True)


def run_report(args: argparse.Namespace) -> None:
    """The stage on the CPU."""
    sets = {}
    for name in args.sets:
        if any((args.save / "losses").glob(f"{name}.[0-9]*of*.safetensors")):
            sets[name] = losses_of(args.save, name, args.data)
        else:
            print(f"{args.save}: no losses of {name}", flush=True)
    if not sets:
        raise InputError(f"{args.save}: no losses; run the stage `collect`")
    layout = Layout()
    found = metrics(sets, args.chunks, args.seed, slots=layout)
    for name in GATES:
        path = finished(args.save, name)
        if path.exists():
            record = about_of(path) if name == "nine_weights" else json.loads(path.read_text())["training"]
            found |= {f"gate.{name}.{key}": record[key] for key in ("train_gain", "held_out_gain", "places", "groups")}
    arrays = {f"{name}.{key}": values for name, losses in sets.items() for key, values in losses.arrays.items()}
    save_arrays(args.save / "losses.safetensors", arrays, about(args))
    print(table(found))
    config = {"layout": asdict(layout), "chunks": args.chunks, "gate_documents": args.gate_documents}
    print(
        write_result(
            args.result or f"hgr-{Path(args.host).name}",
            found,
            seed=args.seed,
            config=config,
            notes=NOTES,
            device=args.device,
        )
    )


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    cuda = torch.cuda.device_count() > 0  # does not start the accelerator
    parser.add_argument("stage", choices=["collect", "report"])
    parser.add_argument("--data", required=True, type=Path, help="folder of the sets of eval.documents")
    parser.add_argument("--save", required=True, type=Path, help="folder of gates and losses")
    parser.add_argument("--host", default="smollm2-135m")
    parser.add_argument("--crouter", help="the shipped one by default")
    parser.add_argument("--sets", nargs="+", choices=EVALUATION, default=list(EVALUATION))
    parser.add_argument("--chunks", nargs="+", type=int, default=[2, 4, 8])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), help="only these, beside what was measured before")
    parser.add_argument("--documents", type=int, help="of an evaluation set, at most; all by default")
    parser.add_argument("--gate-documents", type=int, default=400, help="of each gate set, at most")
    parser.add_argument("--oracle-documents", type=int, default=150, help="of each set, tried with every pair")
    parser.add_argument("--steps", type=int, default=600, help="of fitting a gate")
    parser.add_argument("--shard", type=shard_of, default=(0, 1), help="i/k: this process of k that run at once")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) // 2), help="searching processes")
    parser.add_argument("--block", type=int, default=32 if cuda else 2, help="documents on their way at once")
    parser.add_argument("--tokens", type=int, default=65_536 if cuda else 8192, help="forwarded at once")
    parser.add_argument("--compile", action="store_true", help="torch.compile each layer of the host")
    parser.add_argument("--device", help="report: where the losses were collected; this machine by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--result", help="hgr-HOST by default")


def run(args: argparse.Namespace) -> None:
    """Collects or reports."""
    (run_collect if args.stage == "collect" else run_report)(args)
