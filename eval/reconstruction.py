"""Token reconstruction accuracy (TRA) of a crouter on held-out code, prose and random ids."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from eval.results import write_result
from hf_crouter.crouter.loading import load_crouter
from hf_crouter.data.tokens import TokenArray
from hf_crouter.training.evaluate import reconstruction_score

PARTS = {"code.files": "files", "code.packages": "packages", "code.stdlib": "stdlib"}


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("--crouter", required=True, help="folder of the crouter")
    parser.add_argument("--data", required=True, help="folder of the prepared corpus with the crouter's split")
    parser.add_argument("--text", nargs="*", default=[], metavar="NAME=FILE", help="text files, such as wikitext2=F")
    parser.add_argument("--chunks", type=int, default=2048, help="chunks a set, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--result", default="tra-mini", help="name of the result file")


def pick(ids: np.ndarray, mask: np.ndarray, limit: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """At most `limit` chunks, chosen at random, in order; `[N, T]` each, int64."""
    if len(ids) > limit:
        chosen = np.sort(np.random.default_rng(seed).permutation(len(ids))[:limit])
        ids, mask = ids[chosen], mask[chosen]
    return torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(mask.astype(np.int64))


def text_chunks(path: str, tokenizer, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Full chunks `[N, length]` of a text file, and their mask of ones."""
    ids = np.array(tokenizer(Path(path).read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"])
    ids = ids[: len(ids) // length * length].reshape(-1, length)
    return ids, np.ones_like(ids)


def run(args: argparse.Namespace) -> None:
    """Measures every set, prints a line each and writes the result."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    crouter, tokenizer = load_crouter(args.crouter, device)
    length, data = crouter.config.chunk_length, Path(args.data)
    metrics: dict[str, float] = {"params": crouter.num_parameters()}
    sets = {}
    for key, part in PARTS.items():
        sets[key] = pick(*TokenArray.load(data / f"{part}.safetensors").chunks(length), args.chunks, args.seed)
    for item in args.text:
        name, _, path = item.partition("=")
        sets[name] = pick(*text_chunks(path, tokenizer, length), args.chunks, args.seed)
    random = np.random.default_rng(args.seed).integers(0, len(tokenizer), (min(args.chunks, 512), length))
    sets["random"] = pick(random, np.ones_like(random), args.chunks, args.seed)
    for key, (ids, mask) in sets.items():
        if not len(ids):
            print(f"{key:16s} no chunk: left out", flush=True)
            continue
        score = reconstruction_score(crouter, ids, mask, bf16=device == "cuda")
        full = mask.sum(-1) == length
        tra, nll = score.accuracy, score.reconstruction_nll
        metrics |= {f"{key}.tra": tra, f"{key}.nll": nll, f"{key}.chunks": score.chunks}
        if key.startswith("code.") and bool(full.any()):
            cut = ids[full][:, : length - 12]
            short = reconstruction_score(crouter, cut, bf16=device == "cuda")
            metrics |= {
                f"{key}.full.tra": float(score.chunk_accuracy[full].mean()),
                f"{key}.ragged500.tra": short.accuracy,
            }
        print(f"{key:16s} TRA {tra:7.2%}  {nll:.3f} nats/token  {score.chunks} chunks", flush=True)
    record = Path(crouter.name_or_path, "training.json")
    if record.exists():
        runs = json.loads(record.read_text())
        metrics |= {"train.seconds": sum(r["seconds"] for r in runs), "train.tokens": sum(r["tokens"] for r in runs)}
        metrics |= {"train.mfu": runs[-1]["mfu"]} if "mfu" in runs[-1] else {}
    path = write_result(args.result, metrics, seed=args.seed, config={"chunks": args.chunks, "chunk_length": length},
                        notes="TRA: exact token at exact position; ragged tails of documents count.")  # fmt: skip
    print(path)
