"""Arguments of an expert's training."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ...errors import InputError
from ...routing.experts import COMPRESSOR, HOST
from ..reconstruct import ReconstructArguments

SECONDS = 300.0  # of each part, where no box is given
PARTS = (COMPRESSOR, HOST)


@dataclass
class ExpertArguments:
    """Arguments of `hf-crouter expert add`."""

    crouter: str = field(default="", metadata={"help": "folder or hub name of the shared crouter; by default the one "
                                               "that comes with the package"})  # fmt: skip
    host: str = field(default="", metadata={"help": "known name, folder or hub name of the host"})
    data: str = field(default="", metadata={"help": "folder prepared with the crouter's tokenizer"})
    experts: str = field(default="experts", metadata={"help": "folder of the expert set; made if missing"})
    compressor_steps: int | None = field(default=None, metadata={"help": "steps of the crouter's adapter"})
    compressor_seconds: float | None = field(
        default=None, metadata={"help": f"seconds instead of steps; {SECONDS:g} where neither is given"}
    )
    compressor_rank: int = field(default=16, metadata={"help": "rank of the crouter's adapter"})
    compressor_alpha: float = field(default=32.0, metadata={"help": "its scale, over the rank"})
    compressor_targets: list[str] = field(
        default_factory=lambda: ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
        metadata={"help": "linear layers of the crouter that it changes"},
    )
    compressor_batch_size: int = field(default=32, metadata={"help": "chunks a step on each process"})
    compressor_learning_rate: float = field(default=2e-3, metadata={"help": "its peak learning rate"})
    ragged_share: float = field(default=0.3, metadata={"help": "share of chunks with a random length"})
    host_steps: int | None = field(default=None, metadata={"help": "steps of the host's adapter"})
    host_seconds: float | None = field(
        default=None, metadata={"help": f"seconds instead of steps; {SECONDS:g} where neither is given"}
    )
    host_rank: int = field(default=8, metadata={"help": "rank of the host's adapter"})
    host_alpha: float = field(default=16.0, metadata={"help": "its scale, over the rank"})
    host_targets: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        metadata={"help": "linear layers of the host that it changes"},
    )
    host_batch_size: int = field(default=8, metadata={"help": "windows a step on each process"})
    host_learning_rate: float = field(default=5e-4, metadata={"help": "its peak learning rate"})
    window: int = field(default=1024, metadata={"help": "tokens that the host reads at once"})
    calibration_chunks: int = field(default=256, metadata={"help": "held-out chunks measured at each length, at most"})
    keep_texts: bool = field(default=True, metadata={"help": "keep these in the expert's folder, so that experts that "
                                                     "are added later can be told from it"})  # fmt: skip
    warmup_steps: int = field(default=20, metadata={"help": "linear warm-up of both parts"})
    log_every: int = field(default=20, metadata={"help": "steps between lines of progress"})
    seed: int = field(default=0, metadata={"help": "of weights, batches and held-out documents"})
    bf16: bool = field(default=False, metadata={"help": "bfloat16 autocast"})
    compile: bool = field(default=False, metadata={"help": "torch.compile each layer"})

    def check(self) -> None:
        """Refuses what would only be noticed later.

        Raises:
            InputError: a number out of its range, no layers, or two boxes for one part.
        """
        parts = ("steps", "seconds", "rank", "alpha", "batch_size", "learning_rate")
        for name in (*(f"{part}_{name}" for part in PARTS for name in parts), "calibration_chunks", "log_every"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"{_option(name)}: expected more than 0, got {value}")
        if self.window < 2:
            raise InputError(f"--window: expected at least 2, got {self.window}")
        for name in ("compressor_targets", "host_targets"):
            if not getattr(self, name):
                raise InputError(f"{_option(name)}: expected names of layers, got none")
        for part in PARTS:
            steps, seconds = getattr(self, f"{part}_steps"), getattr(self, f"{part}_seconds")
            if steps is not None and seconds is not None:
                raise InputError(f"--{part}-steps, --{part}-seconds: expected one of them, got {steps} and {seconds}")
            self.settings(part, "").box(1)
        self.settings(COMPRESSOR, "").check()

    def settings(self, part: str, output: str | Path) -> ReconstructArguments:
        """What the loop needs to train `compressor` or `host`, with its checkpoints in `output`."""
        steps, seconds = getattr(self, f"{part}_steps"), getattr(self, f"{part}_seconds")
        shared = (
            "warmup_steps",
            "log_every",
            "seed",
            "bf16",
            "ragged_share",
        )  # layers are compiled here, not the whole
        return ReconstructArguments(
            output=str(output),
            steps=steps,
            seconds=SECONDS if steps is None and seconds is None else seconds,
            batch_size=getattr(self, f"{part}_batch_size"),
            learning_rate=getattr(self, f"{part}_learning_rate"),
            save_minutes=1e9,  # a part is trained in one go
            **{name: getattr(self, name) for name in shared},
        )


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
