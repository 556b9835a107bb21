"""What the reading experiments share: arms, documents, greedy generation, progress, files of single samples."""

from __future__ import annotations

import inspect
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eval.documents import Record, Windows
from eval.statistics import clustered_interval
from hf_crouter import CompressedHistory
from hf_crouter.generation.report import HistoryReport

PREFIX = 4  # raw tokens at the start: these prompts have no system turn
ARMS: dict[str, dict[str, Any]] = {
    "window": {"soft": False, "copy": False, "recall": 0},
    "soft": {"soft": True, "copy": False, "recall": 0},
    "copy": {"soft": False, "copy": True, "recall": 0},
    "copy_half": {"soft": False, "copy": True, "copy_strength": 0.5, "recall": 0},
    "copy_rebuilt": {"soft": False, "copy": "rebuilt", "recall": 0},
    "copy_generated": {"soft": False, "copy": True, "copy_generated": True, "recall": 0},
    "soft_retrieve2_copy": {"soft": True, "copy": True, "recall": 2},
}
"""Options of `CompressedHistory`; `full` is the plain host."""


@dataclass
class Bench:
    """A host, a crouter, documents, and how much of everything.

    Attributes:
        host: the decoder.
        tokenizer: of the host, which the crouter shares.
        crouter: encodes and rebuilds.
        sets: documents by set: `young` (code) and `prose`.
        window: fewest raw tokens at the end.
        batch: rows at once.
        save: folder for single samples; None keeps none.
        seed: of everything random.
        options: further arguments of every history.
        report: of the latest `generate`, without residuals; None of the plain host.
        started: seconds of the clock.
    """

    host: Any
    tokenizer: Any
    crouter: Any
    sets: dict[str, Windows]
    window: int = 512
    batch: int = 64
    save: Path | None = None
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    report: HistoryReport | None = None
    started: float = field(default_factory=time.monotonic)

    @property
    def positions(self) -> int:
        """Positions that the host was trained on."""
        return int(self.host.config.get_text_config(decoder=True).max_position_embeddings)

    @property
    def chunk(self) -> int:
        """Tokens of a chunk."""
        return int(self.crouter.config.chunk_length)

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

    def history(self, arm: str) -> CompressedHistory | None:
        """What an arm passes to `generate`; None for the plain host."""
        if arm == "full":
            return None
        wanted = {**self.options, **ARMS[arm]}
        if "recall" not in inspect.signature(CompressedHistory).parameters:
            wanted.pop("recall")
        return CompressedHistory(self.host, self.crouter, window=self.window, tokenizer=self.tokenizer, **wanted)

    @torch.no_grad()
    def generate(self, arm: str, ids: np.ndarray, count: int, after: Sequence[Any] = (), **options: Any) -> np.ndarray:
        """Greedy continuations `[B, count]` of prompts `[B, T]`; -1 behind an end of text.

        Args:
            arm: of `ARMS`, or `full`.
            ids: prompts of one length.
            count: tokens to generate, at most.
            after: logits processors behind the history.
            **options: further ones of the host's `generate`.
        """
        history = self.history(arm)
        prompt = torch.from_numpy(ids.astype(np.int64)).to(self.host.device)
        processors = [*([history] if history is not None else []), *after]
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        try:
            out = self.host.generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, do_sample=False,
                pad_token_id=pad, logits_processor=processors, **options,
            )  # fmt: skip
            self.report = history.report(reconstruction_nlls=False) if history is not None else None
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
        history = self.history(arm)
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


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)


class Progress:
    """Lines with rate and time left, at most one every few seconds."""

    def __init__(self, name: str, total: int, every: float = 5.0):
        self.name, self.total, self.every, self.done = name, total, every, 0
        self.start = self.shown = time.monotonic()

    def add(self, count: int, about: str = "") -> None:
        """So many more are done."""
        self.done += count
        now = time.monotonic()
        if now - self.shown < self.every and self.done < self.total:
            return
        self.shown, spent = now, max(now - self.start, 1e-9)
        left = (self.total - self.done) * spent / max(self.done, 1)
        print(
            f"{self.name}: {self.done}/{self.total} {about} {self.done / spent:.2f}/s, {spent:.0f} s, "
            f"{left:.0f} s left", file=sys.stderr, flush=True,
        )  # fmt: skip


def batches(count: int, size: int) -> Iterator[slice]:
    """Slices that cover `count` rows."""
    for first in range(0, count, size):
        yield slice(first, min(first + size, count))


def with_interval(key: str, values: Sequence[float], groups: Sequence[str], seed: int) -> dict[str, float]:
    """Mean of `key` with its 95% interval, whole groups drawn together; nothing where there are no values."""
    if not len(values):
        return {}
    array = np.asarray(values, np.float64)
    mean, low, high = clustered_interval(lambda rows: float(array[rows].mean()), groups, seed=seed)
    return {key: mean, f"{key}.lo": low, f"{key}.hi": high}


def ratio_with_interval(
    key: str, hits: Sequence[float], totals: Sequence[float], groups: Sequence[str], seed: int
) -> dict[str, float]:
    """Sum of hits over sum of totals with its 95% interval; for shares of tokens counted by document."""
    top, bottom = np.asarray(hits, np.float64), np.asarray(totals, np.float64)
    if not bottom.sum():
        return {}
    share, low, high = clustered_interval(
        lambda rows: float(top[rows].sum() / max(bottom[rows].sum(), 1e-9)), groups, seed=seed
    )
    return {key: share, f"{key}.lo": low, f"{key}.hi": high}


def group(record: Record) -> str:
    """What is drawn together in a bootstrap."""
    return record.cluster
