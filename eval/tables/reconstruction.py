"""Tables of the crouter alone."""

from __future__ import annotations

from eval.tables.cells import Metrics, number, percent, table

SETS = {
    "code.files": "held-out files",
    "code.packages": "held-out packages",
    "code.stdlib": "standard library",
    "wikitext2": "WikiText-2 (valid)",
    "prose": "prose",
    "random": "random ids",
}


def tra_table(metrics: Metrics) -> list[str]:
    """Token reconstruction accuracy by kind of text."""
    rows = [
        [label, percent(metrics.get(f"{key}.tra"), 2), number(metrics.get(f"{key}.nll"), 3),
         number(metrics.get(f"{key}.chunks"))]
        for key, label in SETS.items()
    ]  # fmt: skip
    lines = table(["text", "TRA", "nats/token", "chunks"], rows if metrics else [])
    if metrics:
        params, seconds, tokens = (number(metrics.get(key)) for key in ("params", "train.seconds", "train.tokens"))
        mfu = percent(metrics.get("train.mfu"), 1)
        lines += ["", f"{params} parameters; trained for {seconds} seconds on {tokens} tokens, MFU {mfu}."]
    return lines
