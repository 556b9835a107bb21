"""Tables of questions over long texts."""

from __future__ import annotations

from eval.tables.cells import Metrics, number, share, table, with_error

RULER_TASKS = {
    "niah_single_1": "one needle in repeated noise",
    "niah_multikey_2": "one needle among needles",
    "niah_multikey_3": "the same with UUIDs",
    "ruler_vt": "variables traced",
    "ruler_cwe": "most common words",
    "ruler_fwe": "most frequent coded words",
}
RULER_ARMS = {"full": "full", "window": "window", "soft_copy": "ours", "soft_retrieve2_copy": "ours + retrieval of 2"}
RULER_LENGTHS = {"4096": "4k", "8192": "8k"}
QUESTION_SETS = {"nq": "Natural Questions", "xquad": "XQuAD"}
QUESTION_CELLS = (("nq", 8), ("nq", 64), ("nq", 256), ("xquad", 8), ("xquad", 64))
QUESTION_SCORERS = {
    "overlap": "words and phrases, later ones first, and recency (the default)",
    "bm25": "BM25 of the last 128 tokens",
    "bm25_32": "BM25 of the last 32 tokens",
    "learned": "a network fitted on what retrieval gains in likelihood",
    "last": "the last two",
    "random": "chance",
}


def retrieval_table(metrics: Metrics) -> list[str]:
    """How often retrieval finds the chunk that answers a question."""
    rows = [
        [label, *(share(metrics, f"{name}.{chunks}.{scorer}.k2.found") for name, chunks in QUESTION_CELLS)]
        for scorer, label in QUESTION_SCORERS.items()
    ]
    head = ["chosen by", *(f"{QUESTION_SETS[name]}, {chunks} chunks" for name, chunks in QUESTION_CELLS)]
    lines = table(head, rows if metrics else [])
    if metrics:
        counts = ", ".join(number(metrics.get(f"{name}.{chunks}.questions")) for name, chunks in QUESTION_CELLS)
        lines += ["", f"Answer's chunk among the two retrieved, in %, with 95% intervals. Questions: {counts}."]
    return lines


def ruler_table(metrics: Metrics) -> list[str]:
    """RULER's accuracy by task, and the KV slots behind it."""
    there = {key.rpartition(".")[2] for key in metrics}
    arms = {arm: label for arm, label in RULER_ARMS.items() if arm in there or not metrics}
    columns = [f"{length}.{arm}" for length in RULER_LENGTHS for arm in arms]
    rows = [
        [f"`{task}`: {label}", *(with_error(metrics, f"{task}.{column}") for column in columns)]
        for task, label in RULER_TASKS.items()
    ]
    rows.append(["KV slots", *(number(metrics.get(f"slots.{column}")) for column in columns)])
    head = ["task", *(f"{size}: {label}" for size in RULER_LENGTHS.values() for label in arms.values())]
    lines = table(head, rows if metrics else [])
    return [*lines, "", "Accuracy in % ± its standard error over documents."] if metrics else lines
