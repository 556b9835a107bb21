"""Experts of the known domains, and beside them one adapter trained on all domains in turn and one on all together."""

from __future__ import annotations

import json
import os
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from eval.routing.windows import load_part
from hf_crouter.errors import InputError
from hf_crouter.routing.experts import (
    COMPRESSOR,
    EXPERT_FILE,
    HOST,
    SET_FILE,
    TEXTS_FILE,
    Expert,
    ExpertSet,
    add_expert,
    expert_names,
)
from hf_crouter.training.experts import (
    ExpertArguments,
    ExpertModels,
    HostLoss,
    cut_by_length,
    fit_adapter,
    host_batch,
    join,
    load_models,
    lora,
    measure_cross_scores,
    read_domain,
    save_adapter,
    train_expert,
)
from hf_crouter.training.loop import compiled_layers, make_accelerator, run_loop
from hf_crouter.training.reconstruct import ReconstructionLoss, reconstruction_batch
from hf_crouter.utils.io import temporary_folder_beside, write_json

SMALL, LARGE = 4, 8  # ranks beside the experts': of the crouter's adapter, of the host's


def expert_arguments(args: Namespace) -> ExpertArguments:
    """The training's arguments, without data and set."""
    cuda = torch.cuda.is_available()
    steps, seconds = args.steps, args.seconds
    boxes = {"compressor_steps": steps[0], "host_steps": steps[1]} if steps else {
        "compressor_seconds": seconds[0], "host_seconds": seconds[1]}  # fmt: skip
    options = json.loads(args.options) if args.options else {}
    return ExpertArguments(
        crouter=args.crouter or "", host=args.host, seed=args.seed, bf16=cuda, **{**boxes, **options}
    )


def train(args: Namespace, models: ExpertModels | None = None) -> None:
    """Trains this shard's experts, then its part of the adapters beside them; what is there already is kept."""
    shard, shards = args.shard
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")  # as in measuring: calibrations are of the same arithmetic
    arguments = expert_arguments(args)
    models = models or load_models(arguments)
    record: dict[str, Any] = {}
    for domain in args.domains[shard::shards]:
        folder = args.save / "trained" / f"{shard}of{shards}"
        if not (folder / domain / EXPERT_FILE).exists():
            found = train_expert(domain, replace(arguments, data=str(args.data / domain), experts=str(folder)), models)
            record[domain] = {key: found[key] for key in ("compressor", "host", "held_out")}
            write_json(args.save / f"train.{shard}of{shards}.json", record)
    if args.continual:
        for name in ("sequential", "joint")[shard % 2 :: min(shards, 2)] if shard < 2 else ():
            train_beside(args, arguments, models, name)
    for domain in args.compared[shard::shards]:
        train_compared(args, arguments, models, domain)


def train_beside(args: Namespace, arguments: ExpertArguments, models: ExpertModels, name: str) -> None:
    """One adapter of the host: `sequential`, kept after each domain, or `joint`, of all domains' steps together."""
    folder = args.save / "beside"
    last = folder / (f"{name}{len(args.domains) - 1}" if name == "sequential" else name)
    if last.exists():
        return
    data = [load_part(args.data, domain, "train") for domain in args.domains]
    stages = data if name == "sequential" else [join(data)]
    more = 1 if name == "sequential" else len(args.domains)
    longer = replace(
        arguments,
        host_steps=arguments.host_steps and more * arguments.host_steps,
        host_seconds=arguments.host_seconds and more * arguments.host_seconds,
    )
    accelerator = make_accelerator(longer.settings(HOST, ""))
    options = (longer.host_rank, longer.host_alpha, longer.host_targets)
    with tempfile.TemporaryDirectory() as temporary, lora(models.host, *options) as adapted:
        for number, tokens in enumerate(stages):
            with compiled_layers(models.host, longer.compile):
                run_loop(
                    HostLoss(models.host),
                    lambda index, tokens=tokens: host_batch(tokens, longer, index),
                    longer.settings(HOST, Path(temporary) / str(number)),
                    accelerator,
                    positions_per_sequence=longer.window,
                    title=f"{name} {number}",
                )
            path = folder / (f"{name}{number}" if name == "sequential" else name)
            part = Path(temporary) / f"adapter{number}"
            save_adapter(adapted, part)
            path.mkdir(parents=True, exist_ok=True)
            for file in part.iterdir():
                (path / file.name).write_bytes(file.read_bytes())
            accelerator.free_memory()


def train_compared(args: Namespace, arguments: ExpertArguments, models: ExpertModels, domain: str) -> None:
    """What an expert's parts are compared with: a whole copy of the crouter, adapters of other ranks."""
    if not (args.save / "full" / domain).exists():
        train_full(args, arguments, models, domain)
    tokens, length = load_part(args.data, domain, "train"), models.crouter.config.chunk_length
    accelerator = make_accelerator(arguments.settings(HOST, ""))
    small = replace(arguments, compressor_rank=SMALL, compressor_alpha=2.0 * SMALL)
    large = replace(arguments, host_rank=LARGE, host_alpha=2.0 * LARGE)
    compressor = small.settings(COMPRESSOR, "")
    for part, some, loss, batch, positions in (
        (COMPRESSOR, small, ReconstructionLoss(models.crouter),
         lambda index: reconstruction_batch(tokens, compressor, length, index), length),
        (HOST, large, HostLoss(models.host), lambda index: host_batch(tokens, large, index), large.window),
    ):  # fmt: skip
        path = args.save / "compared" / domain / part
        if path.exists():
            continue
        model = models.crouter if part == COMPRESSOR else models.host
        with temporary_folder_beside(path) as temporary:
            settings = some.settings(part, temporary / "run")
            fit_adapter(loss, model, batch, (some, settings, positions), accelerator, temporary / domain / part)
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(temporary / domain / part, path)


def train_full(args: Namespace, arguments: ExpertArguments, models: ExpertModels, domain: str) -> None:
    """A whole copy of the crouter, trained as long as an adapter of it."""
    accelerator = make_accelerator(arguments.settings(COMPRESSOR, ""))
    before = {key: value.detach().cpu().clone() for key, value in models.crouter.state_dict().items()}
    flags = [parameter.requires_grad for parameter in models.crouter.parameters()]
    tokens, length = load_part(args.data, domain, "train"), models.crouter.config.chunk_length
    models.crouter.requires_grad_(True)
    with tempfile.TemporaryDirectory() as temporary:
        settings = arguments.settings(COMPRESSOR, temporary)
        with compiled_layers(models.crouter, arguments.compile):
            run_loop(
                ReconstructionLoss(models.crouter),
                lambda index: reconstruction_batch(tokens, settings, length, index),
                settings,
                accelerator,
                positions_per_sequence=length,
                title=f"{domain}: whole copy",
            )
    part = args.save / "full" / f".{domain}"
    models.crouter.save_pretrained(part)
    os.replace(part, part.with_name(domain))
    models.crouter.load_state_dict(before)
    for parameter, flag in zip(models.crouter.parameters(), flags, strict=True):
        parameter.requires_grad_(flag)
        parameter.grad = None
    models.crouter.eval()
    accelerator.free_memory()


def merged(save: Path, domains: Sequence[str]) -> ExpertSet:
    """The experts of all shards in the domains' order, added to `save/experts`."""
    folder = save / "experts"
    there = expert_names(folder) if (folder / SET_FILE).exists() else []
    for domain in domains:
        for path in sorted(save.glob(f"trained/*/{domain}")):
            if domain not in there:
                add_expert(folder, path)
                there.append(domain)
    if not there:
        raise InputError(f"{save}: expected trained experts, got none; run the stage `train`")
    return ExpertSet.load(folder)


def ship(args: Namespace) -> None:
    """A set of these domains' experts that holds numbers alone: measured on held-out texts, which stay behind."""
    if args.out.exists():
        raise InputError(f"{args.out}: expected nothing there, got something")
    arguments = expert_arguments(args)
    models = load_models(arguments)
    with temporary_folder_beside(args.out) as temporary:
        for domain in args.domains:
            path = next(iter(sorted(args.save.glob(f"trained/*/{domain}"))), None)
            if path is None:
                raise InputError(f"{args.save}: expected a trained expert {domain}, got none; run the stage `train`")
            held_out = read_domain(args.data / domain, models, args.seed).held_out
            texts = cut_by_length(held_out, models.crouter.config.chunk_length, arguments.calibration_chunks)
            add_expert(temporary / "set", path)
            Expert.load(temporary / "set" / domain).save_description(temporary / "set" / domain, texts)
        measure_cross_scores(temporary / "set", models.crouter, "shipped")
        for domain in args.domains:
            folder = temporary / "set" / domain
            Expert.load(folder).save_description(folder)
            (folder / TEXTS_FILE).unlink()
        os.replace(temporary / "set", args.out)
    print(args.out)
