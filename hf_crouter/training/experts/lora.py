"""An expert's two adapters: PEFT's LoRA, trained by the loop of the other stages and written as PEFT does."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from ...errors import InputError
from ...routing.adapters import CONFIG, WEIGHTS
from ..loop import Batch, LoopArguments, compiled_layers, run_loop
from .arguments import ExpertArguments


class HostLoss(nn.Module):
    """Next-token loss of a host, in evaluation mode throughout: dropout would draw random numbers."""

    def __init__(self, host: PreTrainedModel):
        super().__init__()
        self.host = host

    def train(self, mode: bool = True) -> HostLoss:
        """Stays in evaluation mode."""
        super().train(mode)
        self.host.eval()
        return self

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """`[B, T]` ids to `loss`, nats/token."""
        targets = F.pad(input_ids[:, 1:], (0, 1), value=-100)  # the logits, which are large, are not cut and copied
        logits: Any = self.host(input_ids=input_ids, use_cache=False).logits
        return {"loss": F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-100)}


class _Factor(nn.Module):
    """One of LoRA's two matrices, which is no `nn.Linear`: the loop gives it to AdamW.

    Muon, which it gives linear layers to, would take longer over hundreds of thin matrices than the step itself.
    """

    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.weight = weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight)


@contextlib.contextmanager
def lora(model: PreTrainedModel, rank: int, alpha: float, targets: list[str]) -> Iterator[Any]:
    """PEFT's model with a new LoRA around `model`, which gets its own layers, modes and flags back at the end.

    Args:
        model: crouter or host, changed in place meanwhile.
        rank: of the adapter.
        alpha: its scale, over the rank.
        targets: ends of names of linear layers.

    Raises:
        InputError: peft is not installed, or the model has no such layers.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:  # only training needs it
        raise InputError('expert: training needs peft: pip install "hf_crouter[train]"') from error
    odd = [f"a {type(layer).__name__} at {path}" for path, layer in model.named_modules()
           if f".{path}".endswith(tuple(f".{t}" for t in targets)) and not isinstance(layer, nn.Linear)]  # fmt: skip
    if odd:  # before peft has touched anything
        raise InputError(f"{type(model).__name__}: expected linear layers {', '.join(targets)}, got {odd[0]}")
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), bias="none")  # type: ignore[arg-type]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    parameters, training = list(model.parameters()), model.training
    try:
        adapted: Any = get_peft_model(model, config)
    except ValueError as error:
        raise InputError(f"{type(model).__name__}: expected linear layers {', '.join(targets)}, got none") from error
    try:
        for layer in list(model.modules()):
            if not hasattr(layer, "lora_A"):
                continue
            for side in (layer.lora_A, layer.lora_B):
                side["default"] = _Factor(side["default"].weight)  # type: ignore[index, union-attr]
        yield adapted
    finally:
        adapted.unload()
        vars(model).pop("peft_config", None)
        for parameter, flag in zip(parameters, flags, strict=True):
            parameter.requires_grad_(flag)
            parameter.grad = None
        model.train(training)


def save_adapter(adapted: Any, folder: Path) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors` (bfloat16) as PEFT does, naming no local path."""
    from peft import get_peft_model_state_dict

    folder.mkdir(parents=True)
    tensors = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    save_file({key: value.detach().to("cpu", torch.bfloat16).contiguous() for key, value in tensors.items()},
              folder / WEIGHTS, {"format": "pt"})  # fmt: skip
    config = adapted.peft_config["default"].to_dict()
    config |= {"inference_mode": True, "base_model_name_or_path": None, "auto_mapping": None,
               "target_modules": sorted(config["target_modules"])}  # fmt: skip
    (folder / CONFIG).write_text(json.dumps(config, indent=1, default=_plain, sort_keys=True) + "\n")


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)


def fit_adapter(
    loss: nn.Module,
    model: PreTrainedModel,
    batch: Callable[[int], Batch],
    how: tuple[ExpertArguments, LoopArguments, int],
    accelerator: Accelerator,
    folder: Path,
) -> dict[str, Any]:
    """Trains one adapter, writes it to `folder`, named for the part in the expert's, and returns its record."""
    arguments, settings, positions = how
    name, part = folder.parent.name, folder.name
    rank, alpha, targets = (getattr(arguments, f"{part}_{key}") for key in ("rank", "alpha", "targets"))
    with lora(model, rank, alpha, targets) as adapted:
        with compiled_layers(model, arguments.compile):
            result = run_loop(
                loss, batch, settings, accelerator, positions_per_sequence=positions, title=f"{name}: {part}"
            )
        parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        if accelerator.is_main_process:
            save_adapter(adapted, folder)
    accelerator.free_memory()
    return {
        "parameters": parameters,
        **result.record(),
    }
