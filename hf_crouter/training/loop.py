"""One training loop for every stage: boxed by steps or seconds, on one process or many, resumed exactly.

Does not cover: gradient accumulation, model parallelism, evaluation during the run.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import TorchDynamoPlugin, broadcast, set_seed
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ..errors import InputError
from .checkpointing import latest_checkpoint, load_checkpoint, save_checkpoint
from .optim import build_optimizers, learning_rate_factor

_UNTIMED_STEPS = 3  # compilation and allocation happen here: the clock of a time box starts after them
_SYNC_STEPS = 10  # how often processes agree on the time used


@dataclass
class LoopArguments:
    """How long, how fast and where to: shared by every training command."""

    output: str = field(metadata={"help": "folder for checkpoints, log and the trained weights"})
    steps: int | None = field(default=None, metadata={"help": "box: optimiser steps (reproducible to the bit)"})
    tokens: float | None = field(default=None, metadata={"help": "box: token positions, all processes together"})
    seconds: float | None = field(default=None, metadata={"help": "box: wall-clock seconds after compilation"})
    batch_size: int = field(default=64, metadata={"help": "sequences a step on each process"})
    learning_rate: float = field(default=2e-3, metadata={"help": "peak learning rate"})
    weight_decay: float = field(default=0.01, metadata={"help": "decoupled weight decay of matrices"})
    warmup_steps: int = field(default=150, metadata={"help": "linear warm-up"})
    clip: float = field(default=1.0, metadata={"help": "largest gradient norm"})
    seed: int = field(default=0, metadata={"help": "of weights and batches"})
    bf16: bool = field(default=False, metadata={"help": "bfloat16 autocast"})
    compile: bool = field(default=False, metadata={"help": "torch.compile"})
    log_every: int = field(default=50, metadata={"help": "steps between lines of log.jsonl"})
    save_minutes: float = field(default=5.0, metadata={"help": "minutes between checkpoints"})
    resume: bool = field(default=False, metadata={"help": "go on from the newest checkpoint in the output folder"})

    def box(self, positions_per_step: int) -> tuple[int | None, float | None]:
        """The box as (steps, seconds), one of them set.

        Raises:
            InputError: not exactly one of steps, tokens and seconds is given.
        """
        if sum(value is not None for value in (self.steps, self.tokens, self.seconds)) != 1:
            raise InputError(
                "expected exactly one of --steps, --tokens and --seconds, "
                f"got {self.steps}, {self.tokens} and {self.seconds}"
            )
        if self.tokens is not None:
            return max(1, round(self.tokens / positions_per_step)), None
        return self.steps, self.seconds


@dataclass(frozen=True)
class Batch:
    """Arguments of the trained module and what they count for."""

    arguments: tuple[torch.Tensor, ...]
    real_tokens: int


@dataclass
class LoopResult:
    """What a run did; `seconds` and `tokens` count from the end of the untimed first steps of each session."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    timed_tokens: int = 0
    processes: int = 1
    final: dict[str, float] = field(default_factory=dict)

    @property
    def tokens_per_second(self) -> float:
        """Real tokens a second, all processes together, compilation left out."""
        return self.timed_tokens / self.seconds if self.seconds else 0.0


def make_accelerator(arguments: LoopArguments) -> Accelerator:
    """Accelerator for the arguments; seeds every generator."""
    set_seed(arguments.seed)
    plugin = TorchDynamoPlugin(backend="inductor" if arguments.compile else "no", dynamic=False)  # type: ignore
    # without `cpu`, accelerate ignores torchrun's other processes where there is no GPU
    return Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision="bf16" if arguments.bf16 else "no",
        dynamo_plugin=plugin,
    )


def run_loop(
    module: torch.nn.Module,
    batch: Callable[[int], Batch],
    arguments: LoopArguments,
    accelerator: Accelerator,
    *,
    positions_per_sequence: int,
    title: str,
) -> LoopResult:
    """Trains the trainable parameters of a module in place.

    Args:
        module: called with a batch's tensors, returns a dict of scalars with `loss`; on return it holds the result.
        batch: batch by number; must depend on the number alone. Each process asks for numbers of its own.
        arguments: the run's box, rates and folder.
        accelerator: from `make_accelerator`.
        positions_per_sequence: token positions a sequence, for a box in tokens.
        title: shown at the progress bar.

    Raises:
        InputError: no box, a damaged checkpoint, or a loss that is not finite (the last checkpoint stays).
    """
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    world, rank = accelerator.num_processes, accelerator.process_index
    max_steps, max_seconds = arguments.box(arguments.batch_size * world * positions_per_sequence)
    module.to(accelerator.device)
    optimizers = build_optimizers(module, arguments.learning_rate, arguments.weight_decay)
    prepared = accelerator.prepare(module, *optimizers)
    model, optimizers = prepared[0], list(prepared[1:])
    result = LoopResult(processes=world)
    checkpoint = latest_checkpoint(output) if arguments.resume else None
    if checkpoint is not None:
        progress = load_checkpoint(checkpoint, module, optimizers)
        result = LoopResult(**{k: v for k, v in progress.items() if k != "step"})
    log = _Log(output / "log.jsonl", result.steps, accelerator.is_main_process)
    model.train()
    session_seconds, session_tokens = result.seconds, result.timed_tokens
    first, clock, saved, used, pending = result.steps, None, time.monotonic(), 0.0, 0
    with _progress_bar(title, accelerator.is_main_process) as show:
        while True:
            if clock is not None:
                result.seconds = session_seconds + time.monotonic() - clock
            if max_steps is not None:
                used = result.steps / max_steps
            elif max_seconds is not None and (world == 1 or result.steps % _SYNC_STEPS == 0):
                used = result.seconds / max_seconds
                if world > 1:
                    used = float(broadcast(torch.tensor(used, device=accelerator.device)))
            if used >= 1:
                break
            factor = learning_rate_factor(result.steps, used, arguments.warmup_steps)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = arguments.learning_rate * factor
            data = batch(result.steps * world + rank)
            metrics = model(*(t.to(accelerator.device, non_blocking=True) for t in data.arguments))
            accelerator.backward(metrics["loss"])
            accelerator.clip_grad_norm_(model.parameters(), arguments.clip)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            result.steps += 1
            pending += data.real_tokens * world
            if clock is not None:
                result.timed_tokens += data.real_tokens * world
            if clock is None and result.steps - first == _UNTIMED_STEPS:
                metrics["loss"].item()  # waits for the device
                clock = time.monotonic()
            if result.steps % arguments.log_every == 0 or used >= 1:
                result.final = {name: value.item() for name, value in metrics.items()}
                result.tokens, pending = result.tokens + pending, 0
                if result.final["loss"] != result.final["loss"]:
                    raise InputError(f"expected a finite loss, got nan at step {result.steps}")
                log.write({"step": result.steps, "tokens": result.tokens, "seconds": round(result.seconds, 3),
                           "rate": factor, **result.final})  # fmt: skip
                elapsed = result.seconds - session_seconds
                rate = (result.timed_tokens - session_tokens) / elapsed if elapsed > 0 else 0.0
                show(used, result.final, rate)
            due = time.monotonic() - saved > 60 * arguments.save_minutes
            if due and accelerator.is_main_process:
                save_checkpoint(output, module, optimizers, _progress(result, pending))
            saved = time.monotonic() if due else saved
    if accelerator.device.type == "cuda":
        torch.cuda.synchronize()
    if clock is not None:
        result.seconds = session_seconds + time.monotonic() - clock
    result.tokens += pending
    if accelerator.is_main_process:
        save_checkpoint(output, module, optimizers, _progress(result, 0))
    accelerator.wait_for_everyone()
    return result


def _progress(result: LoopResult, pending: int) -> dict[str, Any]:
    return {**asdict(result), "tokens": result.tokens + pending, "step": result.steps}


class _Log:
    """Append-only JSON lines; on resume, lines after the checkpoint's step are dropped."""

    def __init__(self, path: Path, step: int, enabled: bool):
        self.path, self.enabled = path, enabled
        if enabled:
            lines = path.read_text().splitlines() if path.exists() and step else []
            kept = [line for line in lines if json.loads(line)["step"] <= step]
            path.write_text("".join(line + "\n" for line in kept))

    def write(self, row: dict[str, float]) -> None:
        if self.enabled:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")


@contextlib.contextmanager
def _progress_bar(title: str, enabled: bool) -> Iterator[Callable[[float, dict[str, float], float], None]]:
    """A live bar on a terminal; a plain line for each log entry elsewhere."""
    console = Console(stderr=True)
    started = time.monotonic()

    def text(metrics: dict[str, float], rate: float) -> str:
        values = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        return f"{values}  {rate:,.0f} tokens/s"

    if not enabled or not console.is_terminal:

        def line(used: float, metrics: dict[str, float], rate: float) -> None:
            if enabled:
                left = (time.monotonic() - started) * (1 - used) / used if used else float("nan")
                print(f"{title} {used:6.1%}  {text(metrics, rate)}  {left:,.0f} s left", flush=True)

        yield line
        return
    share, values = TextColumn("{task.percentage:5.1f}%"), TextColumn("{task.fields[text]}")
    columns = (TextColumn(title), BarColumn(), share, values, TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=1.0, text="")
        yield lambda used, metrics, rate: progress.update(task, completed=used, text=text(metrics, rate))
