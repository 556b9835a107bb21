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
RULER_ARMS = {"full": "full", "compact32_retrieve2": "`Compact(32), Retrieve(2)`",
              "compact64_retrieve2": "`Compact(64), Retrieve(2)`", "compact128": "`Compact(128)`",
              "retrieve2": "`Retrieve(2)`", "retrieve4": "`Retrieve(4)`", "window": "window",
              "soft_copy": "soft prompts + copying", "soft_retrieve2_copy": "all three ways"}  # fmt: skip
RULER_LENGTHS = ("4k", "8k", "16k")
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
ANSWERING = {
    "full": "full history",
    "window": "raw window",
    "copy": "`Copy()`",
    "retrieve2": "`Retrieve(2)`",
    "retrieve4": "`Retrieve(4)`",
    "retrieve8": "`Retrieve(8)`",
    "compact32": "`Compact(32)`",
    "compact64": "`Compact(64)`",
    "compact32_retrieve2": "`Compact(32), Retrieve(2)`, the default",
    "compact32_retrieve2_copy": "`Compact(32), Retrieve(2), Copy()`",
    "compact64_retrieve2": "`Compact(64), Retrieve(2)`",
    "kvzip.at8": "KVzip, 8 entries a chunk",
    "kvzip.at128": "KVzip, 128 entries a chunk",
    "snapkv.at8": "SnapKV, 8 entries a chunk",
    "snapkv.at128": "SnapKV, 128 entries a chunk",
}


def answers_table(metrics: Metrics) -> list[str]:
    """How many questions a host answers right by each way of reading a prompt of 16k tokens."""
    rows = []
    for arm, label in ANSWERING.items():
        keys = [f"{name}.16k.{arm}" for name in ("xquad", "nq")]
        if not any(f"{key}.accuracy" in metrics for key in keys):
            continue
        ends = {"accuracy": "", "lo": ".lo", "hi": ".hi"}
        shown = {f"{key}{end}": metrics[f"{key}.{name}"] for key in keys for name, end in ends.items()
                 if f"{key}.{name}" in metrics}  # fmt: skip
        slots = next((metrics[f"{key}.slots"] for key in keys if f"{key}.slots" in metrics), None)
        counts = [number(metrics.get(f"{key}.questions")) for key in keys]
        rows.append([label, number(slots), *(share(shown, key, 0) for key in keys), " / ".join(counts)])
    head = ["what the host reads", "KV slots", "XQuAD", "Natural Questions", "questions"]
    lines = table(head, rows if metrics else [])
    return [*lines, "", "Right answers in %, with 95% intervals."] if metrics else lines


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
    found = {tuple(key.split(".")[1:3]) for key in metrics if key.startswith(tuple(RULER_TASKS))}
    cells = [(length, arm) for length in RULER_LENGTHS for arm in RULER_ARMS if (length, arm) in found or not metrics]
    rows = [
        [f"`{task}`: {label}", *(with_error(metrics, f"{task}.{length}.{arm}.accuracy") for length, arm in cells)]
        for task, label in RULER_TASKS.items()
    ]
    if any(key.startswith("mean.") for key in metrics):
        rows.append(["mean", *(with_error(metrics, f"mean.{length}.{arm}.accuracy") for length, arm in cells)])
    rows.append(["KV slots", *(number(metrics.get(f"slots.{length}.{arm}")) for length, arm in cells)])
    head = ["task", *(f"{length}: {RULER_ARMS[arm]}" for length, arm in cells)]
    lines = table(head, rows if metrics else [])
    return [*lines, "", "Accuracy in % ± its standard error over documents."] if metrics else lines
