"""What the index that copying draws on costs: a query, a chunk appended, and bytes a token, on real code.

Every query holds the last 64 tokens of a walk through code that is not in the archive, as a generation asks.
"""

from __future__ import annotations

import argparse
import pickle
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from eval.results import write_result
from hf_crouter.crouter.loading import shipped_crouter
from hf_crouter.ngram.archive import LONGEST, ORDERS, Archive

HELD_OUT = "argparse.py"
NOTES = (
    "Source of the standard library, then of site-packages, in the shipped crouter's tokens; the walk goes through "
    "a file of the standard library that is left out. query: microseconds of one match of all orders, the first one "
    "of every large set of occurrences included; each query is the fastest of its turns, as the machine was shared. "
    "Half of what an archive may leave unsorted is unsorted. append: microseconds of one chunk, from one sorting to "
    "the next, both included. build: everything sorted at once."
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("--lengths", nargs="+", type=int, default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--queries", type=int, default=8000)
    parser.add_argument("--turns", type=int, default=5, help="walks; the fastest counts, query by query")
    parser.add_argument("--chunk", type=int, default=512, help="tokens appended at once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--result", default="suffix-index")


def source_files() -> Iterator[Path]:
    """Python files of the standard library, then of site-packages, by name; the held-out file is left out."""
    library, packages = Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("purelib"))
    for path in sorted(library.rglob("*.py")):
        if "site-packages" not in path.parts and path.name != HELD_OUT:
            yield path
    yield from sorted(packages.rglob("*.py"))


def tokens(tokenizer: Tokenizer, count: int) -> np.ndarray:
    """The first `count` ids of the source files, int64; repeated if there are fewer."""
    parts, found = [], 0
    for path in source_files():
        try:
            parts.append(np.array(tokenizer.encode(path.read_text(encoding="utf-8")).ids, np.int64))
        except UnicodeDecodeError:
            continue
        found += len(parts[-1])
        if found >= count:
            break
    return np.resize(np.concatenate(parts), count)


def timed_queries(archive: Archive, text: np.ndarray, queries: int) -> np.ndarray:
    """Microseconds of each query of a walk through `text`."""
    times = []
    for end in range(LONGEST, min(LONGEST + queries, len(text))):
        suffix = text[end - LONGEST : end]
        start = time.perf_counter()
        archive.match(suffix)
        times.append(time.perf_counter() - start)
    return np.array(times) * 1e6


def timed_appends(archive: Archive, text: np.ndarray, chunk: int) -> tuple[float, float]:
    """Mean and longest microseconds of a chunk appended, until the archive has sorted itself anew once."""
    times, old = [], archive.index_bytes
    for start in range(0, len(text) - chunk, chunk):
        begin = time.perf_counter()
        archive = archive.extended(text[start : start + chunk])
        times.append(time.perf_counter() - begin)
        if archive.index_bytes != old:
            break
    return float(np.mean(times) * 1e6), max(times) * 1e6


def run(args: argparse.Namespace) -> None:
    """Measures every length, prints a line each and writes the result."""
    tokenizer = Tokenizer.from_file(str(shipped_crouter() / "tokenizer.json"))
    text = tokens(tokenizer, max(args.lengths) * 33 // 32 + 20_000)
    walk = (Path(sysconfig.get_path("stdlib")) / HELD_OUT).read_text(encoding="utf-8")
    walk = np.array(tokenizer.encode(walk).ids, np.int64)
    empty = Archive.empty(tokenizer.get_vocab_size())
    timed_queries(empty.extended(text[:10_000]), walk, 200)  # warms up
    metrics: dict[str, float] = {}
    for length in args.lengths:
        begin = time.perf_counter()
        built = empty.extended(text[:length])
        build = time.perf_counter() - begin
        unsorted = max(empty.tail_limit, length // 64) // 2
        archive = empty.extended(text[: length - unsorted]).extended(text[length - unsorted : length])
        forgetful = pickle.dumps(archive)  # a copy remembers no earlier query
        turns = [timed_queries(pickle.loads(forgetful), walk, args.queries) for _ in range(args.turns)]
        timed_queries(archive, walk, args.queries)  # so that what it remembers counts in its bytes
        queries = np.min(turns, axis=0)
        append, longest = timed_appends(built, text[length:], args.chunk)
        key = "1m" if length == 1_000_000 else f"{length // 1000}k"
        figures = {
            "query.us": queries.mean(), "query.p99.us": np.percentile(queries, 99), "append.us": append,
            "append.longest.us": longest, "ids.bytes_per_token": built.bytes_per_token,
            "index.bytes_per_token": archive.index_bytes / length, "build.seconds": build,
        }  # fmt: skip
        print(key, {name: round(float(value), 3) for name, value in figures.items()}, flush=True)
        metrics |= {f"{key}.{name}": float(value) for name, value in figures.items()}
    config = {
        "lengths": args.lengths, "queries": min(args.queries, len(walk) - LONGEST), "turns": args.turns,
        "chunk": args.chunk, "orders": list(ORDERS), "longest": LONGEST,
    }  # fmt: skip
    print(write_result(args.result, metrics, seed=args.seed, config=config, notes=NOTES))
