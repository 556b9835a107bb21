"""Stage 3: trains an expert for a domain: an adapter of the shared crouter, one of the host, and their calibration.

The models that the adapters are trained on come back as they were, to the bit. What is measured on documents kept out
of fitting is measured with the adapters as written.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ...errors import InputError
from ...hosts.positions import max_positions
from ...routing.experts import COMPRESSOR, HOST, add_expert
from ..flops import matrix_flops_per_token, measured_matrix_rate
from ..loop import device_name, make_accelerator
from ..reconstruct import ReconstructionLoss, reconstruction_batch
from .arguments import PARTS, ExpertArguments
from .domain import cut, cut_by_length, host_batch, read_domain
from .lora import HostLoss, fit_adapter
from .measure import measure_cross_scores, measured_expert
from .models import ExpertModels, check_name, expert_config, load_models, matching_set


def train_expert(name: str, arguments: ExpertArguments, models: ExpertModels | None = None) -> dict[str, Any]:
    """Trains both adapters of a domain, calibrates them, adds the expert to the set and returns the record.

    The set is touched only at the end. By the first of several processes alone: calibration, set and the record's
    `held_out`.

    Args:
        name: the expert's, new in the set.
        arguments: the data is prepared.
        models: where several experts are trained in turn; loaded by default. On return they are as they were, but on
            the training's device.

    Raises:
        InputError: a name that is taken or none, no data, or data and models that do not fit each other.
        MismatchError: the set's experts were made for another crouter, host or tokenizer.
    """
    arguments.check()
    check_name(name, arguments.experts)
    models = models or load_models(arguments)
    config = expert_config(models)
    matching_set(arguments.experts, config)
    domain = read_domain(arguments.data, models, arguments.seed)
    length = models.crouter.config.chunk_length
    positions = max_positions(models.host)
    if positions and arguments.window > positions:
        raise InputError(f"--window: expected at most the host's {positions} positions, got {arguments.window}")
    texts = cut_by_length(domain.held_out, length, arguments.calibration_chunks)  # too short is said now
    if len(cut(domain.train, length, 2, 1)[0]) < 2:
        raise InputError(f"{arguments.data}: expected at least 2 chunks of {length} tokens to train on, got fewer")
    accelerator = make_accelerator(arguments.settings(HOST, ""))
    record: dict[str, Any] = {
        "stage": "expert",
        "arguments": {k: v for k, v in asdict(arguments).items() if k not in ("data", "crouter", "host", "experts")},
        "documents": len(domain.train.names),
        "torch": torch.__version__,
        "device": device_name(accelerator.device),
    }
    with tempfile.TemporaryDirectory(prefix="expert-") as temporary:
        folder = Path(temporary) / name
        compressor, host = (arguments.settings(part, Path(temporary) / "runs" / part) for part in PARTS)
        record[COMPRESSOR] = fit_adapter(
            ReconstructionLoss(models.crouter),
            models.crouter,
            lambda index: reconstruction_batch(domain.train, compressor, length, index),
            (arguments, compressor, length),
            accelerator,
            folder / COMPRESSOR,
        )
        if accelerator.device.type == "cuda":
            rate = record[COMPRESSOR]["tokens_per_second"] / accelerator.num_processes
            # backward makes no gradients of the frozen matrices
            flops = matrix_flops_per_token(models.crouter.config) * 2 / 3 * rate
            record[COMPRESSOR]["mfu"] = flops / measured_matrix_rate(accelerator.device)
        record[HOST] = fit_adapter(
            HostLoss(models.host),
            models.host,
            lambda index: host_batch(domain.host_train, arguments, index),
            (arguments, host, arguments.window),
            accelerator,
            folder / HOST,
        )
        if accelerator.is_main_process:
            expert = measured_expert(folder, config, domain, texts, models, arguments, record)
            expert.save_description(folder, texts if arguments.keep_texts else None)
            add_expert(arguments.experts, folder)
            measure_cross_scores(arguments.experts, models.crouter, name)
    accelerator.wait_for_everyone()  # and no more: the next expert is trained by the same processes
    return {"path": str(Path(arguments.experts) / name), **record}
