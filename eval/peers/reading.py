"""Reading on with a shortened cache: the loss of what follows, or an answer."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from eval.peers.attention import MaskedAttention

DENSE = 512  # places whose logits are held in float32 at once


@dataclass(frozen=True, eq=False)
class Target:
    """How well rows' targets were foretold.

    Attributes:
        loss: `[B]`, nats/token.
        right: `[B]`, tokens that were the greedy choice.
        lines: `[B]`, whole lines all of whose tokens were.
    """

    loss: np.ndarray
    right: np.ndarray
    lines: np.ndarray


def right_lines(right: np.ndarray, lines: np.ndarray) -> np.ndarray:
    """Lines all of whose tokens are right, `[B]`; `right` and the lines' numbers (-1 where none) are `[B, T]`."""
    return np.array([len(np.setdiff1d(line[line >= 0], line[~hit])) for hit, line in zip(right, lines, strict=True)])


@torch.no_grad()
def read_targets(
    model: Any,
    attention: MaskedAttention,
    short: tuple[Any, dict[int, torch.Tensor]],
    read: torch.Tensor,
    lines: np.ndarray,
    position: int,
) -> Target:
    """Reads targets behind a shortened cache, all of their tokens foretold from that.

    Args:
        model: that filled the cache.
        attention: its attention.
        short: the cache and what counts of it; it grows.
        read: `[B, 1 + T]`, the last token of the context, which the cache does not hold, and the target.
        lines: `[B, T]`.
        position: of that last token.
    """
    cache, valid = short
    ids, targets = read[:, :-1], read[:, 1:]
    positions = torch.arange(position, position + ids.shape[1], device=ids.device)[None].expand_as(ids)
    with attention.using(valid):
        logits = model(ids, past_key_values=cache, position_ids=positions, use_cache=True).logits
    losses, right = [], []
    for part, target in zip(logits.flatten(0, 1).split(DENSE), targets.flatten().split(DENSE), strict=True):
        losses.append(F.cross_entropy(part.float(), target, reduction="none"))
        right.append(part.argmax(-1) == target)
    loss = torch.cat(losses).view(targets.shape).mean(1).cpu().numpy()
    hits = torch.cat(right).view(targets.shape).cpu().numpy()
    return Target(loss, hits.sum(1), right_lines(hits, lines))


@torch.no_grad()
def answer(
    model: Any,
    attention: MaskedAttention,
    short: tuple[Any, dict[int, torch.Tensor]],
    last: int,
    position: int,
    most: int,
    stop: Collection[int],
) -> list[int]:
    """Generates greedily behind a shortened cache.

    Args:
        model: that filled the cache.
        attention: its attention.
        short: the cache of one row and what counts of it; it grows.
        last: token of the prompt, which the cache does not hold.
        position: of that token.
        most: tokens to generate.
        stop: tokens that end the answer; not part of it.
    """
    cache, valid = short
    ids: list[int] = []
    with attention.using(valid):
        while len(ids) < most:
            token = torch.tensor([[ids[-1] if ids else last]], device=model.device)
            at = torch.tensor([[position + len(ids)]], device=model.device)
            out = model(token, past_key_values=cache, position_ids=at, use_cache=True)
            best = int(out.logits[0, -1].argmax())
            if best in stop:
                break
            ids.append(best)
    return ids
