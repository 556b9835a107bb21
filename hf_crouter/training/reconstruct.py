"""Stage 1: trains a `CRouterModel` to rebuild chunks of a prepared corpus."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoTokenizer

from ..crouter import CRouterConfig, CRouterModel
from ..crouter.fingerprint import crouter_fingerprint
from ..crouter.loading import load_crouter
from ..data.prepare import load_tokenizer
from ..data.tokens import TokenArray
from ..errors import InputError
from ..routing.calibration import Calibration
from ..utils.io import replaced_folder
from ..utils.loading import one_line
from .evaluate import reconstruction_score
from .flops import matrix_flops_per_token, measured_matrix_rate
from .loop import Batch, LoopArguments, LoopResult, make_accelerator, run_loop


@dataclass
class ReconstructArguments(LoopArguments):
    """Arguments of `hf-crouter train`."""

    data: str = field(default="", metadata={"help": "folder that hf_crouter.data.prepare wrote"})
    tokenizer: str = field(
        default="", metadata={"help": "folder or hub name of the tokenizer; that of --init by default"}
    )
    init: str | None = field(default=None, metadata={"help": "weights to go on from; the optimiser starts anew"})
    config: list[str] = field(
        default_factory=list, metadata={"help": "settings of CRouterConfig, such as hidden_size=384 num_latents=8"}
    )
    ragged_share: float = field(default=0.2, metadata={"help": "share of chunks with a random length"})
    shard_size: str = field(default="15MB", metadata={"help": "largest file of the saved weights"})

    def check(self) -> None:
        """Refuses what would only be noticed during or after the training.

        Raises:
            InputError: a share outside 0 to 1, or a shard size that is none.
        """
        if not 0 <= self.ragged_share <= 1:
            raise InputError(f"--ragged-share: expected 0 to 1, got {self.ragged_share}")
        if not re.fullmatch(r"[1-9]\d*(KB|MB|GB|KIB|MIB|GIB)", self.shard_size.upper()):
            raise InputError(f"--shard-size: expected a size such as 15MB, got {self.shard_size!r}")


class ReconstructionLoss(nn.Module):
    """The crouter's loss with nothing but scalars coming out, so that autocast never copies its logits to float32."""

    def __init__(self, crouter: CRouterModel):
        super().__init__()
        self.crouter = crouter

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """`[B, T]` ids and mask to `loss` (nats/token) and `tra` (share of rebuilt tokens, 0 to 1).

        A token counts as rebuilt where no logit is above its own: unlike an argmax, that comes with the loss's pass
        over the logits, on which a narrow crouter spends much of its time.
        """
        logits = self.crouter.decode(self.crouter.encode(input_ids, attention_mask), length=input_ids.shape[1]).float()
        nll = F.cross_entropy(logits.flatten(0, 1), input_ids.flatten(), reduction="none").view(input_ids.shape)
        with torch.no_grad():
            hit = logits.gather(-1, input_ids[..., None])[..., 0] >= logits.amax(-1)
        mask = attention_mask.to(nll.dtype)
        count = mask.sum().clamp(min=1)
        return {"loss": (nll * mask).sum() / count, "tra": (hit * mask).sum() / count}


def ragged_lengths(count: int, length: int, share: float, seed: int, index: int) -> np.ndarray:
    """Lengths of a batch of chunks: full, but for a share that is cut, half of it anywhere, half by at most 32.

    The share is a quota of every batch, rounded up.

    Returns:
        `[count]`, int64, 1 to `length`.
    """
    generator = np.random.Generator(np.random.Philox(key=[seed + 0x5EED, index]))
    ragged = generator.permutation(count)[: math.ceil(share * count)]
    lengths = np.full(count, length)
    lengths[ragged] = generator.integers(1, max(2, length), len(ragged))
    near = ragged[: len(ragged) // 2]
    lengths[near] = generator.integers(max(1, length - 32), max(2, length), len(near))
    return lengths


def reconstruction_batch(tokens: TokenArray, arguments: ReconstructArguments, length: int, index: int) -> Batch:
    """Batch number `index`: random windows of the corpus, some of them ragged."""
    ids = tokens.windows(length, arguments.seed, index, arguments.batch_size)
    lengths = ragged_lengths(len(ids), length, arguments.ragged_share, arguments.seed, index)
    mask = np.arange(length) < lengths[:, None]
    return Batch((torch.from_numpy(ids), torch.from_numpy(mask)), int(lengths.sum()))


def read_config(settings: list[str], vocab_size: int) -> CRouterConfig:
    """`CRouterConfig` from `name=value` settings.

    Raises:
        InputError: an unknown name or a value that does not fit.
    """
    values: dict[str, Any] = {"vocab_size": vocab_size}
    for setting in settings:
        name, _, value = setting.partition("=")
        if name not in CRouterConfig.__annotations__:
            raise InputError(f"expected a setting of CRouterConfig, got {name!r}")
        try:
            values[name] = json.loads(value)
        except ValueError as error:
            raise InputError(f"expected a number or true/false for {name}, got {value!r}") from error
    try:
        return CRouterConfig(**values)
    except (ValueError, StrictDataclassError) as error:
        raise InputError(f"expected a valid configuration, got: {' '.join(str(error).split())}") from error


def read_tokenizer(name: str) -> Any:
    """The fast tokenizer of a local folder, or of the hub.

    Raises:
        InputError: there is none.
    """
    if not name:
        raise InputError("--tokenizer: expected a folder or a hub name, got none")
    if Path(name).exists():
        return load_tokenizer(name)
    with one_line(name, "a tokenizer"):
        return AutoTokenizer.from_pretrained(name)


def train_reconstruction(arguments: ReconstructArguments) -> dict[str, Any]:
    """Trains, saves the crouter with its tokenizer, split and record, and returns the record.

    The record (`training.json` in the output's `crouter/` folder) holds arguments, tokens, seconds, throughput and
    MFU; those of an `init` crouter are kept in it, oldest first.

    Raises:
        InputError: no data, data or a tokenizer of another vocabulary than the weights, or a damaged checkpoint.
    """
    arguments.check()
    data, output = Path(arguments.data), Path(arguments.output)
    # everything is read before the training, so that nothing can fail after it for want of a file
    tokens = TokenArray.load(data / "train.safetensors")
    held_out = data / "calibration.safetensors"
    calibration_tokens = TokenArray.load(held_out) if held_out.exists() else None
    tokenizer = read_tokenizer(arguments.tokenizer or arguments.init or "")
    accelerator = make_accelerator(arguments)
    history: list[Any] = []
    if arguments.init:
        if arguments.config:
            raise InputError("--config: expected none with --init, whose configuration stays")
        crouter, history = load_crouter(arguments.init)[0], _history(Path(arguments.init) / "training.json")
    else:
        crouter = CRouterModel(read_config(arguments.config, len(tokenizer)))
    config: CRouterConfig = crouter.config  # type: ignore[assignment]
    for what, size in (("a tokenizer", len(tokenizer)), (f"data in {data}", tokens.vocab_size)):
        if size != config.vocab_size:
            raise InputError(f"expected {what} of {config.vocab_size} entries, as the crouter has, got {size}")
    result = run_loop(
        ReconstructionLoss(crouter),
        lambda index: reconstruction_batch(tokens, arguments, config.chunk_length, index),
        arguments,
        accelerator,
        positions_per_sequence=config.chunk_length,
        title="train",
    )
    record = _record(arguments, result, config, crouter, accelerator.device)
    if accelerator.is_main_process:
        nn.Module.to(crouter, torch.bfloat16)
        calibration = None
        if calibration_tokens is not None and len(calibration_tokens):
            calibration = calibrate(crouter, calibration_tokens, bf16=arguments.bf16)
        with replaced_folder(output / "crouter") as folder:
            crouter.save_pretrained(folder, max_shard_size=arguments.shard_size)
            tokenizer.save_pretrained(folder)
            if (data / "split.json").exists():
                shutil.copy(data / "split.json", folder / "split.json")
            if calibration is not None:
                calibration.save(folder)
            (folder / "training.json").write_text(json.dumps([*history, record], indent=1) + "\n")
    accelerator.wait_for_everyone()
    return record


def _history(path: Path) -> list[Any]:
    """Records of the runs before this one."""
    try:
        records = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    except ValueError as error:
        raise InputError(f"{path}: expected the record of a training run, got no JSON") from error
    return records if isinstance(records, list) else [records]


def calibrate(crouter: CRouterModel, tokens: TokenArray, *, bf16: bool = False, limit: int = 2048) -> Calibration:
    """Quantiles of the reconstruction NLL on documents kept out of fitting and of every test.

    Args:
        crouter: measured in float32 on its device, with the weights that it holds (or was saved with).
        tokens: the documents, in the crouter's token ids.
        bf16: bfloat16 autocast.
        limit: chunks measured, at most, evenly spread.

    Raises:
        InputError: a reconstruction NLL that is not finite.
    """
    ids, mask = tokens.chunks(crouter.config.chunk_length, limit)
    weights = CRouterModel(crouter.config)
    weights.load_state_dict(crouter.state_dict())  # float32 copies of what is saved
    nn.Module.to(weights, crouter.device)
    score = reconstruction_score(weights, torch.from_numpy(ids), torch.from_numpy(mask), bf16=bf16, batch_size=8)
    return Calibration.fit(
        score.chunk_reconstruction_nll.tolist(), len(tokens.names), crouter_fingerprint(crouter, decoder=True)
    )


def _record(
    arguments: ReconstructArguments,
    result: LoopResult,
    config: CRouterConfig,
    crouter: CRouterModel,
    device: torch.device,
) -> dict[str, Any]:
    record: dict[str, Any] = {
        "stage": "reconstruct",
        "arguments": {k: v for k, v in asdict(arguments).items() if k not in ("data", "tokenizer", "output", "init")},
        "parameters": sum(p.numel() for p in crouter.parameters()),
        **result.record(),
        "torch": torch.__version__,
        "device": "cpu",
    }
    if device.type == "cuda":
        rate = measured_matrix_rate(device)
        flops = matrix_flops_per_token(config) * result.tokens_per_second / result.processes
        record |= {"device": torch.cuda.get_device_name(device), "matrix_flops_per_second": rate, "mfu": flops / rate}
    return record
