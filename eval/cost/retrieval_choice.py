"""What choosing the chunks to retrieve costs: a choice, a chunk added to the index, and bytes a chunk, on real code.

Every choice asks with the last tokens of a walk through code that is not among the chunks, as a generation asks.
"""

from __future__ import annotations

import argparse
import sysconfig
import time
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from eval.cost.suffix_index import HELD_OUT
from eval.results import write_result
from hf_crouter.crouter.loading import shipped_crouter
from hf_crouter.modes.retrieve import ScoredRetriever
from hf_crouter.ngram.postings import ChunkIndex
from hf_crouter.ngram.scorers import QUERY, Bm25Scorer, OverlapScorer, Scorer

NOTES = (
    "Source of the standard library in the shipped crouter's tokens, in chunks; where it is too short it is repeated "
    "with other chunk borders. The walk goes through a file that is left out. choose: milliseconds of one choice of 2 "
    "chunks as by default, all included (bm25: by BM25 over the last 128 tokens); "
    "each choice is the fastest of its turns, as the machine was shared. append: microseconds of one "
    "chunk added to the index, merges of blocks included, mean over the last 2,048. build: all chunks at once."
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("--chunks", nargs="+", type=int, default=[100, 2000, 20_000])
    parser.add_argument("--length", type=int, default=512, help="tokens of a chunk")
    parser.add_argument("--choices", type=int, default=100)
    parser.add_argument("--turns", type=int, default=3, help="walks; the fastest counts, choice by choice")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--result", default="retrieval-choice")


def library_tokens(tokenizer: Tokenizer) -> np.ndarray:
    """Ids of the standard library's files by name, int64; the held-out file and what is not UTF-8 are left out."""
    library, parts = Path(sysconfig.get_path("stdlib")), []
    for path in sorted(library.rglob("*.py")):
        if "site-packages" in path.parts or path.name == HELD_OUT:
            continue
        try:
            parts.append(np.array(tokenizer.encode(path.read_text(encoding="utf-8")).ids, np.int64))
        except UnicodeDecodeError:
            continue
    return np.concatenate(parts)


def cut(text: np.ndarray, count: int, length: int) -> list[np.ndarray]:
    """The first `count` chunks of a text; each repetition of the text starts a prime number of tokens later."""
    chunks, offset = [], 0
    while len(chunks) < count:
        chunks += [text[start : start + length] for start in range(offset, len(text) - length + 1, length)]
        offset = (offset + 37) % length
    return chunks[:count]


def timed_choices(scorer: Scorer, index: ChunkIndex, walk: np.ndarray, choices: int, turns: int) -> np.ndarray:
    """Milliseconds of each choice of two chunks along a walk."""
    retrieve = ScoredRetriever(2, 128, scorer)
    ends = np.linspace(QUERY, len(walk), choices).astype(int)
    times = np.empty((turns, choices))
    for turn in range(turns):
        for n, end in enumerate(ends):
            recent = walk[end - QUERY : end]
            start = time.perf_counter()
            retrieve(index, (), recent)
            times[turn, n] = time.perf_counter() - start
    return times.min(0) * 1e3


def timed_appends(index: ChunkIndex, chunks: list[np.ndarray]) -> np.ndarray:
    """Microseconds of each chunk that is added to an index."""
    times = []
    for chunk in chunks:
        start = time.perf_counter()
        index = index.extended(chunk)
        times.append(time.perf_counter() - start)
    return np.array(times) * 1e6


def run(args: argparse.Namespace) -> None:
    """Measures every number of chunks, prints a line each and writes the result."""
    tokenizer = Tokenizer.from_file(str(shipped_crouter() / "tokenizer.json"))
    text = library_tokens(tokenizer)
    walk = (Path(sysconfig.get_path("stdlib")) / HELD_OUT).read_text(encoding="utf-8")
    walk = np.array(tokenizer.encode(walk).ids, np.int64)
    scorers = {"choose": OverlapScorer(), "bm25": Bm25Scorer()}
    metrics: dict[str, float] = {"text.tokens": len(text)}
    timed_choices(OverlapScorer(), ChunkIndex().extended(*cut(text, 64, args.length)), walk, 20, 1)  # warms up
    for count in args.chunks:
        chunks = cut(text, count, args.length)
        begin = time.perf_counter()
        index = ChunkIndex().extended(*chunks)
        figures: dict[str, float] = {"build.seconds": time.perf_counter() - begin}
        for name, scorer in scorers.items():
            times = timed_choices(scorer, index, walk, args.choices, args.turns)
            figures |= {f"{name}.ms": times.mean(), f"{name}.p99.ms": np.percentile(times, 99)}
        last = min(count, 2048)
        appends = timed_appends(ChunkIndex().extended(*chunks[:-last]), chunks[-last:])
        figures |= {"append.us": appends.mean(), "append.longest.us": appends.max()}
        figures["bytes_per_chunk"] = index.nbytes / count
        key = f"{count // 1000}k" if count % 1000 == 0 else str(count)
        print(key, {name: round(float(value), 3) for name, value in figures.items()}, flush=True)
        metrics |= {f"{key}.{name}": float(value) for name, value in figures.items()}
    config = {"chunks": args.chunks, "length": args.length, "choices": args.choices, "turns": args.turns, "chosen": 2}
    print(write_result(args.result, metrics, seed=args.seed, config=config, notes=NOTES))
