"""Where copying could do harm: temperatures below 1, loops in free generation."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from eval.reading.bench import Bench, batches, group, progress_of
from eval.reading.measures import repeated_trigrams
from eval.reading.next_lines import line_splits
from eval.rows import Shape
from eval.statistics import clustered_interval, mean_with_interval, ratio_with_interval

TEMPERATURES = (1.0, 0.7, 0.5)
SAME = 64  # tokens that a temperature's loss is taken over


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
    """Tokens a step of the host when prompt lookup drafts from the whole history, whether they stay the same, speed.

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
            made, steps, same, seconds = [], [], [], ([], [])
            bench.generate(arm, contexts[:1], 2)  # what is made once is not timed
            for context in contexts:  # prompt lookup takes one row
                plain, taken = _timed(bench, arm, context, count)
                drafted, less = _timed(bench, arm, context, count, prompt_lookup_num_tokens=ahead)
                seconds[0].append(taken)
                seconds[1].append(less)
                assert bench.report is not None
                made.append(bench.report.generated)
                steps.append(bench.report.steps)
                same.append(float((plain == drafted).all()))
                advance(1)
            metrics |= ratio_with_interval(f"drafts.{arm}.tokens_a_step", made, steps, groups, bench.seed)
            metrics |= ratio_with_interval(f"drafts.{arm}.speedup", *seconds, groups, bench.seed)
            metrics |= mean_with_interval(f"drafts.{arm}.same", same, groups, bench.seed)
    return metrics | {"drafts.prompts": len(splits), "drafts.ahead": ahead}


def _timed(bench: Bench, arm: str, context: np.ndarray, count: int, **options: Any) -> tuple[np.ndarray, float]:
    """What an arm writes after a prompt `[T]`, and the seconds that this took, the prompt's reading among them."""
    start = time.monotonic()
    made = bench.generate(arm, context[None], count, **options)  # ends on the CPU: nothing is still being computed
    return made, time.monotonic() - start
