"""Measured on documents kept out of fitting: an expert's calibration, and a set's experts on each other's texts."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from ...crouter import CRouterModel
from ...data.tokens import TokenArray
from ...routing.adapters import AdapterStack, Lora
from ...routing.calibration import LengthCalibration
from ...routing.experts import COMPRESSOR, HOST, Centroid, Expert, ExpertConfig, Texts
from ...routing.measure import measure_evidence
from ...routing.router import token_reconstruction_nll
from ...types import BASE
from ...utils.batching import padded
from ...utils.progress import Progress
from ..evaluate import reconstruction_score
from .arguments import ExpertArguments
from .domain import Domain, cut
from .models import ExpertModels


def measure_cross_scores(folder: str | Path, crouter: CRouterModel, title: str = "experts") -> None:
    """Measures how the texts of a set's experts look to all of them, with progress.

    Args:
        folder: of the set.
        crouter: the shared one, on the device to compute on.
        title: shown with the progress.
    """
    with Progress() as shown:
        shown.start(f"{title}: among the set's experts", unit="passes", amount="tokens")

        def advance(done: int, passes: int, tokens: int) -> None:
            shown.total = passes
            shown.advance(1, tokens)

        measure_evidence(folder, crouter.eval(), rows=_rows(crouter.device), advance=advance)


def measured_expert(
    folder: Path,
    config: ExpertConfig,
    domain: Domain,
    texts: Texts,
    models: ExpertModels,
    arguments: ExpertArguments,
    record: dict[str, Any],
) -> Expert:
    """The expert whose adapters lie in `folder`, calibrated on the documents kept out of fitting.

    Args:
        folder: named as the expert; holds `compressor/` and `host/`.
        config: what it fits.
        domain: its documents.
        texts: held out, to calibrate on.
        models: on the device to compute on, plain.
        arguments: how many pieces are measured.
        record: gets `held_out`: without and with adapter the reconstruction NLL (called `residual` there, nats/token),
            TRA and the host's loss (nats/token).
    """
    name, crouter, host = folder.name, models.crouter.eval(), models.host.eval()
    compressor, served = Lora.load(folder / COMPRESSOR), Lora.load(folder / HOST)
    length, limit, rows = crouter.config.chunk_length, arguments.calibration_chunks, _rows(crouter.device)
    windows, _ = cut(domain.host_held_out, arguments.window, max(4, limit // 8), 2)
    with Progress() as shown:
        shown.start(f"{name}: calibration", len(texts.ids) + 4, "passes", "tokens")
        stack = AdapterStack(crouter, {name: compressor})
        try:
            reconstruction_nlls = {}
            for size, ids in texts.ids.items():
                nll = token_reconstruction_nll(crouter, list(torch.from_numpy(ids)), stack, rows=rows)
                reconstruction_nlls[size] = [float(row.mean()) for row in nll]
                shown.advance(1, size * len(ids))
            ids, mask = map(torch.from_numpy, domain.held_out.chunks(length, limit))
            base = reconstruction_score(crouter, ids, mask, batch_size=rows)
            shown.advance(1, int(mask.sum()))
            with stack.using([0]):
                adapted = reconstruction_score(crouter, ids, mask, batch_size=rows)
            shown.advance(1, int(mask.sum()))
        finally:
            stack.remove()
        stack = AdapterStack(host, {name: served})
        try:
            losses = []
            for number in (BASE, 0):
                nll, counts = host_nll(host, windows, stack, [number] * len(windows), rows=arguments.host_batch_size)
                losses.append(float(nll.sum() / counts.sum()))
                shown.advance(1, int(counts.sum()))
        finally:
            stack.remove()
        centroid = Centroid.fit(chunk_latents(crouter, domain.train, limit, rows))
        documents = len(domain.held_out.names)
        calibration = LengthCalibration.fit(
            reconstruction_nlls, documents, config.crouter_fingerprint, compressor.checksum
        )
    record["held_out"] = {
        "documents": documents,
        "chunks": base.chunks,
        "residual": {"base": base.reconstruction_nll, "adapter": adapted.reconstruction_nll},
        "tra": {"base": base.accuracy, "adapter": adapted.accuracy},
        "host_tokens": int(counts.sum()),
        "host_loss": {"base": losses[0], "adapter": losses[1]},
    }
    described = ExpertConfig(**{**vars(config), "training": record})
    return Expert(name, compressor, served, calibration, described, centroid)


@torch.no_grad()
def chunk_latents(crouter: CRouterModel, tokens: TokenArray, limit: int, rows: int) -> torch.Tensor:
    """Latents of training chunks without any adapter, `[N, M, latent_size]`.

    Whole chunks, as a router is asked of; those of short documents lie elsewhere. Shorter ones where there are no two.
    """
    length = crouter.config.chunk_length
    pieces, _ = cut(tokens, length, limit, length)
    if len(pieces) < 2:
        pieces, _ = cut(tokens, length, limit, 1)
    ids, mask = padded(pieces, crouter.device)
    batches = zip(ids.split(rows), mask.split(rows), strict=True)
    return torch.cat([crouter.encode(*batch).cpu() for batch in batches])


def _rows(device: torch.device) -> int:
    return 4 if device.type == "cpu" else 64


@torch.no_grad()
def host_nll(
    host: PreTrainedModel,
    pieces: Sequence[torch.Tensor],
    stack: AdapterStack | None = None,
    numbers: Sequence[int] | None = None,
    *,
    rows: int = 4,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a host's next-token prediction costs on texts that it reads from their start.

    Args:
        host: on any device.
        pieces: host token ids, 1-D; the first token of each is not predicted.
        stack: adapters of the host.
        numbers: which of them serves each text; `BASE` for none.
        rows: texts at once.

    Returns:
        Nats of each text and its number of predicted tokens, float64 `[N]` each.
    """
    embedding: Any = host.get_input_embeddings()
    device, totals = embedding.weight.device, []
    for start in range(0, len(pieces), rows):
        ids, mask = padded(pieces[start : start + rows], device)  # padded behind the text: nothing sees it
        chosen = contextlib.nullcontext()
        if stack is not None and numbers is not None:
            chosen = stack.using(numbers[start : start + rows])
        with chosen:
            logits: Any = host(input_ids=ids, use_cache=False).logits[:, :-1]
        nll = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        totals.append((nll.view(mask[:, 1:].shape) * mask[:, 1:]).sum(1).double().cpu())
    counts = torch.tensor([max(0, len(piece) - 1) for piece in pieces], dtype=torch.float64)
    return torch.cat(totals) if totals else counts, counts
