"""What could route by the host itself: its own loss under each adapter, and PEFT's Arrow.

Each gives every piece a score per domain, the lower the better, `[N, n]`.

Axes: `N` pieces, `n` domains, `T` tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from hf_crouter.errors import InputError
from hf_crouter.routing.adapters import AdapterStack


@torch.no_grad()
def host_losses(
    host: Any, stack: AdapterStack | None, number: int, ids: np.ndarray, rows: int, parts: int = 1
) -> np.ndarray:
    """Mean next-token loss of each part of each row under one adapter, `[N, parts]`, nats/token.

    Args:
        host: a decoder.
        stack: its adapters; None: the plain host.
        number: the adapter's number; -1: the plain host.
        ids: `[N, T]`; a row is read at once, so a later part has the earlier ones as context.
        rows: at once.
        parts: equal stretches; the first token of all is not scored.
    """
    found = []
    for start in range(0, len(ids), rows):
        batch = torch.from_numpy(ids[start : start + rows].astype(np.int64)).to(host.device)
        if stack is None:
            logits = host(input_ids=batch, use_cache=False).logits
        else:
            with stack.using([number] * len(batch)):
                logits = host(input_ids=batch, use_cache=False).logits
        pieces = []  # a few rows at a time, float32 logits are large; flat, over a middle axis it takes far longer
        for one, targets in zip(logits.split(8), batch.split(8), strict=True):
            flat = one[:, :-1].float().flatten(0, 1)
            pieces.append(F.cross_entropy(flat, targets[:, 1:].flatten(), reduction="none").view(len(one), -1))
        losses = torch.cat(pieces)
        length = ids.shape[1] // parts
        edges = [0, *(length * (part + 1) - 1 for part in range(parts))]  # target t stands at position t - 1
        found.append(
            torch.stack([losses[:, a:b].mean(1) for a, b in zip(edges[:-1], edges[1:], strict=True)], 1).cpu()
        )
    return torch.cat(found).float().numpy()


class ArrowVotes:
    """PEFT's Arrow router over the host's adapters: the share of tokens and layers that prefer each.

    Use as a context manager: the host holds PEFT's layers meanwhile.

    Args:
        host: changed in place until the block ends.
        folders: adapters saved by PEFT, in the domains' order.

    Raises:
        InputError: this PEFT has no Arrow.
    """

    def __init__(self, host: Any, folders: Sequence[str]):
        try:
            from peft import ArrowConfig, create_arrow_model
        except ImportError as error:
            raise InputError("arrow: expected a peft with ArrowConfig (0.18 or newer)") from error
        self.count = len(folders)
        self.host, self.flags = host, [parameter.requires_grad for parameter in host.parameters()]
        self.parameters = list(host.parameters())
        self.model = create_arrow_model(host, list(folders), ArrowConfig(top_k=1, router_temperature=1.0))
        self.model.eval()
        self.votes: list[torch.Tensor] = []
        self.width = 0  # of all layers' inputs together
        for module in self.model.modules():
            if type(module).__name__ == "ArrowLoraLinearLayer":
                module.register_forward_pre_hook(self._hook)
                self.width += int(module.in_features)  # pyright: ignore[reportArgumentType]

    def _hook(self, module: Any, inputs: tuple[Any, ...]) -> None:
        hidden = inputs[0]
        near = (hidden.to(module.prototypes.dtype) @ module.prototypes.T).abs().argmax(-1)  # [B, T]
        self.votes.append(F.one_hot(near, self.count).sum(1))

    def __enter__(self) -> ArrowVotes:
        return self

    def __exit__(self, *error: object) -> None:
        self.model.unload()
        if hasattr(self.host, "peft_config"):
            del self.host.peft_config
        for parameter, flag in zip(self.parameters, self.flags, strict=True):
            parameter.requires_grad_(flag)

    @torch.no_grad()
    def scores(self, pieces: Sequence[np.ndarray] | np.ndarray, rows: int) -> np.ndarray:
        """Minus the share of votes, `[N, n]`; pieces of one length."""
        ids = torch.from_numpy(np.asarray(pieces).astype(np.int64))
        found = []
        for batch in ids.split(rows):
            self.votes = []
            self.model(input_ids=batch.to(self.host.device), use_cache=False)
            votes = torch.stack(self.votes).sum(0).float()
            found.append(-(votes / votes.sum(1, keepdim=True)).cpu())
        return torch.cat(found).numpy()
