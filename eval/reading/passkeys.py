"""Pass keys and values of keys, asked for at the end of a long prompt: samples, wordings, accuracy.

The wordings were written before any arm was measured, and nothing is tuned on them. Question and statement of a sample
share their words right before the value (`aligned`), because a host of this size fails on paraphrases even with 2k
tokens all raw; that form is easy for copying as well. The tasks named `*_paraphrased` draw another statement than the
question's. All records of a sample are stated alike, several differ from the asked-for one in a digit or a word,
values are of the same form, and all stand in the compressed part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from eval.reading.bench import PREFIX, Bench, batches, progress_of
from eval.statistics import mean_with_interval

DEFAULT = "soft_retrieve2_copy"  # the arm whose accuracy also stands without a name
MARGIN = 64  # tokens by which a prompt is shorter than its name says: the answer must fit a host's positions too

STATEMENTS = {
    "passkey": (
        "The pass key for vault {key} is {value}.",
        "Remember this: the pass key for vault {key} is {value}.",
        "For vault {key} the pass key was set to {value}.",
        "Whoever wants to open vault {key} has to enter {value}.",
        "Vault {key}: {value}.",
        "A note on vault {key}: its pass key is {value}.",
    ),
    "kv": (
        "The value of {key} is {value}.",
        "{key}: {value}",
        "{key} = {value}",
        "Under {key} we stored {value}.",
        "The entry {key} holds {value}.",
        "For {key}, write down {value}.",
    ),
}
QUESTIONS = {  # each ends as the statement of the same number
    "passkey": (
        "As noted above, the pass key for vault {key} is",
        "Question: What is the pass key for vault {key}? Answer: the pass key for vault {key} is",
        "Which pass key opens it? For vault {key} the pass key was set to",
        "As noted above: Whoever wants to open vault {key} has to enter",
        "Recall the notes above. Vault {key}:",
        "Once more, a note on vault {key}: its pass key is",
    ),
    "kv": (
        "Question: What is the value of {key}? Answer: The value of {key} is",
        "Look up the entry above. {key}:",
        "Above it says: {key} =",
        "What was stored there? Under {key} we stored",
        "As noted before, the entry {key} holds",
        "Which value belongs to it? For {key}, write down",
    ),
}
RECORDS = {"passkey": (4, 3), "kv": (8, 4)}  # records of a sample, and how many are nearly the asked-for one
WORDS = (
    "amber", "anchor", "autumn", "badger", "basket", "beacon", "bishop", "bottle", "branch", "bridge", "bronze",
    "butter", "candle", "canyon", "carpet", "castle", "cherry", "circle", "clover", "coffee", "copper", "cotton",
    "desert", "dragon", "engine", "falcon", "feather", "finger", "forest", "garden", "ginger", "hammer", "harbor",
    "helmet", "island", "jacket", "kettle", "ladder", "lantern", "lemon", "marble", "meadow", "mirror", "monkey",
    "mountain", "needle", "orange", "oyster", "paper", "pepper", "pillow", "planet", "pocket", "rabbit", "ribbon",
    "river", "saddle", "silver", "spider", "spring", "summer", "temple", "thunder", "tiger", "tunnel", "velvet",
    "violin", "walnut", "window", "winter",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Sample:
    """One prompt.

    Attributes:
        ids: `[length]`.
        answer: ids of what must come next.
        key: that is asked for.
        value: its value.
        others: the other keys with their values.
        spans: where each record stands, `(start, end)` in tokens, the asked-for one first.
        compressed: token after the compressed part.
        statement: number of the statement's wording.
        question: number of the question's wording.
        aligned: the question ends as the statement begins, key included.
    """

    ids: np.ndarray
    answer: tuple[int, ...]
    key: str
    value: str
    others: tuple[tuple[str, str], ...]
    spans: tuple[tuple[int, int], ...]
    compressed: int
    statement: int
    question: int
    aligned: bool

    @property
    def depth(self) -> float:
        """Where the needle stands in the compressed part, 0 (its start) to 1."""
        return (self.spans[0][0] - PREFIX) / max(1, self.compressed - PREFIX)


def records(task: str, random: np.random.Generator) -> list[tuple[str, str]]:
    """Keys and values, the asked-for one first; all keys and all values differ."""
    total, near = RECORDS[task]
    key = _key(task, random)
    keys = [key]
    while len(keys) < total:
        new = _near(task, key, random) if len(keys) <= near else _key(task, random)
        if new not in keys:
            keys.append(new)
    values: list[str] = []
    while len(values) < total:
        new = _digits(5, random) if task == "passkey" else f"{random.choice(WORDS)}-{_digits(3, random)}"
        if new not in values:
            values.append(new)
    return list(zip(keys, values, strict=True))


def _digits(count: int, random: np.random.Generator) -> str:
    return "".join(map(str, [random.integers(1, 10), *random.integers(0, 10, count - 1)]))


def _key(task: str, random: np.random.Generator) -> str:
    return _digits(4, random) if task == "passkey" else "-".join(random.choice(WORDS, 3, replace=False))


def _near(task: str, key: str, random: np.random.Generator) -> str:
    parts = list(key) if task == "passkey" else key.split("-")
    at = int(random.integers(0, len(parts)))
    parts[at] = str(random.integers(1, 10)) if task == "passkey" else str(random.choice(WORDS))
    return "".join(parts) if task == "passkey" else "-".join(parts)


def make_sample(bench: Bench, task: str, hay: np.ndarray, length: int, random: np.random.Generator) -> Sample:
    """One prompt of exactly `length` tokens.

    Args:
        bench: tokenizer and where the compressed part ends.
        task: `passkey` or `kv`, also with `_paraphrased`.
        hay: ids of other text, at least `length`.
        length: tokens of the prompt.
        random: draws everything.
    """
    task, _, how = task.partition("_")
    pairs = records(task, random)
    statement = asked = int(random.integers(len(STATEMENTS[task])))
    if how:
        statement = (asked + int(random.integers(1, len(STATEMENTS[task])))) % len(STATEMENTS[task])
    form, question_form = STATEMENTS[task][statement], QUESTIONS[task][asked]
    texts = [bench.encode("\n" + form.format(key=key, value=value) + "\n") for key, value in pairs]
    question = bench.encode("\n\n" + question_form.format(key=pairs[0][0]))
    compressed = bench.compressed_end(length)
    room = compressed - PREFIX - sum(map(len, texts))
    if room < 0 or len(question) > length - compressed:
        raise ValueError(f"{task}: {length} tokens are too few for its records and its question")
    order = random.permutation(len(pairs)).tolist()
    offsets = [_line_end(bench, hay, PREFIX + int(o), PREFIX + room) for o in random.integers(0, room + 1, len(pairs))]
    pieces, spans, at, done = [], {}, 0, 0
    for number, offset in zip(order, sorted(offsets), strict=True):
        pieces += [hay[done:offset], texts[number]]
        at += offset - done
        spans[number] = (at, at + len(texts[number]))
        at, done = spans[number][1], offset
    pieces += [hay[done : done + length - at - len(question)], question]
    ids = np.concatenate([np.asarray(piece, np.int64) for piece in pieces])
    before, ending = form.split("{value}")[0].rstrip(), question_form
    tail = before[before.index("{key}") :]
    return Sample(
        ids, tuple(bench.encode(f" {pairs[0][1]}")), *pairs[0], tuple(pairs[1:]),
        tuple(spans[n] for n in range(len(pairs))), compressed, statement, asked, ending.endswith(tail),
    )  # fmt: skip


def _line_end(bench: Bench, hay: np.ndarray, offset: int, limit: int, reach: int = 32) -> int:
    """The next place behind a line's end, if one is near."""
    for place in range(offset, min(offset + reach, limit)):
        if bench.pieces[int(hay[place - 1])].endswith("\n"):
            return place
    return offset


def make_samples(bench: Bench, task: str, length: int, count: int) -> list[Sample]:
    """Samples in hay of code and prose in turn, each from documents in an order of its own."""
    samples = []
    names = [name for name in ("prose", "young") if name in bench.sets]
    for n in range(count):
        random = np.random.default_rng([bench.seed, length, n, len(task)])
        rows = bench.sets[names[n % len(names)]].ids
        needed = -(-length // rows.shape[1])
        chosen = random.permutation(len(rows))
        hay = np.concatenate([rows[i] for i in np.resize(chosen, needed)])
        samples.append(make_sample(bench, task, hay, length, random))
    return samples


def verdict(sample: Sample, made: Sequence[int], others: Sequence[Sequence[int]]) -> str:
    """`right`, `distractor` (the value of another key), or `wrong`."""
    if tuple(made[: len(sample.answer)]) == sample.answer:
        return "right"
    return "distractor" if any(tuple(made[: len(o)]) == tuple(o) for o in others) else "wrong"


def retrieval(bench: Bench, task: str, lengths: Sequence[int], arms: Sequence[str], count: int, longest: dict[str, int]
              ) -> dict[str, float]:  # fmt: skip
    """Accuracy of every arm at every length, in tokens.

    Args:
        bench: host and documents.
        task: `passkey` or `kv`, also with `_paraphrased`.
        lengths: of prompts, as named; a prompt is 64 tokens shorter.
        arms: of `ARMS`, and `full`.
        count: samples a cell.
        longest: prompts up to which an arm is run; others are run on all.
    """
    metrics: dict[str, float] = {}
    cells = [(length, arm) for length in lengths for arm in arms
             if length <= longest.get(arm, length) and (arm != "full" or length <= bench.positions)]  # fmt: skip
    with bench.samples(task) as keep, progress_of(task, len(cells) * count) as advance:
        for length in lengths:
            samples = make_samples(bench, task, length - MARGIN, count)
            others = [[bench.encode(f" {value}") for _, value in sample.others] for sample in samples]
            for arm in (arm for at, arm in cells if at == length):
                verdicts = []
                for rows in batches(count, bench.batch):
                    part = samples[rows]
                    most = max(len(sample.answer) for sample in part)
                    made = bench.generate(arm, np.stack([sample.ids for sample in part]), most)
                    for sample, other, ids in zip(part, others[rows], made.tolist(), strict=True):
                        verdicts.append(verdict(sample, ids, other))
                        keep(
                            length=length, arm=arm, key=sample.key, value=sample.value, depth=round(sample.depth, 4),
                            statement=sample.statement, question=sample.question, aligned=sample.aligned,
                            verdict=verdicts[-1], made=bench.text(ids),
                        )  # fmt: skip
                    advance(len(part))
                metrics |= summary(f"{task}.{length // 1024}k", arm, samples, verdicts, bench.seed)
    return metrics


def summary(key: str, arm: str, samples: Sequence[Sample], verdicts: Sequence[str], seed: int) -> dict[str, float]:
    """Metrics of one cell: accuracy, share of other keys' values, accuracy where the wordings are aligned."""
    right = [float(v == "right") for v in verdicts]
    names = [str(n) for n in range(len(right))]
    metrics = mean_with_interval(f"{key}.{arm}.accuracy", right, names, seed)
    metrics[f"{key}.{arm}.distractor"] = float(np.mean([v == "distractor" for v in verdicts]))
    metrics[f"{key}.{arm}.samples"] = len(right)
    for name, flag in (("aligned", True), ("unaligned", False)):
        chosen = [r for r, sample in zip(right, samples, strict=True) if sample.aligned == flag]
        if chosen:
            metrics[f"{key}.{arm}.{name}"] = float(np.mean(chosen))
    if arm == DEFAULT:
        metrics |= {f"{key}{k.removeprefix(f'{key}.{arm}')}": v for k, v in metrics.items() if ".accuracy" in k}
    return metrics
