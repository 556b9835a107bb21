"""What the reading experiments share: arms, documents, greedy generation, progress, files of single samples."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eval.arms import GENERATING, Reader
from eval.rows import Record, Rows, Shape
from hf_crouter.chunking import tokenizer_fingerprint
from hf_crouter.crouter.loading import load_crouter
from hf_crouter.generation.report import HistoryReport
from hf_crouter.hosts.loading import load_host
from hf_crouter.hosts.positions import max_positions
from hf_crouter.utils.progress import Progress

PREFIX = 4  # raw tokens at the start: these prompts have no system turn


@dataclass
class Bench:
    """A host and what its arms need, documents, and how much of everything.

    Attributes:
        reader: host, tokenizer and crouter.
        sets: documents by set: `young` (code) and `prose`.
        batch: rows at once.
        save: folder for single samples; None keeps none.
        seed: of everything random.
        report: of the latest `generate`, without reconstruction NLL; None of the plain host.
    """

    reader: Reader
    sets: dict[str, Rows]
    batch: int = 64
    save: Path | None = None
    seed: int = 0
    report: HistoryReport | None = None

    @property
    def host(self) -> Any:
        """The decoder."""
        return self.reader.host

    @property
    def tokenizer(self) -> Any:
        """Of the host."""
        return self.reader.tokenizer

    @property
    def crouter(self) -> Any:
        """Encodes and rebuilds; None where there is none."""
        return self.reader.crouter

    @property
    def window(self) -> int:
        """Fewest raw tokens at the end."""
        return self.reader.window

    @property
    def positions(self) -> int:
        """Positions that the host was trained on."""
        return max_positions(self.host) or sys.maxsize

    @property
    def chunk(self) -> int:
        """Tokens of a chunk."""
        return int(self.crouter.config.chunk_length) if self.crouter is not None else Shape.chunk

    @cached_property
    def pieces(self) -> list[str]:
        """Text of every token id alone; a part of a character is U+FFFD."""
        return [self.tokenizer.decode([i]) for i in range(len(self.tokenizer))]

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special tokens."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def compressed_end(self, length: int) -> int:
        """Token after the last chunk that is compressed in a prompt of `length` tokens."""
        return PREFIX + self.chunk * max(0, (length - self.window - PREFIX) // self.chunk)

    @torch.no_grad()
    def generate(self, arm: str, ids: np.ndarray, count: int, after: Sequence[Any] = (), **options: Any) -> np.ndarray:
        """Greedy continuations `[B, count]` of prompts `[B, T]`; -1 behind an end of text.

        Args:
            arm: of `eval.arms`.
            ids: prompts of one length.
            count: tokens to generate, at most.
            after: logits processors behind the history.
            **options: further ones of the host's `generate`.
        """
        history = self.reader.history(arm)
        prompt = torch.from_numpy(ids.astype(np.int64)).to(self.host.device)
        processors = [*([history] if history is not None else []), *after]
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        try:
            out = self.host.generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, do_sample=False,
                pad_token_id=pad, logits_processor=processors, **options,
            )  # fmt: skip
            self.report = history.report(measure=False) if history is not None else None
        finally:
            if history is not None:
                history.detach()
        made = out[:, ids.shape[1] :].cpu().numpy()
        made = np.pad(made, ((0, 0), (0, count - made.shape[1])), constant_values=-1)
        ends = self.host.generation_config.eos_token_id
        ended = np.isin(made, [ends] if isinstance(ends, int) else list(ends or ())).cumsum(1) > 0
        return np.where(ended, -1, made)

    @torch.no_grad()
    def greedy(self, arm: str, ids: np.ndarray, last: int) -> np.ndarray:
        """Whether greedy decoding would have chosen each of the last tokens `[B, last]` of texts `[B, T]`."""
        tokens = torch.from_numpy(ids.astype(np.int64)).to(self.host.device)
        history = self.reader.history(arm)
        if history is None:
            logits = self.host(input_ids=tokens[:, :-1], logits_to_keep=last, use_cache=False).logits
            return (logits.argmax(-1) == tokens[:, -last:]).cpu().numpy()
        try:
            return history.score(tokens, last=last, greedy=True)[1].cpu().numpy()
        finally:
            history.detach()

    def text(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of generated ids; what stands behind the end is left out."""
        return self.tokenizer.decode([int(i) for i in ids if i >= 0], clean_up_tokenization_spaces=False)

    def spread(self, name: str, count: int) -> list[int]:
        """Rows of a set, evenly over its groups' order; all where there are fewer."""
        rows = len(self.sets[name].ids)
        return sorted({int(i) for i in np.linspace(0, rows - 1, min(count, rows))})

    @contextmanager
    def samples(self, part: str) -> Iterator[Any]:
        """A function that keeps one sample as a line of JSON."""
        if self.save is None:
            yield lambda **values: None
            return
        self.save.mkdir(parents=True, exist_ok=True)
        with (self.save / f"{part}.jsonl").open("w", encoding="utf-8") as file:

            def keep(**values: Any) -> None:
                file.write(json.dumps(values, ensure_ascii=False, default=_plain) + "\n")
                file.flush()

            yield keep


@contextmanager
def progress_of(name: str, prompts: int) -> Iterator[Callable[[int], None]]:
    """A function that says that so many more prompts are read."""
    with Progress() as progress:
        progress.start(name, prompts, "prompts")
        yield progress.advance
        progress.finish()


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)


def batches(count: int, size: int) -> Iterator[slice]:
    """Slices that cover `count` rows."""
    for first in range(0, count, size):
        yield slice(first, min(first + size, count))


def bench_arguments(parser: argparse.ArgumentParser, name: str, arms: Sequence[str], sets: str, batch: int) -> None:
    """Adds the arguments that `opened` reads, and arms and result; `batch` on an accelerator."""
    parser.add_argument("--data", type=Path, required=True, help=f"folder of the sets of eval.documents: {sets}")
    parser.add_argument("--host", default="smollm2-135m", help="known name, folder or hub name")
    parser.add_argument("--crouter", help="the shipped one by default; none: arms that need one are left out")
    parser.add_argument("--gate", type=Path, help="folder of a gate that was fitted for this host")
    parser.add_argument("--arms", nargs="+", choices=GENERATING, default=list(arms))
    parser.add_argument("--batch", type=int, default=batch if torch.cuda.device_count() > 0 else 2,
                        help="prompts at once")  # fmt: skip
    parser.add_argument("--save", type=Path, help="folder for single samples, JSON lines")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--result", help=f"{name}-HOST by default")


def opened(args: argparse.Namespace, sets: Sequence[str]) -> Bench:
    """A bench with the sets, of the arguments of `bench_arguments`."""
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    host, tokenizer = load_host(args.host, device, torch.bfloat16 if cuda else torch.float32)
    crouter = None if args.crouter == "none" else load_crouter(args.crouter, device)[0]
    rows = {name: Rows.load(args.data, name, tokenizer_fingerprint(tokenizer)) for name in sets}
    return Bench(Reader(host, tokenizer, crouter, args.gate), rows, args.batch, args.save, args.seed)


def group(record: Record) -> str:
    """What is drawn together in a bootstrap."""
    return record.cluster


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
            parts = []
            with progress_of(f"score {arm} on {name}", len(ids)) as advance:
                for rows in batches(len(ids), max(1, self.bench.batch // 4)):
                    parts.append(self.bench.greedy(arm, ids[rows], self.shape.target))
                    advance(len(parts[-1]))
            self.known[arm, name] = np.concatenate(parts)
        return self.known[arm, name]
