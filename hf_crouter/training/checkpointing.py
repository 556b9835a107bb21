"""Training checkpoints that are written atomically, hold no pickle and resume to the last bit."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import InputError
from ..utils.io import replaced_folder

_NAME = re.compile(r"checkpoint-(\d+)$")


def pack_optimizers(optimizers: list[Any]) -> tuple[dict[str, torch.Tensor], list[Any]]:
    """Tensors by name `optimizer.parameter.key` and the JSON-able parameter groups."""
    tensors, groups = {}, []
    for number, optimizer in enumerate(optimizers):
        state = optimizer.state_dict()
        groups.append(state["param_groups"])
        for index, entries in state["state"].items():
            for key, value in entries.items():
                tensors[f"{number}.{index}.{key}"] = torch.as_tensor(value).detach().cpu().contiguous()
    return tensors, groups


def unpack_optimizers(optimizers: list[Any], tensors: dict[str, torch.Tensor], groups: list[Any]) -> None:
    """Puts back what `pack_optimizers` took."""
    for number, (optimizer, group) in enumerate(zip(optimizers, groups, strict=True)):
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            owner, index, key = name.split(".", 2)
            if int(owner) == number:
                state.setdefault(int(index), {})[key] = tensor
        optimizer.load_state_dict({"state": state, "param_groups": group})


def save_checkpoint(folder: Path, module: torch.nn.Module, optimizers: list[Any], progress: dict[str, Any]) -> Path:
    """Writes `checkpoint-STEP`, whole or not at all, and then removes the older ones; returns its path.

    Args:
        folder: the run's output folder.
        module: only trainable parameters are kept, in their own dtype.
        optimizers: their whole state is kept.
        progress: JSON-able; must hold `step`.

    Raises:
        InputError: the disk is full or the folder cannot be written; older checkpoints stay.
    """
    target = Path(folder) / f"checkpoint-{progress['step']:08d}"
    weights = {k: v.detach().cpu().contiguous() for k, v in module.named_parameters() if v.requires_grad}
    tensors, groups = pack_optimizers(optimizers)
    with replaced_folder(target) as temporary:
        save_file(weights, temporary / "weights.safetensors")
        save_file(tensors, temporary / "optimizers.safetensors", {"groups": json.dumps(groups)})
        (temporary / "progress.json").write_text(json.dumps(progress, indent=1))
    for other in target.parent.glob("*checkpoint-*"):
        # a leading dot: what a process left behind that was killed while it wrote
        if other != target and (_NAME.match(other.name) or other.name.startswith(".checkpoint-")):
            shutil.rmtree(other, ignore_errors=True)
    return target


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run, or none."""
    found = [p for p in Path(folder).glob("checkpoint-*") if _NAME.match(p.name)]
    return max(found, key=lambda p: p.name, default=None)


def load_checkpoint(checkpoint: Path, module: torch.nn.Module, optimizers: list[Any]) -> dict[str, Any]:
    """Restores weights and optimisers in place and returns the progress.

    Raises:
        InputError: the checkpoint is damaged or of another model.
    """
    try:
        weights = _read(checkpoint / "weights.safetensors")[0]
        tensors, metadata = _read(checkpoint / "optimizers.safetensors")
        progress = json.loads((checkpoint / "progress.json").read_text())
        groups = json.loads(metadata["groups"])
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"expected a complete checkpoint at {checkpoint}, got: {reason}") from error
    parameters = {k: v for k, v in module.named_parameters() if v.requires_grad}
    same = parameters.keys() == weights.keys() and all(p.shape == weights[k].shape for k, p in parameters.items())
    if not same:
        raise InputError(f"expected a checkpoint of this model at {checkpoint}, got other parameters")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    try:
        unpack_optimizers(optimizers, tensors, groups)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"expected a checkpoint of these optimisers at {checkpoint}, got others") from error
    return progress


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
