"""Where copying could do harm: records that nearly match, temperatures below 1, loops in free generation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from eval.documents import Shape
from eval.reading.bench import PREFIX, Bench, batches, group, progress_of
from eval.reading.measures import repeated_trigrams
from eval.reading.next_lines import line_splits
from eval.reading.passkeys import WORDS
from eval.statistics import clustered_interval, mean_with_interval, ratio_with_interval

CITIES = ("Paris", "London", "Berlin", "Madrid", "Rome", "Vienna", "Dublin", "Lisbon", "Athens", "Prague", "Warsaw",
          "Moscow", "Tokyo", "Delhi", "Cairo", "Lima", "Boston", "Chicago", "Denver", "Dallas")  # fmt: skip
FORMS = ("json", "csv", "key")
TEMPERATURES = (1.0, 0.7, 0.5)
SAME = 64  # tokens that a temperature's loss is taken over


@dataclass(frozen=True, eq=False)
class NearMatch:
    """A prompt whose next value stands in its window, while a matching older record has another.

    Attributes:
        ids: `[length]`.
        answer: ids of the new value.
        stale: ids of the older record's.
        form: of `FORMS`.
        record: `(start, end)` of the older record, in tokens.
    """

    ids: np.ndarray
    answer: tuple[int, ...]
    stale: tuple[int, ...]
    form: str
    record: tuple[int, int]


def _record(form: str, name: str, number: int, city: str) -> str:
    if form == "json":
        return json.dumps({"id": number, "name": name, "city": city}) + "\n"
    return f"{number},{name},{city}\n" if form == "csv" else f"{name}.{number}.city = {city}\n"


def near_match(bench: Bench, hay: np.ndarray, length: int, form: str, random: np.random.Generator) -> NearMatch:
    """Old records in the compressed part; in the window one of them is corrected, and then written once more.

    Args:
        bench: tokenizer and where the compressed part ends.
        hay: ids of other text, at least `length`.
        length: tokens of the prompt.
        form: of `FORMS`.
        random: draws everything.
    """
    names = ["-".join(random.choice(WORDS, 2, replace=False)) for _ in range(6)]
    numbers = random.choice(np.arange(1000, 9999), 6, replace=False)
    cities = random.choice(CITIES, 7, replace=False)
    texts = [_record(form, *values) for values in zip(names, map(int, numbers), map(str, cities[:6]), strict=True)]
    table = [bench.encode(text) for text in texts]
    new, which = str(cities[6]), int(random.integers(6))
    text = _record(form, names[which], int(numbers[which]), new)
    # no record in the window but the corrected one: its value is what the text goes on with
    cut = text.index(new)
    ending = bench.encode(
        f"\n\nCorrection: {names[which]} has moved to {new}. The record is now:\n\n{text[:cut]}".rstrip(" ")
    )
    blank = " " if text[:cut].endswith(" ") else ""
    compressed = bench.compressed_end(length)
    room = compressed - PREFIX - sum(map(len, table))
    if room < 0 or len(ending) > length - compressed:
        raise ValueError(f"{length} tokens are too few for the records")
    at = PREFIX + int(random.integers(0, room + 1))
    start = at + sum(len(part) for part in table[:which])
    rest = length - at - sum(map(len, table)) - len(ending)
    pieces = [hay[:at], *table, hay[at : at + rest], ending]
    ids = np.concatenate([np.asarray(piece, np.int64) for piece in pieces])
    answer, stale = (tuple(bench.encode(blank + city)) for city in (new, str(cities[which])))
    return NearMatch(ids, answer, stale, form, (start, start + len(table[which])))


def near_matches(bench: Bench, arms: Sequence[str], length: int, count: int) -> dict[str, float]:
    """Share of right values, and of the older record's, by arm."""
    rows = bench.sets["young"].ids
    samples = []
    for n in range(count):
        random = np.random.default_rng([bench.seed, n, 17])
        hay = np.concatenate([rows[i] for i in np.resize(random.permutation(len(rows)), -(-length // rows.shape[1]))])
        samples.append(near_match(bench, hay, length, FORMS[n % len(FORMS)], random))
    names = [str(n) for n in range(count)]
    metrics: dict[str, float] = {}
    most = max(max(len(s.answer), len(s.stale)) for s in samples)
    with bench.samples("near_matches") as keep, progress_of("near matches", count * len(arms)) as advance:
        for arm in arms:
            right, stale = [], []
            for part in batches(count, bench.batch):
                made = bench.generate(arm, np.stack([s.ids for s in samples[part]]), most)
                for sample, ids in zip(samples[part], made.tolist(), strict=True):
                    right.append(float(tuple(ids[: len(sample.answer)]) == sample.answer))
                    stale.append(float(tuple(ids[: len(sample.stale)]) == sample.stale))
                    keep(arm=arm, form=sample.form, right=right[-1], stale=stale[-1], made=bench.text(ids))
                advance(len(made))
            metrics |= mean_with_interval(f"manners.near.{arm}.right", right, names, bench.seed)
            metrics |= mean_with_interval(f"manners.near.{arm}.wrong_copied", stale, names, bench.seed)
    return metrics


class Forced:
    """A logits processor that notes the loss of known tokens at several temperatures, and lets nothing else through.

    Behind a history it sees what sampling would see: temperature sharpens after copying is mixed in.

    Args:
        tokens: `[B, steps]`, what is to come.
        start: columns of the prompt.
    """

    def __init__(self, tokens: np.ndarray, start: int):
        self.tokens, self.start = torch.from_numpy(tokens.astype(np.int64)), start
        self.losses = np.zeros((len(TEMPERATURES), *tokens.shape))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores `[B, V]` that leave the known token alone."""
        step = input_ids.shape[1] - self.start
        target = self.tokens[:, step].to(scores.device)[:, None]
        for n, temperature in enumerate(TEMPERATURES):
            logp = (scores.float() / temperature).log_softmax(-1)
            self.losses[n, :, step] = -logp.gather(1, target)[:, 0].cpu().numpy()
        return torch.full_like(scores, -torch.inf).scatter_(1, target, 0.0)


def temperatures(bench: Bench, shape: Shape, arms: Sequence[str], documents: int) -> dict[str, float]:
    """Loss of the next 64 tokens, nats/token, of distributions sharpened after mixing; differences are to the window.

    Greedy-like sharpening makes every error dear, the host's own as well, so arms are compared at one temperature.
    """
    metrics: dict[str, float] = {}
    for name in bench.sets:
        windows, rows = bench.sets[name], bench.spread(name, documents)
        ids = windows.ids[rows]
        groups = [group(windows.records[row]) for row in rows]
        steps = min(SAME, shape.target)
        losses: dict[str, np.ndarray] = {}
        with progress_of(f"temperature on {name}", len(rows) * len(arms)) as advance:
            for arm in arms:
                parts = []
                for part in batches(len(rows), bench.batch):
                    forced = Forced(ids[part, shape.split : shape.split + steps], shape.split)
                    bench.generate(arm, ids[part, : shape.split], steps, [forced])
                    parts.append(forced.losses.mean(-1))
                    advance(parts[-1].shape[1])
                losses[arm] = np.concatenate(parts, axis=1)
        for arm, values in losses.items():
            for n, temperature in enumerate(TEMPERATURES):
                key = f"manners.temperature.{name}.t{round(100 * temperature)}.{arm}"
                metrics |= mean_with_interval(key, values[n].tolist(), groups, bench.seed)
                if arm != "window" and "window" in losses:
                    difference = values[n] - losses["window"][n]
                    mean, low, high = clustered_interval(
                        lambda draw, d=difference: float(d[draw].mean()), groups, seed=bench.seed
                    )
                    metrics |= {f"{key}.minus_window": mean, f"{key}.minus_window.lo": low,
                                f"{key}.minus_window.hi": high}  # fmt: skip
    return metrics


def loops(bench: Bench, shape: Shape, arms: Sequence[str], documents: int, count: int) -> dict[str, float]:
    """Share of repeated trigrams in freely and greedily generated tokens, by arm; clustered by package."""
    windows = bench.sets["young"]
    splits = line_splits(bench, windows, shape, 1, bench.spread("young", documents))
    contexts = np.stack([windows.ids[s.row][s.at - shape.split : s.at] for s in splits])
    groups = [group(windows.records[s.row]) for s in splits]
    metrics: dict[str, float] = {}
    with bench.samples("loops") as keep, progress_of("loops", len(splits) * len(arms)) as advance:
        for arm in arms:
            shares = []
            for part in batches(len(splits), bench.batch):
                made = bench.generate(arm, contexts[part], count)
                for split, ids in zip(splits[part], made, strict=True):
                    shares.append(repeated_trigrams([int(i) for i in ids if i >= 0]))
                    keep(arm=arm, document=windows.records[split.row].name, repetition=shares[-1],
                         text=bench.text(ids))  # fmt: skip
                advance(len(made))
            metrics |= mean_with_interval(f"manners.loops.{arm}.repetition", shares, groups, bench.seed)
            metrics[f"manners.loops.{arm}.looping"] = float(np.mean(np.array(shares) > 0.5))
    # the text that really follows, where there is as much of it, tells how much repetition is natural
    rest = [windows.ids[s.row][s.at : s.at + count].tolist() for s in splits]
    metrics["manners.loops.text.repetition"] = float(np.mean([repeated_trigrams(ids) for ids in rest]))
    return metrics


def drafts(
    bench: Bench, shape: Shape, arms: Sequence[str], documents: int, count: int, ahead: int = 8
) -> dict[str, float]:
    """Tokens a step of the host when prompt lookup drafts from the whole history, and whether they stay the same.

    Args:
        bench: host and documents.
        shape: of a row.
        arms: with a history, which counts the steps.
        documents: of young code, one prompt each.
        count: tokens to generate, greedily.
        ahead: tokens drafted, at most.
    """
    windows = bench.sets["young"]
    splits = line_splits(bench, windows, shape, 1, bench.spread("young", documents))
    contexts = np.stack([windows.ids[s.row][s.at - shape.split : s.at] for s in splits])
    groups = [group(windows.records[s.row]) for s in splits]
    metrics: dict[str, float] = {}
    with progress_of("drafts", len(splits) * len(arms)) as advance:
        for arm in arms:
            made, steps, same = [], [], []
            for context in contexts:  # prompt lookup takes one row
                plain = bench.generate(arm, context[None], count)
                drafted = bench.generate(arm, context[None], count, prompt_lookup_num_tokens=ahead)
                assert bench.report is not None
                made.append(bench.report.generated)
                steps.append(bench.report.steps)
                same.append(float((plain == drafted).all()))
                advance(1)
            metrics |= ratio_with_interval(f"drafts.{arm}.tokens_a_step", made, steps, groups, bench.seed)
            metrics |= mean_with_interval(f"drafts.{arm}.same", same, groups, bench.seed)
    return metrics | {"drafts.prompts": len(splits), "drafts.ahead": ahead}
