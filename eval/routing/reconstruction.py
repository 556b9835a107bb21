"""What rebuilding costs each expert on all texts of the routing measurement: the step that wants an accelerator.

Everything that is decided from it is computed by `decide`, on any machine and as often as a rule changes.
Axes: `N` pieces, `n` experts, `T` tokens; the last of `n + 1` is the crouter alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from eval.routing.setting import Arrays, Setting
from hf_crouter.data.tokens import TokenArray
from hf_crouter.routing.adapters import AdapterStack
from hf_crouter.routing.experts import ExpertSet
from hf_crouter.routing.profile import Evidence, summary
from hf_crouter.routing.router import token_reconstruction_nll
from hf_crouter.training.experts import cut_by_length


def nll_of_pieces(crouter: Any, experts: ExpertSet, pieces: np.ndarray, rows: int, alone: bool = True) -> np.ndarray:
    """What rebuilding each token costs under each expert, `[N, n, T]` for pieces `[N, T]`, float32.

    Args:
        crouter: the shared one.
        experts: the set.
        pieces: token ids.
        rows: pieces at once.
        alone: also, last, under the crouter without any adapter: `[N, n + 1, T]`.
    """
    tensors = [torch.from_numpy(piece.astype(np.int64)) for piece in pieces]
    found = []
    for expert in experts:
        stack = AdapterStack(crouter, {expert.name: expert.compressor})
        try:
            found.append(torch.stack(token_reconstruction_nll(crouter, tensors, stack, rows=rows)).numpy())
        finally:
            stack.remove()
    if alone:
        found.append(torch.stack(token_reconstruction_nll(crouter, tensors, rows=rows)).numpy())
    return np.stack(found, axis=1)


def measure_reconstruction(
    crouter: Any, experts: ExpertSet, held_out: Mapping[str, TokenArray], setting: Setting
) -> Arrays:
    """Reconstruction NLL of all texts: of tokens where their positions matter, else of pieces, `[N, n + 1(, T)]`.

    Args:
        crouter: the shared one.
        experts: the set.
        held_out: what each expert was calibrated on.
        setting: the texts.

    Returns:
        float16 tokens `chunk`, `own.chunk` (calibration pieces) and those of `bordered`; float32 summaries `[..., 2]`
        (`profile.summary`) `span`, `own.span`, `changing` (chunks of documents, one after another),
        `held_out.NAME.LENGTH` with `.documents`; `own.*.domain`.
    """
    found: Arrays = {}

    def tokens(name: str, pieces: np.ndarray) -> None:
        found[name] = nll_of_pieces(crouter, experts, pieces, setting.rows).astype(np.float16)

    def summaries(name: str, pieces: np.ndarray) -> None:
        found[name] = summary(torch.from_numpy(nll_of_pieces(crouter, experts, pieces, setting.rows))).numpy()

    tokens("chunk", setting.chunks)
    summaries("span", setting.spans)
    for name, length, keep in (("chunk", setting.chunk, tokens), ("span", setting.span, summaries)):
        pieces, found[f"own.{name}.domain"], _ = setting.own_pieces(length)
        keep(f"own.{name}", pieces)
    for name, pieces in setting.bordered().items():
        tokens(name, pieces)
    documents = setting.changing().ids
    whole = documents[:, : documents.shape[1] // setting.chunk * setting.chunk]
    summaries("changing", whole.reshape(-1, setting.chunk))
    for name, array in held_out.items():
        texts = cut_by_length(array, setting.chunk, setting.limit)
        for length, pieces in texts.ids.items():
            summaries(f"held_out.{name}.{length}", pieces)
            found[f"held_out.{name}.{length}.documents"] = texts.documents[length]
    # An expert of a set of one and of a set of all computes the same bits.
    alone = nll_of_pieces(crouter, ExpertSet(experts.experts[:1]), setting.chunks[:8], setting.rows, alone=False)
    both = nll_of_pieces(crouter, experts, setting.chunks[:8], setting.rows)
    found["added.bit_difference"] = np.array([np.abs(alone[:, 0] - both[:, 0]).max()])
    return found


def evidence_of(measured: Arrays, experts: ExpertSet) -> Evidence:
    """What `measure_reconstruction` found of the experts' held-out texts, for their profiles."""
    reconstruction_nlls: dict[str, dict[int, np.ndarray]] = {name: {} for name in experts.names}
    documents: dict[str, dict[int, np.ndarray]] = {name: {} for name in experts.names}
    for key in measured:
        if key.startswith("held_out.") and not key.endswith(".documents"):
            name, _, length = key.removeprefix("held_out.").rpartition(".")
            reconstruction_nlls[name][int(length)] = measured[key]
            documents[name][int(length)] = measured[f"{key}.documents"]
    return Evidence({e.name: e.compressor.checksum for e in experts}, {}, reconstruction_nlls, documents)
