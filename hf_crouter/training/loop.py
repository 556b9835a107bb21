"""One training loop for every stage: boxed by steps, tokens or seconds, on one process or many, resumed exactly.

Does not cover: gradient accumulation, model parallelism, evaluation during the run.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import TorchDynamoPlugin, broadcast, set_seed
from transformers import PreTrainedModel

from ..errors import InputError
from ..utils.io import clear_write_errors, replaced_file
from ..utils.progress import Progress
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

    def box(self, positions_per_step: float) -> tuple[int | None, float | None]:
        """The box as (steps, seconds), one of them set.

        Raises:
            InputError: not exactly one of steps, tokens and seconds is given, or one that is not positive.
        """
        if sum(value is not None for value in (self.steps, self.tokens, self.seconds)) != 1:
            raise InputError(
                "expected exactly one of --steps, --tokens and --seconds, "
                f"got {self.steps}, {self.tokens} and {self.seconds}"
            )
        for name in ("steps", "tokens", "seconds", "batch_size", "log_every", "learning_rate", "clip"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"--{name.replace('_', '-')}: expected more than 0, got {value}")
        for name in ("seed", "weight_decay", "warmup_steps", "save_minutes"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise InputError(f"--{name.replace('_', '-')}: expected at least 0, got {value}")
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

    def record(self) -> dict[str, Any]:
        """What stands of it in the record of a training."""
        return {
            "processes": self.processes,
            "steps": self.steps,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 1),
            "tokens_per_second": round(self.tokens_per_second),
            "final": self.final,
        }


def make_accelerator(arguments: LoopArguments) -> Accelerator:
    """Accelerator for the arguments; seeds every generator."""
    set_seed(arguments.seed)
    AcceleratorState._reset_state()  # an earlier run of this process may have had another precision
    plugin = TorchDynamoPlugin(backend="inductor" if arguments.compile else "no", dynamic=False)  # type: ignore
    # without `cpu`, accelerate ignores torchrun's other processes where there is no GPU
    return Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision="bf16" if arguments.bf16 else "no",
        dynamo_plugin=plugin,
    )


def device_name(device: torch.device) -> str:
    """The GPU's name, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def run_loop(
    module: torch.nn.Module,
    batch: Callable[[int], Batch],
    arguments: LoopArguments,
    accelerator: Accelerator,
    *,
    positions_per_sequence: float,
    title: str,
) -> LoopResult:
    """Trains the trainable parameters of a module in place.

    Args:
        module: called with a batch's tensors, returns a dict of scalars with `loss`; on return it holds the result.
            To resume exactly it must draw no random numbers (dropout).
        batch: batch by number; must depend on the number alone. Each process asks for numbers of its own.
        arguments: the run's box, rates and folder.
        accelerator: from `make_accelerator`.
        positions_per_sequence: mean token positions a sequence, for a box in tokens.
        title: shown with its progress.

    Raises:
        InputError: no box, an output folder with a checkpoint but no `resume`, a checkpoint that is damaged or of
            another run, a full disk, or a loss that is not finite (the last checkpoint stays).
    """
    output = Path(arguments.output)
    world, rank, main = accelerator.num_processes, accelerator.process_index, accelerator.is_main_process
    max_steps, max_seconds = arguments.box(arguments.batch_size * world * positions_per_sequence)
    accelerator.wait_for_everyone()  # no process may look while another still writes
    checkpoint = latest_checkpoint(output)
    if checkpoint is not None and not arguments.resume:
        raise InputError(f"{output} holds {checkpoint.name}: expected --resume or another output folder")
    with clear_write_errors(output):
        output.mkdir(parents=True, exist_ok=True)
    module.to(accelerator.device)
    optimizers = build_optimizers(module, arguments.learning_rate, arguments.weight_decay)
    prepared = accelerator.prepare(module, *optimizers)
    model, optimizers = prepared[0], list(prepared[1:])
    result = LoopResult(processes=world)
    run = {"processes": world, "batch_size": arguments.batch_size, "seed": arguments.seed}
    if checkpoint is not None:
        result = _resumed(load_checkpoint(checkpoint, module, optimizers), run, checkpoint)
    log = _Log(output / "log.jsonl", result.steps, main)
    first, saved_step, saved = result.steps, result.steps if checkpoint else -1, time.monotonic()
    earlier = replace(result)
    clock: float | None = None

    def used() -> float:
        """Share of the box, 0 to 1; the same on every process, although each has a clock of its own."""
        if clock is not None:
            result.seconds = earlier.seconds + time.monotonic() - clock
        if max_seconds is None:
            return result.steps / (max_steps or 1)
        share = result.seconds / max_seconds
        if world == 1:
            return share  # nothing that would make the device wait for the next step's launches
        return torch.as_tensor(broadcast(torch.tensor(share, device=accelerator.device))).item()

    def save() -> None:
        # by one process without any exchange: the others wait for it in the next step's gradients
        save_checkpoint(output, module, optimizers, {"step": result.steps, "result": asdict(result), "run": run})

    model.train()
    share = used()
    with Progress(main, interval=0) as shown:
        shown.start(title, 1.0, done=share)
        while share < 1:
            factor = learning_rate_factor(result.steps, share, arguments.warmup_steps)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = arguments.learning_rate * factor
            data = batch(result.steps * world + rank)
            metrics = model(*(t.to(accelerator.device, non_blocking=True) for t in data.arguments))
            accelerator.backward(metrics["loss"])
            norm: Any = accelerator.clip_grad_norm_(model.parameters(), arguments.clip)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            result.steps += 1
            result.tokens += data.real_tokens * world
            if clock is not None:
                result.timed_tokens += data.real_tokens * world
            elif result.steps - first == _UNTIMED_STEPS:
                metrics["loss"].item()  # waits for the device
                clock = time.monotonic()
            if max_steps is not None or world == 1 or result.steps % _SYNC_STEPS == 0:
                share = used()
            if result.steps % arguments.log_every == 0 or share >= 1:
                result.final = _mean(metrics, accelerator)
                _check_finite(result, norm)
                log.write({"step": result.steps, "tokens": result.tokens, "seconds": round(result.seconds, 3),
                           "rate": factor, **result.final})  # fmt: skip
                shown.update(min(share, 1.0), text=_summary(result, earlier))
            # what is not finite is never saved over what is; the next line of the log ends the run
            if main and time.monotonic() - saved > 60 * arguments.save_minutes and bool(torch.isfinite(norm)):
                save()
                saved, saved_step = time.monotonic(), result.steps
    if accelerator.device.type == "cuda":
        torch.cuda.synchronize()
        used()
    if main and saved_step != result.steps:
        save()
    accelerator.wait_for_everyone()
    return result


@contextlib.contextmanager
def compiled_layers(model: PreTrainedModel, wanted: bool = True, dynamic: bool | None = None) -> Iterator[None]:
    """A model whose layers are compiled, each by itself: equal ones share a graph, which is a fraction of the model's.

    Args:
        model: of transformers; what it calls its `_no_split_modules` are its layers.
        wanted: False leaves everything as it is.
        dynamic: whether one graph serves all lengths; None: a second length makes it so.

    On leaving, layers are as they were, and all graphs of the process are dropped: those of layers that change between
    two trainings would pile up to the limit.

    Raises:
        InputError: the model names no layers.
    """
    if not wanted:
        yield
        return
    names = model._no_split_modules or ()
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise InputError(
            f"{type(model).__name__}: expected layers to compile, got none of {', '.join(names) or 'any'}"
        )
    before = [layer._compiled_call_impl for layer in layers]
    try:
        for layer in layers:
            layer.compile(dynamic=dynamic)
        yield
    finally:
        for layer, call in zip(layers, before, strict=True):
            layer._compiled_call_impl = call
        torch._dynamo.reset()


def _resumed(progress: dict[str, Any], run: dict[str, int], checkpoint: Path) -> LoopResult:
    """The result so far; another number of processes, batch size or seed would be another run."""
    try:
        result, before = LoopResult(**progress["result"]), progress["run"]
    except (KeyError, TypeError) as error:
        raise InputError(f"{checkpoint}: expected the progress of a training run, got {error!r}") from error
    if before != run:
        expected, got = (", ".join(f"{key} {value}" for key, value in numbers.items()) for numbers in (before, run))
        raise InputError(f"{checkpoint}: expected to go on with {expected}, got {got}")
    return result


def _mean(metrics: dict[str, torch.Tensor], accelerator: Accelerator) -> dict[str, float]:
    """Metrics of all processes."""
    values = torch.stack([value.detach().float() for value in metrics.values()])
    if accelerator.num_processes > 1:
        values = torch.as_tensor(accelerator.reduce(values, "mean"))
    return dict(zip(metrics, values.tolist(), strict=True))


def _check_finite(result: LoopResult, norm: torch.Tensor) -> None:
    # both are equal on all processes: either all of them stop or none
    if not math.isfinite(result.final["loss"]) or not bool(torch.isfinite(norm)):
        raise InputError(
            f"expected a finite loss, got {result.final['loss']:.4g} "
            f"with a gradient norm of {float(norm):.4g} at step {result.steps}"
        )


def _summary(result: LoopResult, earlier: LoopResult) -> str:
    """Metrics, and real tokens a second since the run was started or resumed."""
    seconds = result.seconds - earlier.seconds
    rate = (result.timed_tokens - earlier.timed_tokens) / seconds if seconds > 0 else 0.0
    return "  ".join([*(f"{name} {value:.4f}" for name, value in result.final.items()), f"{rate:,.0f} tokens/s"])


class _Log:
    """Append-only JSON lines; on resume, lines after the checkpoint's step are dropped."""

    def __init__(self, path: Path, step: int, enabled: bool):
        self.path, self.enabled = path, enabled
        if enabled:
            lines = path.read_text(encoding="utf-8").splitlines() if path.exists() and step else []
            kept = [line for line in lines if self._step(line) <= step]
            with replaced_file(path) as temporary:
                temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")

    @staticmethod
    def _step(line: str) -> float:
        try:
            return json.loads(line)["step"]
        except ValueError:  # a process was killed while it wrote the line
            return math.inf

    def write(self, row: dict[str, float]) -> None:
        if self.enabled:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
