"""The figures of every document, arm and chunk count, and what gates are fitted on."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from eval.hgr.arms import ARMS, GREEDY, SOURCES, Arm, archive_of
from eval.hgr.reader import Block, DocumentReader
from hf_crouter.training.gate import mixture_log_likelihood


def record_places(reader: DocumentReader, block: Block, count: int) -> dict[str, np.ndarray]:
    """What the gates are fitted on, `<gate>.{features,available,copied,host}`, each `[D, target, ...]`."""
    layout, out = reader.layout, {}
    for arm in ARMS.values():
        keys = [(key, archive) for key, archive, gate in arm.readings if key in SOURCES]
        if not keys or not arm.exists(layout, count):
            continue
        for documents, places in reader.forward(block, arm, count, reader.wanted(block, arm, count)):
            for key, archive in keys:
                kind = archive_of(arm, archive)
                candidates = block.candidates(documents, count, kind, layout.target, reader.device)
                features, available, copied = places.beside(candidates)
                values = {"features": features.half(), "available": available, "copied": copied, "host": places.host}
                for name, value in values.items():
                    part = value.unflatten(0, (len(documents), layout.target)).cpu().numpy()
                    out.setdefault(f"{key}.{name}", []).append(part)
    return {name: np.concatenate(parts) for name, parts in out.items()}


def measure(
    reader: DocumentReader,
    block: Block,
    counts: Sequence[int],
    gates: dict[str, nn.Module],
    oracle: Sequence[int] = (),
    arms: Sequence[str] = tuple(ARMS),
) -> dict[str, np.ndarray]:
    """Figures of every document, `[D]` each: `n<k>.<arm>`, loss in nats/token; `.right`, greedy accuracy, and more.

    Args:
        reader: the host.
        block: the documents.
        counts: of chunks.
        gates: by name.
        oracle: documents of the block whose every pair of chunks is tried.
        arms: what is read.
    """
    layout, size = reader.layout, len(block.rows)
    out: dict[str, np.ndarray] = {}

    def put(key: str, documents: Sequence[int], places: torch.Tensor) -> None:
        values = places.float().unflatten(0, (len(documents), layout.target)).mean(1).cpu().numpy()
        out.setdefault(key, np.full(size, np.nan, np.float32))[list(documents)] = values

    for name, count in itertools.product(arms, counts):
        arm = ARMS[name]
        if not arm.exists(layout, count) or (name == "window" and count != counts[0]):
            continue
        here = counts if name == "window" else [count]  # the window does not depend on how much is older
        wanted = reader.wanted(block, arm, count)
        for documents, places in reader.forward(block, arm, count, wanted):
            right = (places.token == places.targets).float()
            for n in here:
                put(f"n{n}.{name}", documents, -places.host)
                if name in GREEDY:
                    put(f"n{n}.{name}.right", documents, right)
                for archive, keys in itertools.groupby(arm.readings, key=lambda reading: reading[1]):
                    kind = archive_of(arm, archive)
                    candidates = block.candidates(documents, n, kind, layout.target, reader.device)
                    seen = places.beside(candidates)
                    for key, _, gate in keys:
                        put(f"n{n}.{key}", documents, -mixture_log_likelihood(gates[gate], *seen, places.host))
                        if key in GREEDY and n == max(counts):
                            token = places.greedy(candidates, gates[gate](seen[0], seen[1]))
                            put(f"n{n}.{key}.right", documents, (token == places.targets).float())
        if arm.retrieve:
            out[f"n{count}.{name}.chunks"] = np.array([chunks for _, chunks in wanted], np.int16)
    for count in counts:
        if "window" in arms:  # not of arms that are measured beside the others
            out[f"n{count}.tra"] = block.tra[:, -count:].mean(1).astype(np.float32)
        if len(oracle) and count > layout.retrieved:
            out |= best_pairs(reader, block, count, gates["retrieve2_bm25_copy_fitted"], oracle)
    return out


def single_losses(
    reader: DocumentReader, block: Block, count: int, gate: nn.Module, wanted: Sequence[tuple[int, tuple[int, ...]]]
) -> np.ndarray:
    """Losses without and with copying, `[len(wanted), 2]`, of documents that retrieve given chunks."""
    layout, parts = reader.layout, []
    arm = Arm(retrieve="given") if wanted[0][1] else Arm()
    for documents, places in reader.forward(block, arm, count, wanted):
        seen = places.beside(block.candidates(documents, count, "", layout.target, reader.device))
        both = torch.stack([-places.host, -mixture_log_likelihood(gate, *seen, places.host)], dim=1)
        parts.append(both.unflatten(0, (len(documents), layout.target)).mean(1).cpu().numpy())
    return np.concatenate(parts)


def best_pairs(
    reader: DocumentReader, block: Block, count: int, gate: nn.Module, oracle: Sequence[int]
) -> dict[str, np.ndarray]:
    """The least loss of any pair of chunks, and the pair: `retrieve2_oracle`, with copying its `_copy_fitted`."""
    layout = reader.layout
    pairs = list(itertools.combinations(range(layout.chunks - count, layout.chunks), layout.retrieved))
    wanted = [(i, pair) for pair in pairs for i in oracle]
    losses = single_losses(reader, block, count, gate, wanted).reshape(len(pairs), len(oracle), 2).swapaxes(0, 1)
    out = {}
    for column, key in enumerate(("retrieve2_oracle", "retrieve2_oracle_copy_fitted")):
        out[f"n{count}.{key}"] = np.full(len(block.rows), np.nan, np.float32)
        out[f"n{count}.{key}"][list(oracle)] = losses[:, :, column].min(1)
        out[f"n{count}.{key}.chunks"] = np.full((len(block.rows), layout.retrieved), -1, np.int16)
        out[f"n{count}.{key}.chunks"][list(oracle)] = np.array(pairs)[losses[:, :, column].argmin(1)]
    return out
