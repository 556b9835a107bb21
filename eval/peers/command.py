"""The command: what other ways to shorten a KV cache lose on documents, and what they answer.

    python -m eval.peers --data SETS --host FOLDER --save S [--questions FOLDER] [--shard i/k]

A host reads `[prefix | the last n chunks | window]` in one piece. An arm `.at<t>` keeps `prefix + n · t + window`
positions of every layer and KV head, on average; the window's last token is read once more behind them, and then the
target at its true positions, so that all its tokens are foretold from what the arm keeps. A question is read the same
way, all of its prompt seen by the press, and then answered greedily.

Not covered: presses that need training or downloads, StreamingLLM with positions closed up (kvpress:
KeyRerotationPress), KVzip and its kin for hosts with sliding windows, which kvpress does not have.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from eval.peers import arms as arms_
from eval.peers.attention import NAME, install
from eval.peers.host import Host
from eval.peers.measure import AnswerResults, DocumentResults, check_ids, measure_documents, measure_questions
from eval.peers.presses import Words, press_class
from eval.peers.quantised import bytes_a_token
from eval.peers.rows import BadInput, chosen, read_questions, read_set, sets_in

PACKAGES = ("kvpress", "transformers", "torch", "hqq")


def shard_of(text: str) -> tuple[int, int]:
    """`i/k` of the command line: this process, and how many run at once."""
    index, _, count = text.partition("/")
    shard, shards = int(index), int(count or 1)
    if not 0 <= shard < shards:
        raise argparse.ArgumentTypeError(f"expected i/k with i from 0 to k - 1, got {text}")
    return shard, shards


def load_host(folder: Path, dtype: str, words: bool, tokens: int) -> Host:
    """A host from its folder.

    Args:
        folder: of the model.
        dtype: of its weights.
        words: whether its tokenizer is needed.
        tokens: that are read at once.

    Raises:
        BadInput: there is none, or none that can be read here.
    """
    if not (folder / "config.json").is_file():
        raise BadInput(f"{folder}: expected the folder of a model, found no config.json")
    disable_progress_bar()
    attention, device = install(), "cuda" if torch.cuda.is_available() else "cpu"
    load = partial(AutoModelForCausalLM.from_pretrained, dtype=getattr(torch, dtype), attn_implementation=NAME)
    try:
        model: Any = load(folder)
    except (OSError, ValueError) as error:
        raise BadInput(f"{folder}: expected a model that transformers reads: {str(error).splitlines()[0]}") from None
    return Host(model.to(device).eval(), attention, Words.load(folder) if words else None, tokens)


def about_host(host: Host, folder: Path) -> dict[str, Any]:
    """What results are of, beside the documents."""
    sizes = {"full": bytes_a_token(host.model, None)}
    if importlib.util.find_spec("hqq") is not None:
        sizes |= {f"full_quantised{bits}": bytes_a_token(host.model, bits) for bits in (4, 2)}
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    keys = ("architectures", "hidden_size", "num_hidden_layers", "vocab_size")
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            continue
    for name, size in sizes.items():
        print(f"{name}: {size:,.0f} bytes of cache a token", flush=True)
    return {
        "host": folder.resolve().name,
        "config": {key: config.get(key) for key in keys},
        "dtype": str(host.model.dtype).removeprefix("torch."),
        "bytes_a_token": sizes,
        "versions": versions,
    }


def counts_of(counts: list[int] | None, chunks: int, name: str) -> list[int]:
    """Counts of chunks to read of a set; all that it has where nothing is said.

    Raises:
        BadInput: it has fewer than any of them.
    """
    fitting = [count for count in counts or [chunks] if 0 < count <= chunks]
    if not fitting:
        raise BadInput(f"--chunks: expected a count from 1 to {chunks}, what {name} has, got {counts}")
    return fitting


def run(args: argparse.Namespace) -> None:
    """Measures all that was asked for.

    Raises:
        BadInput: something to read is missing or does not fit.
    """
    if args.data is None and args.questions is None:
        raise BadInput("--data, --questions: expected at least one of them, got none")
    stages = arms_.stages(args.arms)
    for arm in (arm for stage in stages for arm in stage):
        if arm.how.press:
            press_class(arm)  # say at once that it is missing
    names = [] if args.data is None else args.sets or sets_in(args.data)
    sets = {name: read_set(args.data, name) for name in names}
    counts = {name: counts_of(args.chunks, rows.layout.chunks, name) for name, rows in sets.items()}
    # <set>.<length>.json: answers may lie beside them
    asked = sorted(args.questions.glob("*.json")) if args.questions else []
    asked = [path for path in asked if path.name.count(".") == 2]
    if args.sets:
        asked = [path for path in asked if path.name.partition(".")[0] in args.sets]
    questions = {path.stem: read_questions(path) for path in asked}
    if not sets and not questions:
        raise BadInput(f"{args.data or args.questions}: expected documents or questions, found none")
    host = load_host(args.host, args.dtype, any(a.how.kind == "repeat" for s in stages for a in s), args.tokens)
    for name, rows in sets.items():
        check_ids(host, name, int(rows.ids.max(initial=0)))
    for name, file in questions.items():
        check_ids(host, name, max((max(q.ids) for q in file.questions), default=0))
    for arm in (arm for stage in stages for arm in stage if not host.can(arm)):
        print(f"{arm.name}: kvpress has it for no host with sliding windows, left out", flush=True)
    stages = [[arm for arm in stage if host.can(arm)] for stage in stages]
    about, ending = about_host(host, args.host), "peers.{}of{}".format(*args.shard)
    documents = {
        name: (chosen(len(rows.names), args.documents, args.shard),
               DocumentResults(args.save / f"{name}.{ending}.safetensors", about | {"layout": vars(rows.layout),
                                                                                    "of": len(rows.names)}))
        for name, rows in sets.items()
    }  # fmt: skip
    answers = {
        name: (chosen(len(file.questions), args.documents, args.shard),
               AnswerResults(args.save / f"questions.{name}.{ending}.json", about | {"of": len(file.questions)}))
        for name, file in questions.items()
    }  # fmt: skip
    for stage in stages:
        for name, (index, results) in documents.items() if stage else ():
            measure_documents(host, name, sets[name], index, counts[name], stage, results, args.block)
        for name, (index, replies) in answers.items() if stage else ():
            measure_questions(host, name, questions[name], index, stage, replies, args.block)
    if torch.cuda.is_available():
        print(f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB at most", flush=True)


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    cuda = torch.cuda.is_available()
    out = argparse.ArgumentParser(prog="python -m eval.peers", description=(__doc__ or "").splitlines()[0])
    out.add_argument("--data", type=Path, help="folder of sets of documents")
    out.add_argument("--questions", type=Path, help="folder of files <set>.<length>.json")
    out.add_argument("--host", required=True, type=Path, help="folder of the model")
    out.add_argument("--save", required=True, type=Path, help="folder of the results")
    out.add_argument("--sets", nargs="+", help="all that are there by default")
    out.add_argument("--chunks", nargs="+", type=int, help="counts; as many as a set has by default")
    out.add_argument("--arms", nargs="+", default=list(arms_.DEFAULT), help=f"of {' '.join(arms_.ARMS)}")
    out.add_argument("--documents", type=int, help="of a set, or questions of a file, at most; all by default")
    out.add_argument("--shard", type=shard_of, default=(0, 1), help="i/k: this process of k that run at once")
    out.add_argument("--block", type=int, default=16 if cuda else 2, help="documents between two writes")
    out.add_argument("--tokens", type=int, default=32_768 if cuda else 8192, help="read at once")
    out.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16" if cuda else "float32")
    return out


def main(argv: list[str] | None = None) -> int:
    """Runs the measurement; exit status 2 on bad input."""
    try:
        run(parser().parse_args(argv))
    except BadInput as error:
        print(f"eval.peers: error: {error}", file=sys.stderr)
        return 2
    return 0
