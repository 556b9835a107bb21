"""The models that experts are trained on, and what their experts must fit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ...chunking import tokenizer_fingerprint
from ...crouter import CRouterModel
from ...crouter.fingerprint import crouter_fingerprint
from ...crouter.loading import load_crouter
from ...errors import InputError
from ...hosts.fingerprint import host_architecture, host_fingerprint
from ...hosts.loading import load_host
from ...hosts.unwrap import display_name
from ...routing.experts import EXPERT_FILE, NAME, SET_FILE, ExpertConfig, ExpertSet, expert_names
from .arguments import ExpertArguments


@dataclass(frozen=True, eq=False)
class ExpertModels:
    """The shared crouter and the host with their tokenizers; several experts may be trained on them in turn."""

    crouter: CRouterModel
    crouter_tokenizer: Any
    host: PreTrainedModel
    host_tokenizer: Any


def load_models(arguments: ExpertArguments) -> ExpertModels:
    """Crouter and host that the arguments name.

    Raises:
        InputError: one of them is missing or damaged.
    """
    if not arguments.host:
        raise InputError("--host: expected a folder or a hub name, got none")
    crouter, crouter_tokenizer = load_crouter(arguments.crouter or None)
    host, host_tokenizer = load_host(arguments.host, dtype=torch.bfloat16 if arguments.bf16 else torch.float32)
    return ExpertModels(crouter, crouter_tokenizer, host, host_tokenizer)


def check_name(name: str, experts: str | Path) -> None:
    """Refuses a name that cannot be added to a set.

    Raises:
        InputError: no name of a folder, taken in the set, or its folder there holds something else.
    """
    if not NAME.fullmatch(name):
        raise InputError(f"expert: expected a name of letters, digits, '.', '_' and '-', not hidden, got {name!r}")
    folder = Path(experts) / name
    if (Path(experts) / SET_FILE).exists() and name in expert_names(experts):
        raise InputError(f"{folder}: expected nothing there, got an expert of this name already")
    if folder.exists() and not (folder / EXPERT_FILE).exists():  # an expert that is not in the set was left half-way
        raise InputError(f"{folder}: expected nothing there, got something else")


def expert_config(models: ExpertModels) -> ExpertConfig:
    """What experts of these models fit."""
    return ExpertConfig(
        crouter_fingerprint(models.crouter, decoder=True),
        tokenizer_fingerprint(models.crouter_tokenizer),
        display_name(models.host),
        host_fingerprint(models.host),
        tokenizer_fingerprint(models.host_tokenizer),
        host_architecture=host_architecture(models.host),
    )


def matching_set(folder: str | Path, config: ExpertConfig) -> ExpertSet:
    """The experts of a set, empty where there is none yet.

    Raises:
        InputError: damaged files.
        MismatchError: experts of another crouter, host or tokenizer.
    """
    experts = ExpertSet.load(folder) if (Path(folder) / SET_FILE).exists() else ExpertSet(())
    experts.check(
        config.crouter_fingerprint,
        config.host_fingerprint,
        crouter_tokenizer=config.crouter_tokenizer,
        host_tokenizer=config.host_tokenizer,
        host_architecture=config.host_architecture,
    )
    return experts
