"""History gain recovered and exact lines on a real host: every way of reading beside windows of the same slots.

Two stages. `collect` (accelerator) reads the documents by one arm after the other, in the order of `eval.arms`, and
writes each document's figures; it can be stopped anywhere and goes on where it was, and can be split over processes
(`--shard i/k`). `report` (CPU) turns them, and what `eval.peers` measured on the same rows, into `hgr-HOST.json`. Rows
are those of `eval.documents`; fewer chunks are the latest ones.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eval.arms import SCORED, Reader
from eval.arrays import about_of, made_by, save_arrays, shard_of
from eval.documents import EVALUATION
from eval.hgr.measure import exists, partners, read
from eval.hgr.report import measured, metrics, table
from eval.results import host_key, host_note, provenance, write_result
from eval.rows import Rows, right_lines
from hf_crouter.chunking import tokenizer_fingerprint
from hf_crouter.crouter.loading import load_crouter
from hf_crouter.errors import InputError
from hf_crouter.hosts.loading import load_host
from hf_crouter.utils.progress import Progress

CHUNKS = {"repo": (40,)}  # of the past; 8 in the other sets
NOTES = (
    "hgr: share of what full history is worth over the raw window (a ratio of means; for prose the mean of the "
    "domains' ratios, and .ratio over all documents). lines: share of whole lines all of whose tokens are the greedy "
    "choice, teacher-forced; greedy: share of such tokens. slots: positions in the cache before the scored tokens. "
    "Intervals: paired bootstrap clustered by package, or by record of prose; diff.<arm>.<other>: hgr, "
    "linesdiff.<arm>.<other>: lines, minus that of the other. Arms: what the name says, by CompressedHistory.score. "
    "copy: the gate that comes with the package; "
    "copy_fitted: a gate fitted on other packages' documents, read by this host. "
    "longer_same_slots: a raw window longer by 8 tokens a chunk, _at128 by 128, _retrieve2 by 1,024; with "
    "copying, chunks behind that window are the archive. soft: soft prompts; shuffled: those of another text, of the "
    "same package where there is one. retrieve2_oracle: the pair of chunks of least loss on the scored tokens. "
    "<method>.at<t>: t entries a chunk and head, prefix and window beside them, by kvpress 0.5.5, from one read of "
    "the whole context; full_quantised<bits>: the whole cache, quantised by transformers."
)


def chunks_of(name: str, asked: list[int] | None, rows: Rows) -> list[int]:
    """Chunk counts that a set is read with: its own, or those asked for, as far as its rows go."""
    counts = asked or CHUNKS.get(name, (8,))
    return sorted({min(count, rows.shape.chunks) for count in counts})


def collect(reader: Reader, args: argparse.Namespace, name: str) -> None:
    """Reads this shard's part of a set; what is done is written after every arm of a block of documents."""
    rows = Rows.load(args.data, name, tokenizer_fingerprint(reader.tokenizer))
    counts = chunks_of(name, args.chunks, rows)
    most = len(rows.ids) if args.documents is None else min(args.documents, len(rows.ids))
    shard, shards = args.shard
    index = np.arange(most)[shard::shards]
    path = args.save / f"{name}.ours.{shard}of{shards}.safetensors"
    about = {
        "set": name,
        "shard": [shard, shards],
        **provenance(),
    }
    found = measured([path], len(index), index) if path.exists() else {}
    partner = partners([record.name for record in rows.records], [record.cluster for record in rows.records])
    wanted = [(arm, count) for arm in reader.readable(args.arms) for count in counts if exists(arm, count)]
    blocks = [range(first, min(first + args.block, len(index))) for first in range(0, len(index), args.block)]
    with Progress() as progress:
        progress.start(f"{name} {shard}/{shards}", len(wanted) * len(index), "readings", "tokens")
        for block in blocks:  # all arms of a document in one visit
            some = index[block.start : block.stop]
            for arm, count in wanted:
                key = f"n{count}.{arm}"
                if f"{key}.loss" in found and np.isfinite(found[f"{key}.loss"][block.start : block.stop]).all():
                    progress.advance(len(some), 0)
                    continue
                swap = rows.ids[partner[some]] if arm == "shuffled" else None
                said = read(reader, arm, rows.ids[some], rows.shape, count, args.tokens, swap, progress.advance)
                values = {
                    "loss": -said.log_probabilities.mean(1),
                    "right": said.right.sum(1),
                    "lines": right_lines(rows.lines[some], said.right),
                    "slots": said.slots,
                }
                for figure, value in values.items():
                    whole = found.setdefault(f"{key}.{figure}", np.full(len(index), np.nan, np.float32))
                    whole[block.start : block.stop] = value
            save_arrays(path, {**found, "documents": index}, about)
        progress.finish()


def run_collect(args: argparse.Namespace) -> None:
    """The stage on the accelerator."""
    cuda = torch.cuda.is_available()
    if args.threads:
        torch.set_num_threads(args.threads)
    dtype = torch.bfloat16 if cuda or args.bf16 else torch.float32
    host, tokenizer = load_host(args.host, "cuda" if cuda else "cpu", dtype)
    crouter = None
    if args.crouter != "none":
        crouter, _ = load_crouter(args.crouter, "cuda" if cuda else "cpu")
    reader = Reader(host.requires_grad_(False), tokenizer, crouter, args.gate)
    for name in args.sets:
        start = time.monotonic()
        collect(reader, args, name)
        print(f"{name} {args.shard}: {time.monotonic() - start:.0f} s", flush=True)


def run_report(args: argparse.Namespace) -> None:
    """The stage on the CPU."""
    found: dict[str, float] = {}
    collected: list[Path] = []
    for name in args.sets:
        paths = sorted(args.save.glob(f"{name}.*.*of*.safetensors"))
        if not paths:
            print(f"{args.save}: no figures of {name}", flush=True)
            continue
        rows = Rows.load(args.data, name)
        arrays = measured(paths, len(rows.ids))
        collected += paths
        for path in paths:  # of the peers' caches
            sizes = about_of(path).get("bytes_a_token", {})
            found |= {f"bytes_a_token.{cache}": size for cache, size in sizes.items()}
        found |= {f"{name}.{key}": value for key, value in metrics(arrays, rows, args.seed, args.draws).items()}
    if not found:
        raise InputError(f"{args.save}: expected figures of the stage `collect`, got none")
    print(table(found))
    config: dict[str, Any] = {"window": 512, "chunk": 512, "prefix": 4, "scored": 512, "draws": args.draws}
    print(
        write_result(
            args.result or f"hgr-{host_key(args.host)}",
            found,
            seed=args.seed,
            config=config,
            notes=f"{host_note(args.host)} {NOTES}",
            made=made_by(collected),
        )
    )


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    cuda = torch.cuda.device_count() > 0  # does not start the accelerator
    parser.add_argument("stage", choices=["collect", "report"])
    parser.add_argument("--data", required=True, type=Path, help="folder of the sets of eval.documents")
    parser.add_argument("--save", required=True, type=Path, help="folder of the documents' figures")
    parser.add_argument("--host", default="smollm2-135m", help="known name, folder or hub name")
    parser.add_argument("--crouter", help="the shipped one by default; none: arms that need one are left out")
    parser.add_argument("--gate", type=Path, help="folder of a gate that was fitted for this host")
    parser.add_argument("--sets", nargs="+", choices=EVALUATION, default=list(EVALUATION))
    parser.add_argument("--chunks", nargs="+", type=int, help="of the past; 8 by default, of repo 40")
    parser.add_argument("--arms", nargs="+", choices=SCORED, default=list(SCORED))
    parser.add_argument("--documents", type=int, help="of a set, at most: its first ones; all by default")
    parser.add_argument("--shard", type=shard_of, default=(0, 1), help="i/k: this process of k that run at once")
    parser.add_argument("--block", type=int, default=8 if cuda else 2, help="documents on their way at once")
    parser.add_argument("--tokens", type=int, default=65_536 if cuda else 8192, help="forwarded at once, about")
    parser.add_argument("--threads", type=int, default=0, help="of the processor; torch's own number by default")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 on a CPU too")
    parser.add_argument("--draws", type=int, default=2000, help="report: bootstrap samples")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--result", help="hgr-HOST by default")


def run(args: argparse.Namespace) -> None:
    """Collects or reports."""
    (run_collect if args.stage == "collect" else run_report)(args)
