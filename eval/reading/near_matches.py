"""Records that nearly match: the window corrects one, the compressed past holds the old one, which is asked for anew.

Copying is tempted here: what followed the same words before is the value that no longer holds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from eval.arms import GENERATING, Reader
from eval.reading.bench import PREFIX, Bench, batches, progress_of
from eval.reading.passkeys import WORDS
from eval.results import host_key, host_note, write_result
from eval.rows import Rows
from eval.statistics import mean_with_interval
from hf_crouter.chunking import tokenizer_fingerprint
from hf_crouter.crouter.loading import load_crouter
from hf_crouter.hosts.loading import load_host

ARMS = (
    "window",
    "full",
    "copy",
    "retrieve2",
    "compact32_retrieve2",
    "soft_retrieve2_copy",
    "copy_half",
    "copy_fitted",
    "retrieve2_copy",
    "retrieve2_copy_fitted",
)
NOTES = (
    "Share of prompts after which the greedy next tokens are the corrected value (new), or the older record's (old). "
    "Six records as JSON, CSV or keys stand somewhere in the compressed part, among young code; the raw window "
    "corrects one and then begins to write it. Intervals: bootstrap over prompts."
)
CITIES = ("Paris", "London", "Berlin", "Madrid", "Rome", "Vienna", "Dublin", "Lisbon", "Athens", "Prague", "Warsaw",
          "Moscow", "Tokyo", "Delhi", "Cairo", "Lima", "Boston", "Chicago", "Denver", "Dallas")  # fmt: skip
FORMS = ("json", "csv", "key")


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
    """`<arm>.new` and `<arm>.old` with their intervals: which value was written."""
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
            new, old = [], []
            for part in batches(count, bench.batch):
                made = bench.generate(arm, np.stack([s.ids for s in samples[part]]), most)
                for sample, ids in zip(samples[part], made.tolist(), strict=True):
                    new.append(float(tuple(ids[: len(sample.answer)]) == sample.answer))
                    old.append(float(tuple(ids[: len(sample.stale)]) == sample.stale))
                    keep(arm=arm, form=sample.form, new=new[-1], old=old[-1], made=bench.text(ids))
                advance(len(made))
            metrics |= mean_with_interval(f"{arm}.new", new, names, bench.seed)
            metrics |= mean_with_interval(f"{arm}.old", old, names, bench.seed)
            print(f"{arm}: new {metrics[f'{arm}.new']:.2f}, old {metrics[f'{arm}.old']:.2f}", flush=True)
    return metrics


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    cuda = torch.cuda.device_count() > 0
    parser.add_argument("--data", type=Path, required=True, help="folder of the sets of eval.documents: young")
    parser.add_argument("--host", default="smollm2-135m", help="known name, folder or hub name")
    parser.add_argument("--crouter", help="the shipped one by default; none: arms that need one are left out")
    parser.add_argument("--gate", type=Path, help="folder of a gate that was fitted for this host")
    parser.add_argument("--arms", nargs="+", choices=GENERATING, default=list(ARMS))
    parser.add_argument("--length", type=int, default=4096, help="tokens of a prompt")
    parser.add_argument("--samples", type=int, default=90, help="prompts")
    parser.add_argument("--batch", type=int, default=30 if cuda else 2, help="prompts at once")
    parser.add_argument("--save", type=Path, help="folder for single samples, JSON lines")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--result", help="near-matches-HOST by default")


def run(args: argparse.Namespace) -> None:
    """Measures and writes the result."""
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    host, tokenizer = load_host(args.host, device, torch.bfloat16 if cuda else torch.float32)
    crouter = None if args.crouter == "none" else load_crouter(args.crouter, device)[0]
    reader = Reader(host, tokenizer, crouter, args.gate)
    sets = {"young": Rows.load(args.data, "young", tokenizer_fingerprint(tokenizer))}
    bench = Bench(reader, sets, args.batch, args.save, args.seed)
    metrics = near_matches(bench, reader.readable(args.arms), args.length, args.samples)
    config = {"length": args.length, "samples": args.samples, "window": reader.window}
    result = args.result or f"near-matches-{host_key(args.host)}"
    print(write_result(result, metrics, seed=args.seed, config=config, notes=f"{host_note(args.host)} {NOTES}"))
