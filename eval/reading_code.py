"""What a host makes of a compressed past in code: next lines, names, and whether residuals predict its errors."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from eval.documents import CHUNK, CHUNKS, PREFIX, SCORED, WINDOW, Windows
from eval.reading_arms import Bench, Progress, batches, group, ratio_with_interval, with_interval
from eval.statistics import clustered_interval
from hf_crouter.hosts.tokenizers import special_ids
from hf_crouter.ngram.archive import Archive

MADE = 64  # tokens generated for a line
NAME = re.compile(r"[A-Za-z_]\w{3,}")
QUOTED = re.compile(r"\"[^\"\n]*\"|'[^'\n]*'")
STRING = re.compile(r"\"[^\"\n]{4,}\"|'[^'\n]{4,}'")


@dataclass(frozen=True)
class Shape:
    """Where what stands in a row `[prefix | chunks | window | target]`, in tokens; that of `eval.documents`."""

    prefix: int = PREFIX
    chunk: int = CHUNK
    chunks: int = CHUNKS
    window: int = WINDOW
    target: int = SCORED

    @property
    def old(self) -> int:
        """End of the chunks."""
        return self.prefix + self.chunks * self.chunk

    @property
    def split(self) -> int:
        """End of the window."""
        return self.old + self.window


# Lines.


def first_line(text: str) -> str:
    """The first line that is not empty, without the space around it."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def similarity(made: str, wanted: str) -> float:
    """Edit similarity, 0 to 1: 1 - Levenshtein distance over the longer length."""
    if made == wanted:
        return 1.0
    row = list(range(len(wanted) + 1))
    for i, a in enumerate(made, 1):
        before, row[0] = row[0], i
        for j, b in enumerate(wanted, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (a != b))
    return 1.0 - row[-1] / max(len(made), len(wanted))


def statement(text: str) -> str:
    """The first statement: lines from the first one that is not empty until brackets are closed."""
    lines: list[str] = []
    for line in text.splitlines():
        if line.strip():
            lines.append(line.strip())
        bare = QUOTED.sub("", " ".join(lines))
        if lines and sum(map(bare.count, "([{")) <= sum(map(bare.count, ")]}")):
            break
    return " ".join(lines)


def repeated_trigrams(ids: Sequence[int]) -> float:
    """Share of the trigrams of ids that stood earlier among them."""
    grams = list(zip(ids, ids[1:], ids[2:], strict=False))
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def right_before_mistake(made: Sequence[int], wanted: Sequence[int]) -> int:
    """Tokens up to the first that differs."""
    return next((i for i, (a, b) in enumerate(zip(made, wanted, strict=False)) if a != b), min(len(made), len(wanted)))


def known_names(made: str, *sources: str) -> tuple[int, int]:
    """Names and strings of at least 4 characters in generated text: how many a source holds, and how many in all."""
    names = set().union(*(NAME.findall(source) for source in sources))
    found = [name in names for name in NAME.findall(STRING.sub(" ", made))]
    found += [any(string in source for source in sources) for string in STRING.findall(made)]
    return sum(found), len(found)


@dataclass(frozen=True)
class Split:
    """A place in a row behind a line's end."""

    row: int
    at: int


def line_splits(bench: Bench, windows: Windows, shape: Shape, each: int, rows: Sequence[int], made: int = MADE
                ) -> list[Split]:  # fmt: skip
    """At most `each` places a row, spread out, whose next line has a letter and fits into `made` tokens.

    A context starts so that exactly window, chunks and prefix stand before the split: all are equally long.
    """
    # a tokenizer may join a line's end with most of the next line's indentation
    ends = np.array([piece.rstrip(" \t").endswith("\n") for piece in bench.pieces])
    found = []
    for row in rows:
        ids = windows.ids[row]
        places = []
        for at in range(shape.split, min(shape.split + shape.target, len(ids)) - made + 1):
            if ends[ids[at - 1]] and "\n" not in bench.pieces[int(ids[at])]:
                line = bench.text(ids[at : at + made])
                if first_line(line) and "\n" in line.lstrip() and re.search(r"[A-Za-z]", first_line(line)):
                    places.append(at)
        chosen = {places[int(i)] for i in np.linspace(0, len(places) - 1, min(each, len(places)))} if places else ()
        found += [Split(row, at) for at in sorted(chosen)]
    return found


MEASURES = ("exact", "edit", "statement", "right_tokens", "repetition")


def next_lines(bench: Bench, shape: Shape, arms: Sequence[str], documents: int, each: int) -> dict[str, float]:
    """Greedy next lines in code that the host has not seen, by arm; clustered by package."""
    windows = bench.sets["young"]
    splits = line_splits(bench, windows, shape, each, bench.spread("young", documents), MADE)
    contexts = np.stack([windows.ids[s.row][s.at - shape.split : s.at] for s in splits])
    truths = [windows.ids[s.row][s.at : s.at + MADE].tolist() for s in splits]
    groups = [group(windows.records[s.row]) for s in splits]
    progress = Progress("nextline", len(splits) * len(arms))
    values: dict[str, dict[str, list[float]]] = {}
    metrics: dict[str, float] = {"nextline.lines": len(splits), "nextline.packages": len(set(groups))}
    with bench.samples("nextline") as keep:
        for arm in arms:
            columns: dict[str, list[float]] = {name: [] for name in (*MEASURES, "known", "names")}
            for rows in batches(len(splits), bench.batch):
                made = bench.generate(arm, contexts[rows], MADE)
                for split, context, truth, ids in zip(splits[rows], contexts[rows], truths[rows], made, strict=True):
                    text, wanted = bench.text(ids), bench.text(truth)
                    line, right = first_line(text), first_line(wanted)
                    known, names = known_names(text, bench.text(context), wanted)
                    real = [int(i) for i in ids if i >= 0]
                    figures = (line == right, similarity(line, right), statement(text) == statement(wanted),
                               right_before_mistake(real, truth), repeated_trigrams(real), known, names)  # fmt: skip
                    for column, figure in zip(columns.values(), figures, strict=True):
                        column.append(float(figure))
                    keep(arm=arm, document=windows.records[split.row].name, at=split.at, line=line, wanted=right,
                         **dict(zip(columns, map(float, figures), strict=True)))  # fmt: skip
                progress.add(len(made), arm)
            values[arm] = columns
            for name in MEASURES:
                metrics |= with_interval(f"nextline.{arm}.{name}", columns[name], groups, bench.seed)
            metrics |= ratio_with_interval(
                f"nextline.{arm}.known_names", columns["known"], columns["names"], groups, bench.seed
            )
    return metrics | gains(values, groups, bench.seed)


def gains(values: dict[str, dict[str, list[float]]], groups: Sequence[str], seed: int) -> dict[str, float]:
    """Paired differences of exact lines and edit similarity to the window, and the share of full history's."""
    metrics: dict[str, float] = {}
    for measure, suffix in (("exact", ""), ("edit", ".edit")):
        exact = {arm: np.array(columns[measure]) for arm, columns in values.items()}
        if "window" not in exact:
            continue
        for arm in exact.keys() - {"window"}:
            key = f"nextline.{arm}_minus_window{suffix}"
            difference = exact[arm] - exact["window"]
            mean, low, high = clustered_interval(lambda rows, d=difference: float(d[rows].mean()), groups, seed=seed)
            metrics |= {key: mean, f"{key}.lo": low, f"{key}.hi": high}
            if arm != "full" and "full" in exact and (worth := float((exact["full"] - exact["window"]).mean())) > 0:
                metrics[f"nextline.{arm}.share_of_gain{suffix}"] = mean / worth
    return metrics


# Names.


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


class Scores:
    """Greedy, teacher-forced verdicts by arm and set, made once.

    Args:
        bench: host and documents.
        shape: of their rows.
        documents: of a set, at most.
    """

    def __init__(self, bench: Bench, shape: Shape, documents: int):
        self.bench, self.shape, self.documents = bench, shape, documents
        self.known: dict[tuple[str, str], np.ndarray] = {}

    def rows(self, name: str) -> list[int]:
        """Rows of a set that are scored."""
        return self.bench.spread(name, self.documents)

    def of(self, arm: str, name: str) -> np.ndarray:
        """`[documents, target]`, bool: greedy decoding would have been right."""
        if (arm, name) not in self.known:
            ids = self.bench.sets[name].ids[self.rows(name)]
            progress, size = Progress(f"score {arm}", len(ids)), max(1, self.bench.batch // 4)
            parts = []
            for rows in batches(len(ids), size):
                parts.append(self.bench.greedy(arm, ids[rows], self.shape.target))
                progress.add(len(parts[-1]), name)
            self.known[arm, name] = np.concatenate(parts)
        return self.known[arm, name]


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


# Residuals.


def auroc(values: np.ndarray, labels: np.ndarray) -> float:
    """Probability that a value with label 1 is above one with label 0; ties count half; nan without both."""
    positive = int(labels.sum())
    negative = len(labels) - positive
    if not positive or not negative:
        return float("nan")
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return float((ranks[labels.astype(bool)].sum() - positive * (positive + 1) / 2) / (positive * negative))


def sources(bench: Bench, ids: np.ndarray, shape: Shape, wanted: np.ndarray) -> np.ndarray:
    """For each target token the chunk that the longest match brings it from, else -1; `[target]`.

    Args:
        bench: host and tokenizer.
        ids: `[length]`.
        shape: of the row.
        wanted: `[target]`, bool; others are not looked up.
    """
    vocabulary = len(bench.tokenizer)
    archive = Archive.empty(vocabulary, special_ids(bench.tokenizer, bench.host), tail_limit=len(ids))
    past = ids[shape.prefix : shape.old]
    archive = archive.extended(past.astype(np.int64))
    found = np.full(len(wanted), -1)
    for i in np.flatnonzero(wanted):
        at = shape.split + int(i)
        match = archive.match(ids[max(0, at - 64) : at].astype(np.int64))
        hits = [int(p) for p in match.positions if past[p] == ids[at]]
        if hits:
            found[i] = hits[-1] // shape.chunk
    return found


def reconstruction_nlls(scores: Scores, sets: Sequence[str]) -> dict[str, float]:
    """Whether a chunk's residual says that what the host reads of it is wrong.

    Taken are the target tokens that the host gets right by copying from the true ids and wrong with the window alone,
    and whose longest match brings them from chunk c. Such a token is lost when the host errs with the archive that
    is rebuilt from the latents. The figure is the AUROC of the residual of chunk c for being lost; one a set as well
    (over both sets it also tells code from prose), and one by chunk (any of its tokens lost).
    """
    bench, shape = scores.bench, scores.shape
    lost: list[bool] = []
    of: list[tuple[str, int, int]] = []  # set, row, chunk
    value: dict[tuple[str, int, int], float] = {}
    with bench.samples("residual") as keep, torch.no_grad():
        for name in sets:
            windows, rows = bench.sets[name], scores.rows(name)
            window, copy, rebuilt = (scores.of(arm, name) for arm in ("window", "copy", "copy_rebuilt"))
            for d, row in enumerate(rows):
                chunk_of = sources(bench, windows.ids[row], shape, copy[d] & ~window[d])
                old = windows.ids[row][shape.prefix : shape.old].astype(np.int64)
                chunks = torch.from_numpy(old.reshape(shape.chunks, shape.chunk)).to(bench.crouter.device)
                nats = bench.crouter(chunks).reconstruction_nll.float().tolist()
                for i in np.flatnonzero(chunk_of >= 0):
                    key = (name, row, int(chunk_of[i]))
                    of.append(key)
                    value[key] = nats[key[2]]
                    lost.append(bool(not rebuilt[d, i]))
                    keep(
                        document=windows.records[row].name,
                        chunk=key[2],
                        reconstruction_nll=nats[key[2]],
                        lost=lost[-1],
                    )
    labels, groups = np.array(lost, bool), [group(bench.sets[name].records[row]) for name, row, _ in of]
    metrics: dict[str, float] = {"residual.tokens": len(of), "residual.chunks": len(value)}
    if of:
        metrics["residual.lost"] = float(labels.mean())
    for name in ("", *sets):
        chosen = np.array([i for i, key in enumerate(of) if name in ("", key[0])], int)
        where = f"residual.{name}.predicts_errors" if name else "residual.predicts_errors"
        metrics |= _auroc_of(where, [value[of[i]] for i in chosen], labels[chosen], [groups[i] for i in chosen],
                             bench.seed)  # fmt: skip
    chunks_lost = dict.fromkeys(value, False)
    for key, is_lost in zip(of, lost, strict=True):
        chunks_lost[key] |= is_lost
    by_chunk = [group(bench.sets[name].records[row]) for name, row, _ in value]
    metrics |= _auroc_of("residual.predicts_errors.by_chunk", list(value.values()),
                         np.array(list(chunks_lost.values()), bool), by_chunk, bench.seed)  # fmt: skip
    return metrics


def _auroc_of(key: str, values: Sequence[float], labels: np.ndarray, groups: Sequence[str], seed: int
              ) -> dict[str, float]:  # fmt: skip
    """AUROC with its interval; nothing without both labels."""
    numbers = np.asarray(values)
    if not len(numbers) or labels.all() or not labels.any():
        return {}

    def statistic(rows: np.ndarray) -> float:
        # a draw of one label alone says nothing: it counts as chance
        return float(np.nan_to_num(auroc(numbers[rows], labels[rows]), nan=0.5))

    mean, low, high = clustered_interval(statistic, groups, seed=seed, draws=1000)
    return {f"{key}.auroc": mean, f"{key}.auroc.lo": low, f"{key}.auroc.hi": high}
