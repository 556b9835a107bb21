"""The gates that the arms copy by: what they are fitted on, fitting, files."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file
from torch import nn

from eval.arrays import save_arrays
from eval.hgr.arms import GATES, SHIPPED
from hf_crouter.ngram.archive import ORDERS
from hf_crouter.ngram.gate import Gate, GateConfig
from hf_crouter.training.gate import fit_gate, fit_weights


class NineWeights(nn.Module):
    """The simplest gate: one weight for each order, that of the longest one with candidates."""

    def __init__(self):
        super().__init__()
        self.logit = nn.Parameter(torch.full((len(ORDERS),), -4.0))

    def forward(self, features: torch.Tensor, available: torch.Tensor) -> torch.Tensor:
        """Available orders `[N, K]` to log-weights `[N, 1 + K]`, the host's first."""
        longest = available.int().cumsum(1).argmax(1)
        weights = features.new_full((len(available), 1 + len(ORDERS)), -math.inf, dtype=torch.float32)
        some = available.any(1)
        logit = self.logit[longest]
        own = torch.where(some, nn.functional.logsigmoid(-logit), 0.0)
        copied = torch.where(some, nn.functional.logsigmoid(logit), -math.inf)
        return weights.scatter(1, longest[:, None] + 1, copied[:, None]).index_copy(
            1, torch.zeros(1, dtype=torch.long, device=weights.device), own[:, None]
        )


def fit(
    name: str, files: Sequence[dict[str, np.ndarray]], config: GateConfig, args: argparse.Namespace, device: Any
) -> nn.Module:
    """Fits one gate on what all shards recorded, and saves it.

    Args:
        name: of `GATES`.
        files: `<arm>.{features,available,copied,host}` and `groups` of every shard.
        config: of gates that see the host.
        args: `save`, `steps` and `seed`.
        device: to fit on.
    """
    sources = SHIPPED if name == "shipped" else ("copy_fitted",) if name in ("generic", "nine_weights") else (name,)

    def load(field: str) -> np.ndarray:
        arrays = [file[f"{source}.{field}"] for source in sources for file in files]
        return np.concatenate([array.reshape(-1, *array.shape[2:]) for array in arrays])

    fields = {field: torch.from_numpy(load(field)).to(device) for field in ("features", "available", "copied", "host")}
    target = files[0][f"{sources[0]}.host"].shape[1]
    groups = np.concatenate([np.repeat(file["groups"], target) for _ in sources for file in files])
    options = {"groups": groups, "steps": args.steps, "seed": args.seed}
    if name == "nine_weights":
        gate: Any = NineWeights().to(device)
        record = fit_weights(gate, **fields, **options, learning_rate=0.05)
        save_arrays(args.save / name / "gate.safetensors", {"logit": gate.logit.detach().cpu().numpy()}, record)
    else:
        if name == "generic":
            config = GateConfig(sees_host=False)
        gate, record = fit_gate(**fields, **options, config=replace(config, training={"reads": list(sources)}))
        gate.save(args.save / name)
    print(f"gate {name}: " + ", ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}"
                                       for k, v in record.items()), flush=True)  # fmt: skip
    return gate


def load_gates(folder: Path, device: torch.device | str) -> dict[str, nn.Module]:
    """All gates as saved."""
    gates: dict[str, nn.Module] = {}
    for name in GATES:
        if name == "nine_weights":
            gates[name] = NineWeights()
            logit = load_file(folder / name / "gate.safetensors")["logit"]
            gates[name].load_state_dict({"logit": torch.from_numpy(logit)})
        else:
            gates[name] = Gate.load(folder / name)
        gates[name].to(device).requires_grad_(False)
    return gates


def finished(folder: Path, name: str) -> Path:
    """The file that is written last for a gate."""
    return folder / name / ("gate.safetensors" if name == "nine_weights" else "gate.json")
