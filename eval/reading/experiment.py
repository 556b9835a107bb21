"""What a host reads of a compressed past: facts, next lines, names, which copies are lost, manners."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from eval.arms import GENERATING, Reader
from eval.reading import identifiers, lost_copies, manners, next_lines, passkeys
from eval.reading.bench import Bench, Scores
from eval.results import FOLDER, commit, write_result
from eval.rows import Rows, Shape
from hf_crouter.chunking import tokenizer_fingerprint
from hf_crouter.crouter.loading import load_crouter
from hf_crouter.hosts.loading import load_host

PARTS = (
    "passkey",
    "kv",
    "passkey_paraphrased",
    "kv_paraphrased",
    "nextline",
    "identifiers",
    "residual",
    "manners",
    "drafts",
)
FACTS = ("full", "window", "soft", "copy", "soft_retrieve2_copy", "copy_rebuilt")
NOTES = (
    "Host: SmolLM2-135M-Instruct, 4-bit weights in config.dtype; greedy. passkey, kv: prompts 64 tokens shorter "
    "than their names say, all records of one statement's wording, near misses among them, in the compressed "
    "part; question and statement end alike before the value (the host fails on paraphrases even with 2k tokens "
    "all raw: _paraphrased); that form suits copying. full ends at the host's positions. identifiers: names that "
    "last stood in compressed chunks. nextline: next line that is not empty and has a letter. residual: AUROC of "
    "a chunk's residual for target tokens that copying brings from it by the true ids and no longer by what is "
    "rebuilt. drafts: tokens a step with prompt_lookup_num_tokens; same: share of prompts whose tokens are those "
    "without drafts; speedup: seconds without drafts over those with them. Intervals: bootstrap, clustered by "
    "package or record; of retrieval by sample."
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--host", default="smollm2-135m")
    parser.add_argument("--crouter", help="the shipped one by default; none: parts and arms without one")
    parser.add_argument("--data", type=Path, required=True, help="folder of eval.documents: young and prose")
    parser.add_argument("--save", type=Path, help="folder for single samples, JSON lines")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 32768, 131072])
    parser.add_argument("--arms", nargs="+", choices=GENERATING, help="instead of each part's own")
    parser.add_argument("--samples", type=int, default=50, help="of a cell of retrieval")
    parser.add_argument("--documents", type=int, default=375, help="of nextline")
    parser.add_argument("--each", type=int, default=2, help="lines a document of nextline")
    parser.add_argument("--scored", type=int, default=96, help="documents of a set, of identifiers and residual")
    parser.add_argument("--free", type=int, default=32, help="documents of temperatures and loops")
    parser.add_argument("--tokens", type=int, default=256, help="freely generated ones of loops")
    parser.add_argument("--rebuilt-length", type=int, default=32768, help="longest prompts of copy_rebuilt")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--batch", type=int, help="rows at once: 64 on an accelerator, else 2")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--result", default="reading")


def run(args: argparse.Namespace) -> None:
    """Runs the parts one after the other; each is written as soon as it is measured."""
    if args.threads:
        torch.set_num_threads(args.threads)
    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    host, tokenizer = load_host(args.host, device, dtype)
    crouter = None if args.crouter == "none" else load_crouter(args.crouter, device, dtype)[0]
    sets = {name: Rows.load(args.data, name, tokenizer_fingerprint(tokenizer)) for name in ("young", "prose")}
    batch = args.batch or (64 if cuda else 2)
    bench = Bench(Reader(host, tokenizer, crouter, window=args.window), sets, batch, args.save, args.seed)
    for name, part in parts(bench, args).items():
        start = time.monotonic()
        metrics = part()
        metrics[f"{name}.seconds"] = time.monotonic() - start
        path = write_part(args, name, metrics)
        print(f"{name}: {metrics[f'{name}.seconds']:.0f} s, {path}", file=sys.stderr, flush=True)


def parts(bench: Bench, args: argparse.Namespace, shape: Shape | None = None
          ) -> dict[str, Callable[[], dict[str, float]]]:  # fmt: skip
    """What to run, by name, in the order of `PARTS`; scores are shared between parts."""
    shape = shape or Shape(window=bench.window)
    scores = Scores(bench, shape, args.scored)
    longest = {"copy_rebuilt": args.rebuilt_length}

    def arms(*names: str) -> list[str]:
        return args.arms or list(names)

    def retrieval(task: str) -> Callable[[], dict[str, float]]:
        # paraphrases: one length that every arm can read
        lengths = [n for n in args.lengths if n <= bench.positions][-1:] if "_" in task else args.lengths
        return lambda: passkeys.retrieval(bench, task, lengths, arms(*FACTS), args.samples, longest)

    def all_manners() -> dict[str, float]:
        found = manners.temperatures(bench, shape, arms("window", "copy"), args.free)
        return found | manners.loops(bench, shape, arms("window", "copy", "copy_generated"), args.free, args.tokens)

    known: dict[str, Callable[[], dict[str, float]]] = {name: retrieval(name) for name in PARTS[:4]}
    known["nextline"] = lambda: next_lines.next_lines(
        bench, shape, arms("full", "window", "copy", "copy_half", "soft_retrieve2_copy"), args.documents, args.each
    )
    known["identifiers"] = lambda: identifiers.identifiers(
        scores, arms("full", "window", "soft", "copy", "soft_retrieve2_copy")
    )
    known["residual"] = lambda: lost_copies.lost_copies(scores, list(bench.sets))
    known["manners"] = all_manners
    known["drafts"] = lambda: manners.drafts(
        bench, shape, arms("window", "copy", "soft_retrieve2_copy"), args.free, args.tokens
    )
    return {name: known[name] for name in PARTS if name in args.parts}


def write_part(args: argparse.Namespace, name: str, metrics: dict[str, float]) -> Path:
    """Adds a part's figures to the result, keeping those of the same commit's other parts."""
    path = Path(os.environ.get("CROUTER_RESULTS", FOLDER)) / f"{args.result}.json"
    old: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    same = old.get("commit") == commit()
    about = dict(old["config"].get("parts", {})) if same else {}
    kept = {key: value for key, value in old["metrics"].items() if not _belongs(key, name)} if same else {}
    keys = ("lengths", "arms", "samples", "documents", "each", "scored", "free", "tokens", "window", "seed", "batch")
    about[name] = {key: getattr(args, key) for key in keys}
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    config = {"host": args.host, "dtype": dtype, "crouter": args.crouter or "crouter-code-mini", "parts": about}
    return write_result(args.result, {**kept, **metrics}, seed=args.seed, config=config, notes=NOTES)


def _belongs(key: str, part: str) -> bool:
    return key.split(".")[0] == part
