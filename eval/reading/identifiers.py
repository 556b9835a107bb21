"""Names in code that the raw window does not hold."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from eval.reading.bench import Bench, Scores, group
from eval.reading.measures import NAME
from eval.rows import Shape
from eval.statistics import ratio_with_interval


def identifier_spans(bench: Bench, ids: Sequence[int] | np.ndarray, shape: Shape) -> list[tuple[int, int]]:
    """Tokens `(start, end)` of target identifiers that last stood, as whole words, in the chunks and not since."""
    pieces = [bench.pieces[int(i)] for i in ids]
    ends = np.cumsum([len(piece) for piece in pieces])
    text, spans, last = "".join(pieces), [], {}
    for found in NAME.finditer(text):
        start = int(np.searchsorted(ends, found.start(), side="right"))
        end = int(np.searchsorted(ends, found.end() - 1, side="right")) + 1
        before = last.get(found.group())
        if start >= shape.split and before is not None and shape.prefix <= before[0] and before[1] <= shape.old:
            spans.append((start, end))
        last[found.group()] = (start, end)
    return spans


def identifiers(scores: Scores, arms: Sequence[str]) -> dict[str, float]:
    """Share of identifiers' tokens, and of whole identifiers, that are right, by arm."""
    bench, shape = scores.bench, scores.shape
    windows, rows = bench.sets["young"], scores.rows("young")
    spans = [identifier_spans(bench, windows.ids[row], shape) for row in rows]
    groups = [group(windows.records[row]) for row in rows]
    totals = [sum(end - start for start, end in row) for row in spans]
    metrics: dict[str, float] = {"identifiers.tokens": sum(totals), "identifiers.names": sum(map(len, spans))}
    with bench.samples("identifiers") as keep:
        for arm in arms:
            hits = scores.of(arm, "young")
            found = [[hits[d, a - shape.split : b - shape.split] for a, b in row] for d, row in enumerate(spans)]
            tokens = [sum(int(part.sum()) for part in row) for row in found]
            whole = [sum(bool(part.all()) for part in row) for row in found]
            metrics |= ratio_with_interval(f"identifiers.{arm}.accuracy", tokens, totals, groups, bench.seed)
            counts = [len(row) for row in spans]
            metrics |= ratio_with_interval(f"identifiers.{arm}.whole", whole, counts, groups, bench.seed)
            for d, row in enumerate(rows):
                keep(arm=arm, document=windows.records[row].name, tokens=totals[d], right=tokens[d],
                     names=counts[d], whole=whole[d])  # fmt: skip
    return metrics
