"""Whether retrieval finds what a question asks for: the chunk with the answer among two that stand raw again.

A prompt is `[passages | other passages, in the raw window | question]`, cut into chunks as `CompressedHistory` cuts;
choosing needs no host. `nq`: Natural Questions, each with one passage that answers it; questions of real users, with
words of their own. `xquad`: the English paragraphs of XQuAD, on every other of which (and on texts of the gate sets)
decay and recency of the default scorer were chosen; here are the others.

Not covered: questions whose answer takes several passages.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from eval.results import write_result
from eval.rows import Shape
from eval.statistics import clustered_interval
from hf_crouter.crouter.loading import shipped_crouter
from hf_crouter.data.tokens import plain_tokenizer
from hf_crouter.errors import InputError
from hf_crouter.ngram.postings import ChunkIndex
from hf_crouter.ngram.scorers import (
    DECAY,
    QUERY,
    RECENCY,
    Bm25Scorer,
    OverlapScorer,
    RandomScorer,
    RecencyScorer,
    Scorer,
    top_k,
)

SCORERS: dict[str, Callable[[int], Scorer]] = {  # given a seed
    "overlap": lambda seed: OverlapScorer(),
    "bm25": lambda seed: Bm25Scorer(),
    "bm25_32": lambda seed: Bm25Scorer(32),
    "last": lambda seed: RecencyScorer(),
    "random": lambda seed: RandomScorer(seed),
}
ASKED = "\n\nQuestion: {question}?\nAnswer:"
NOTES = (
    "Share of questions whose answer's chunk (the one in which the answer stands in the passage that holds it) is "
    "among the chosen ones; <set>.<chunks>.<scorer>.k<chosen>.found. overlap is the default; bm25: over the last 128 "
    "tokens, bm25_32 over 32. Before the question stand 400 to 500 tokens of other passages. Intervals: bootstrap, "
    "clustered by passage. XQuAD's paragraphs are the odd ones; the even ones served to choose two constants."
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("--data", type=Path, required=True, help="folder with eval_nq_oracle and eval_xquad")
    parser.add_argument("--chunks", nargs="+", type=int, default=[8, 64, 256], help="compressed chunks of a prompt")
    parser.add_argument("--questions", type=int, default=600, help="of a set and length, at most")
    parser.add_argument("--chosen", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--result", default="retrieval-questions")


Asked = tuple[str, int, list[str]]  # a question, where its answer begins in the text, in characters; its answers


def passages(data: Path, name: str) -> list[tuple[str, list[Asked]]]:
    """Texts with their questions.

    Raises:
        InputError: no such data.
    """
    path = data / f"eval_{name}" / {"nq_oracle": "nq_open_oracle.jsonl.gz", "xquad": "xquad.jsonl.gz"}[name]
    if not path.is_file():
        raise InputError(f"no such file: {path}")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows: list[dict[str, Any]] = [json.loads(line) for line in file]
    if name == "xquad":
        rows = [row for row in rows if row["lang"] == "en"]
        return [(row["context"], [(qa["question"].rstrip("?"), qa["starts"][0], qa["answers"]) for qa in row["qas"]])
                for row in rows]  # fmt: skip
    found: dict[str, list[Asked]] = {}
    for row in rows:
        text = row["ctxs"][0]["text"]
        answer = next((answer for answer in row["answers"] if answer in text), None)
        if answer is not None:
            found.setdefault(text, []).append((row["question"].rstrip("?"), text.index(answer), row["answers"]))
    return list(found.items())


def prompts(
    texts: list[tuple[str, list[Asked]]], tokenizer: Tokenizer, chunks: int, first: int, step: int, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray, int, int]]:
    """Compressed chunks `[N, chunk]`, last tokens, the answer's chunk and the passage's number, question by question.

    Args:
        texts: passages with their questions.
        tokenizer: of the host.
        chunks: of a prompt.
        first: of every `step` passages this one is asked about.
        step: see `first`.
        seed: of the order.
    """
    random = np.random.default_rng([seed, chunks])

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    ids = [encode(f"\n\n{text}") for text, _ in texts]
    order = random.permutation(len(texts)).tolist()
    done = 0
    while done < len(order):  # one prompt after another, of as many passages as fit
        row: list[int] = []
        begin: dict[int, int] = {}
        while done < len(order) and len(row) < chunks * Shape.chunk:
            begin[order[done]] = len(row)
            row += ids[order[done]]
            done += 1
        if len(row) < chunks * Shape.chunk:
            return
        past = np.array(row[: chunks * Shape.chunk], np.int64).reshape(chunks, Shape.chunk)
        others = [number for number in order if number not in begin]
        if not others:
            return  # nothing to stand between past and question
        for number, start in begin.items():
            if number % step != first:
                continue
            text, questions = texts[number]
            for question, place, _ in questions:
                where = (start + len(encode(f"\n\n{text[:place].rstrip()}"))) // Shape.chunk
                if where < chunks:
                    ahead = [i for n in random.choice(others, 6) for i in ids[n]][-random.integers(400, 500) :]
                    recent = np.array(ahead + encode(ASKED.format(question=question)), np.int64)[-QUERY:]
                    yield past, recent, where, number


def run(args: argparse.Namespace) -> None:
    """Measures every set, length and scorer, prints a line each and writes the result."""
    tokenizer = plain_tokenizer(Tokenizer.from_file(str(shipped_crouter() / "tokenizer.json")))
    scorers = {name: make(args.seed) for name, make in SCORERS.items()}
    metrics: dict[str, float] = {}
    for name, short, first, step in (("nq_oracle", "nq", 0, 1), ("xquad", "xquad", 1, 2)):
        texts = passages(args.data, name)
        for chunks in args.chunks:
            hits: dict[str, list[int]] = {}
            groups: list[str] = []
            index, of = ChunkIndex(), None
            for past, recent, where, number in prompts(texts, tokenizer, chunks, first, step, args.seed):
                if past is not of:
                    index, of = ChunkIndex().extended(*past), past
                for scorer, found in scorers.items():
                    scores = found.scores(index, recent)
                    for k in args.chosen:
                        hits.setdefault(f"{scorer}.k{k}", []).append(int(where in top_k(scores, k)))
                groups.append(str(number))
                if len(groups) == args.questions:
                    break
            for key, values in hits.items():
                right = np.array(values, float)
                share = clustered_interval(lambda rows, right=right: float(right[rows].mean()), groups, seed=args.seed)
                at = f"{short}.{chunks}.{key}.found"
                metrics |= {at: share[0], f"{at}.lo": share[1], f"{at}.hi": share[2]}
                print(f"{at} {share[0]:.3f} [{share[1]:.3f}, {share[2]:.3f}]", flush=True)
            if groups:
                metrics[f"{short}.{chunks}.questions"] = len(groups)
    config = {
        "chunks": args.chunks,
        "questions": args.questions,
        "chosen": args.chosen,
        "decay": DECAY,
        "recency": RECENCY,
    }
    print(write_result(args.result, metrics, seed=args.seed, config=config, notes=NOTES))
