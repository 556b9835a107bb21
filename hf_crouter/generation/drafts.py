"""Assisted decoding: drafts end before the layout changes next, so that every draft is judged as if decoded alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..cache.policy import ContextPolicy
from ..types import Row


def trim_drafts(generator: Any, policy: ContextPolicy, row: Callable[[], Row], switch: int | None = None) -> Any:
    """Makes a candidate generator of transformers hold back the drafts after a compaction or retrieval.

    Args:
        generator: its `get_candidates` is replaced on the instance.
        policy: what a row's tokens call for.
        row: state of the one row before the drafts (assisted decoding knows no batches).
        switch: slots beyond which the host rotates by other factors, see `rope_switch`.
    """
    draft = generator.get_candidates

    def get_candidates(input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, Any]:
        ids, logits = draft(input_ids, *args, **kwargs)
        decided, before = input_ids.shape[1], row()
        now = policy.extend(before, ids[0, before.pad : decided])
        allowed, most = 0, min(ids.shape[1], policy.next_retrieval(now, decided - before.pad) + before.pad - 1)
        if switch is not None:
            left = switch - policy.slots(policy.retrieve(now, ids[0, before.pad : decided]), decided - before.pad)
            most = min(most, decided + left) if left >= 0 else most
        while decided + allowed < most:
            later = policy.extend(now, ids[0, before.pad : decided + allowed + 1])
            if len(later.chunks) > len(now.chunks):
                break
            allowed += 1
        if logits is not None:
            logits = logits[:, :allowed] if allowed else None
        return ids[:, : decided + allowed], logits

    generator.get_candidates = get_candidates
    return generator
