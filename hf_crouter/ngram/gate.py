"""The gate: how much the archive and the host weigh at a position, from features of both."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..crouter import CRouterModel
from ..crouter.loading import SHIPPED, crouter_folder
from ..errors import InputError
from ..fitting import best_fit, check_fit, fitted, in_use
from ..types import Fitted
from ..utils.module_io import load_weights, read_description, save_module
from .archive import ORDERS

NAME, CONFIG = "gate", "gate.json"
SOURCES = len(ORDERS) + 1  # what is copied from: what followed each order, or the latest occurrence
FROM_ORDER, BESIDE, FROM_HOST = 4, 16, 2  # features: of an order, of raw text and sources, of an order and the host
INDEX_FEATURES = FROM_ORDER * len(ORDERS) + 3
ARCHIVE_FEATURES = INDEX_FEATURES + BESIDE
HOST_FEATURES = FROM_HOST * len(ORDERS) + 3
FEATURES = ARCHIVE_FEATURES + HOST_FEATURES


@dataclass(frozen=True)
class GateConfig:
    """What a gate reads and where it comes from.

    Attributes:
        hidden_size: width of its one hidden layer.
        orders: lengths of context that it weighs, beside the latest occurrence.
        features: number of what it sees of a position; another number is another version's.
        host_name: of the host that it was fitted on; empty for the general one.
        host_fingerprint: of that host's weights; empty for the general one.
        host_architecture: see `hosts.fingerprint.host_architecture`; empty in files of 0.2 and before.
        host_tokenizer: fingerprint; empty where none was known.
        training: record of the fit.
    """

    hidden_size: int = 32
    orders: tuple[int, ...] = ORDERS
    features: int = FEATURES
    host_name: str = ""
    host_fingerprint: str = ""
    host_architecture: str = ""
    host_tokenizer: str = ""
    training: dict[str, Any] = field(default_factory=dict)


class Gate(nn.Module):
    """Weights of the host and of every source, from the features of a position."""

    def __init__(self, config: GateConfig | None = None):
        super().__init__()
        self.config = config or GateConfig()
        self.up = nn.Linear(FEATURES, self.config.hidden_size)
        self.down = nn.Linear(self.config.hidden_size, 1 + SOURCES)
        nn.init.zeros_(self.down.weight)
        with torch.no_grad():
            self.down.bias.zero_()[0] = 4.0  # at first it hardly copies

    def forward(self, features: torch.Tensor, available: torch.Tensor) -> torch.Tensor:
        """Features `[N, F]` and available sources `[N, K]` to log-weights `[N, 1 + K]`, the host's first."""
        hidden = F.gelu(self.up(features.to(self.up.weight.dtype)), approximate="tanh")
        logits = self.down(hidden).float()
        return logits.masked_fill(~F.pad(available, (1, 0), value=True), -math.inf).log_softmax(-1)

    def save(self, folder: str | Path) -> None:
        """Writes `gate.safetensors` and `gate.json`, the JSON, with a checksum, last."""
        save_module(folder, NAME, self, self.config, torch.float32)

    @classmethod
    def load(cls, folder: str | Path) -> Gate:
        """Reads what `save` wrote.

        Raises:
            InputError: missing, truncated or altered files, or a gate of another version.
        """
        config, checksum = _described(folder)
        if config.orders != ORDERS or config.features != FEATURES:
            raise InputError(
                f"{Path(folder) / CONFIG}: expected a gate of {len(ORDERS)} orders and {FEATURES} features, got "
                f"{len(config.orders)} and {config.features or 'those of an earlier version'}: fit it anew with "
                "hf-crouter align --only gate"
            )
        gate = cls(config)
        load_weights(folder, NAME, gate, checksum)
        return gate.eval()

    def fitted(self, host: Any, tokenizer: Any = None) -> Fitted:
        """Which host it was fitted to, seen from another; nothing is refused.

        Args:
            host: the decoder, or its identity (`fitting.HostInUse`).
            tokenizer: of the host; looked for beside it where it is needed.
        """
        return fitted(NAME, self.config, in_use(host, tokenizer))


def _described(folder: str | Path) -> tuple[GateConfig, str]:
    """What a gate's folder says of it, whatever its version, and the checksum of its weights.

    Raises:
        InputError: a missing or damaged description.
    """
    known = {f.name for f in fields(GateConfig)}

    def described(record: dict[str, Any]) -> GateConfig:
        some = {key: record[key] for key in record.keys() & known}
        return GateConfig(**{"features": 0, **some, "orders": tuple(record["orders"])})  # before 0.3: none named

    return read_description(folder, NAME, described)


def general_gate() -> Gate:
    """The gate for hosts that have none of their own, fitted over several hosts."""
    return Gate.load(Path(__file__).parent / "general_gate")


def find_gate(
    crouter: CRouterModel | None, host: Any, name: str | os.PathLike | None = None, tokenizer: Any = None
) -> Gate:
    """The gate that fits a host: a named one, its own or a twin's as `own_gate` finds it, or the general one.

    Args:
        crouter: loaded from a local folder or the hub; its folder holds `gates/*/`.
        host: the decoder, or its identity (`fitting.HostInUse`).
        name: a gate's folder.
        tokenizer: of the host; looked for beside it where it is needed.

    Raises:
        InputError: damaged files.
        MismatchError: the named gate was made for another host, which is no twin of this one.
    """
    known = in_use(host, tokenizer)
    if name is not None:
        gate = Gate.load(os.fspath(name))
        target = known.host.name_or_path or "HOST"
        check_fit(str(name), gate.config, known, advice=f"hf-crouter align --host {target} --only gate")
        return gate
    return own_gate(crouter, known) or general_gate()


def own_gate(crouter: CRouterModel | None, host: Any, tokenizer: Any = None) -> Gate | None:
    """The gate that was fitted to a host or a twin of it, in the crouter's folder or the shipped one's; None: none.

    One that was fitted to this very copy comes before a twin's, and the crouter's own before the shipped one's.

    Args:
        crouter: see `find_gate`.
        host: likewise.
        tokenizer: likewise.

    Raises:
        InputError: damaged files.
    """
    source = str(getattr(crouter.config, "_name_or_path", "") or "") if crouter is not None else ""
    folders = [path.parent for folder in (crouter_folder(source, "gates") if source else None, SHIPPED)
               if folder is not None for path in sorted(folder.glob(f"gates/*/{CONFIG}"))]  # fmt: skip
    best = best_fit([_described(folder)[0] for folder in folders], in_use(host, tokenizer))
    return Gate.load(folders[best]) if best is not None else None  # those of other hosts may be of any version
