"""Measures how the held-out texts of every expert of a set look to all of them, for `profile`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from ..crouter import CRouterModel
from .adapters import AdapterStack
from .experts import Expert, ExpertSet, Texts
from .profile import Evidence, summary
from .router import token_reconstruction_nll


def measure_evidence(
    set_folder: str | os.PathLike,
    crouter: CRouterModel,
    *,
    rows: int = 4,
    advance: Callable[[int, int, int], None] | None = None,
) -> Evidence:
    """Brings a set's `evidence.safetensors` up to date; what was measured before is kept to the bit.

    Experts that bring no texts keep what was measured of them: those that joined since are not in their profiles.

    Args:
        set_folder: of the set.
        crouter: the shared one, on any device; that it is the experts' own is for `ExpertSet.check` to say.
        rows: texts at once.
        advance: called with passes done, their number, and the tokens of the last one.

    Raises:
        InputError: damaged files, or the set cannot be written.
    """
    experts = list(ExpertSet.load(set_folder))
    weights = {expert.name: expert.compressor.checksum for expert in experts}
    before = Evidence.load(set_folder)
    passes: list[tuple[np.ndarray, np.ndarray, int]] = []  # ids, where to, column
    reconstruction_nlls: dict[str, dict[int, np.ndarray]] = {}
    documents: dict[str, dict[int, np.ndarray]] = {}
    checksums: dict[str, str] = {}
    for expert in experts:
        texts = Texts.load(Path(set_folder) / expert.name)
        earlier = _measured_before(before, weights, expert, texts)
        if texts is not None:
            documents[expert.name], checksums[expert.name] = texts.documents, texts.checksum
        elif before is not None and expert.name in earlier:
            documents[expert.name] = before.documents[expert.name]
            checksums[expert.name] = before.texts.get(expert.name, "")
        else:
            continue
        reconstruction_nlls[expert.name] = {}
        for length, groups in documents[expert.name].items():
            table = np.full((len(groups), len(experts) + 1, 2), np.nan, np.float32)
            for column, name in enumerate([*weights, ""]):
                if name in earlier and length in earlier[name]:
                    table[:, column] = earlier[name][length]
                elif texts is not None:
                    passes.append((texts.ids[length], table[:, column], column))
            reconstruction_nlls[expert.name][length] = table
    for done, (ids, measures, column) in enumerate(passes, 1):
        pieces = list(torch.from_numpy(ids))
        stack = None
        if column < len(experts):
            stack = AdapterStack(crouter, {experts[column].name: experts[column].compressor})
        try:
            measured = token_reconstruction_nll(crouter, pieces, stack, rows=rows)
        finally:
            if stack is not None:
                stack.remove()
        measures[:] = torch.stack([summary(row) for row in measured]).numpy()
        if advance is not None:
            advance(done, len(passes), ids.size)
    evidence = Evidence(weights, checksums, reconstruction_nlls, documents)
    evidence.save(set_folder)
    return evidence


def _measured_before(
    before: Evidence | None, weights: dict[str, str], expert: Expert, texts: Texts | None
) -> dict[str, dict[int, np.ndarray]]:
    """What was measured of an expert's texts: `[N, 2]` by the column's expert ("": the crouter alone) and length."""
    if before is None or before.weights.get(expert.name) != expert.compressor.checksum:
        return {}
    if texts is not None and before.texts.get(expert.name) != texts.checksum:
        return {}  # of other texts
    columns = {name: i for i, name in enumerate(before.weights) if weights.get(name) == before.weights[name]}
    columns[""] = len(before.weights)
    tables = before.reconstruction_nlls.get(expert.name, {})
    return {name: {length: table[:, i] for length, table in tables.items()
                   if np.isfinite(table[:, i]).all()} for name, i in columns.items()}  # fmt: skip
