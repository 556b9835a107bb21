"""From a crouter's latents to soft prompts that one host can read."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..chunking import tokenizer_fingerprint
from ..crouter import CRouterModel
from ..crouter.fingerprint import crouter_fingerprint
from ..crouter.loading import crouter_folder
from ..errors import MismatchError
from ..fitting import best_fit, check_fit, difference, in_use
from ..hosts.fingerprint import EMBEDDINGS, host_architecture, host_fingerprint
from ..hosts.unwrap import display_name, unwrap
from ..types import Fitted
from ..utils.module_io import load_weights, read_description, save_module

NAME = "projector"
WEIGHTS, CONFIG = f"{NAME}.safetensors", f"{NAME}.json"


@dataclass(frozen=True)
class ProjectorConfig:
    """What a projector fits and how it was trained.

    Attributes:
        latent_size: width of a latent.
        num_latents: latents a chunk, M.
        host_hidden_size: width of the host's input embeddings, H.
        hidden_size: width of the hidden layer.
        host_name: name for people and for the folder.
        host_fingerprint: of the host's weights.
        crouter_fingerprint: of the crouter's encoder.
        host_architecture: see `hosts.fingerprint.host_architecture`; empty in files of 0.2 and before.
        host_tokenizer: fingerprint; empty where none was known.
        crouter_tokenizer: fingerprint; equal to `host_tokenizer` where both share their ids.
        training: record of the run that made it.
    """

    latent_size: int
    num_latents: int
    host_hidden_size: int
    hidden_size: int
    host_name: str
    host_fingerprint: str
    crouter_fingerprint: str
    host_architecture: str = ""
    host_tokenizer: str = ""
    crouter_tokenizer: str = ""
    training: dict[str, Any] = field(default_factory=dict)


class Projector(nn.Module):
    """Two layers, one offset per latent, and the size of the host's own input embeddings.

    Args:
        config: shapes and origin.
        scale: root mean square of a soft prompt at the start; that of the host's embeddings.
    """

    def __init__(self, config: ProjectorConfig, scale: float = 1.0):
        super().__init__()
        self.config = config
        self.up = nn.Linear(config.latent_size, config.hidden_size)
        self.down = nn.Linear(config.hidden_size, config.host_hidden_size)
        self.offset = nn.Parameter(0.1 * torch.randn(config.num_latents, config.host_hidden_size))
        self.scale = nn.Parameter(torch.tensor(float(scale)))

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents `[..., M, latent_size]` to soft prompts `[..., M, H]`."""
        hidden = self.down(F.gelu(self.up(latents.to(self.up.weight.dtype)))) + self.offset
        return F.rms_norm(hidden, hidden.shape[-1:], eps=1e-6) * self.scale

    def save(self, folder: str | Path, training: dict[str, Any] | None = None) -> None:
        """Writes bfloat16 weights and `projector.json`, each whole or not at all; the JSON, with a checksum, last.

        Args:
            folder: made if missing.
            training: record that replaces the one in the configuration.

        Raises:
            InputError: the disk is full or the folder cannot be written.
        """
        config = self.config if training is None else replace(self.config, training=training)
        save_module(folder, NAME, self, config, torch.bfloat16)

    @classmethod
    def load(cls, folder: str | Path) -> Projector:
        """Reads what `save` wrote; parameters are float32.

        Raises:
            InputError: missing, truncated or altered files.
        """
        config, checksum = _read_config(folder)
        projector = cls(config)
        load_weights(folder, NAME, projector, checksum)
        return projector.eval()

    def check(self, host: Any, crouter: CRouterModel, tokenizer: Any = None) -> Fitted:
        """Whether the host is the one that it was made for or a twin of it; refuses others, and another crouter.

        A twin has embeddings of the same shape, in the same family of hosts, and the same tokenizer.

        Args:
            host: the decoder, wrapped or plain, or its identity (`fitting.HostInUse`).
            crouter: the chunk autoencoder.
            tokenizer: of the host; looked for beside it where it is needed.

        Raises:
            MismatchError: names what was expected and what came.
        """
        name, known = f"projector {self.config.host_name!r}", in_use(host, tokenizer)
        expected, got = self.config.crouter_fingerprint, crouter_fingerprint(crouter)
        if expected != got:
            raise MismatchError(f"{name}: expected the crouter with fingerprint {expected}, got {got}")
        advice = align_command(known.host.name_or_path or "HOST", crouter.name_or_path or "CROUTER")
        return replace(check_fit(name, self.config, known, EMBEDDINGS, advice), part=NAME)


def new_projector(
    host: Any,
    crouter: CRouterModel,
    *,
    hidden_size: int,
    host_tokenizer: Any = None,
    crouter_tokenizer: Any = None,
    host_name: str | None = None,
) -> Projector:
    """An untrained projector for a pair, on the CPU, float32.

    Args:
        host: the decoder, wrapped or plain.
        crouter: the chunk autoencoder.
        hidden_size: width of the hidden layer.
        host_tokenizer: of the host, for its fingerprint.
        crouter_tokenizer: of the crouter, for its fingerprint.
        host_name: name for people; the last part of the host's folder or hub name by default.
    """
    inner = unwrap(host)
    embedding: Any = inner.get_input_embeddings()
    weight = embedding.weight
    rows = torch.linspace(0, weight.shape[0] - 1, min(4096, weight.shape[0])).long().to(weight.device)
    with torch.no_grad():  # through the module: some hosts scale inside it
        scale = embedding(rows).float().pow(2).mean().sqrt().item()
    config = ProjectorConfig(
        latent_size=crouter.config.latent_size,
        num_latents=crouter.config.num_latents,
        host_hidden_size=weight.shape[1],
        hidden_size=hidden_size,
        host_name=host_name or display_name(inner),
        host_fingerprint=host_fingerprint(inner),
        crouter_fingerprint=crouter_fingerprint(crouter),
        host_architecture=host_architecture(inner),
        host_tokenizer=tokenizer_fingerprint(host_tokenizer) if host_tokenizer is not None else "",
        crouter_tokenizer=tokenizer_fingerprint(crouter_tokenizer) if crouter_tokenizer is not None else "",
    )
    return Projector(config, scale)


def find_projector(crouter: CRouterModel, host: Any, name: str | None = None, tokenizer: Any = None) -> Projector:
    """The projector in the crouter's folder (`projectors/*/`) that was made for this crouter and host, or for a twin.

    One that was made for this very copy of the host comes before a twin's.

    Args:
        crouter: loaded from a local folder or from the hub.
        host: the decoder, wrapped or plain, or its identity (`fitting.HostInUse`).
        name: only the one in `projectors/<name>/`.
        tokenizer: of the host; looked for beside it where it is needed.

    Raises:
        MismatchError: there is none; says which command makes it.
        InputError: damaged files.
    """
    source = str(getattr(crouter.config, "_name_or_path", "") or "")
    found = []
    pattern = f"projectors/{name or '*'}/{CONFIG}"
    for path in sorted(crouter_folder(source, "projectors").glob(pattern)) if source else []:
        found.append((path.parent, _read_config(path.parent)[0]))
    known, reads = in_use(host, tokenizer), crouter_fingerprint(crouter)
    own = [(folder, config) for folder, config in found if config.crouter_fingerprint == reads]
    best = best_fit([config for _, config in own], known, EMBEDDINGS)
    if best is not None:
        return Projector.load(own[best][0])
    pair = f"host {known.host_name!r} ({known.host_fingerprint or 'weights out of reach'}) or a twin"
    others = ", ".join(
        f"{c.host_name!r} ({c.host_fingerprint}, crouter {c.crouter_fingerprint}"
        + (f": {difference(c, known, EMBEDDINGS)})" if c.crouter_fingerprint == reads else ")")
        for _, c in found
    )
    raise MismatchError(
        f"projector: expected one for {pair} and crouter {source!r} ({reads}), got {others or 'none'}; "
        f"make it with: {align_command(known.host.name_or_path or 'HOST', source or 'CROUTER')}"
    )


def align_command(host: str, crouter: str) -> str:
    """The command that makes a projector for a pair."""
    return (
        f"hf-crouter align --host {host} --crouter {crouter} --corpus installed-python --output runs/align "
        "--seconds 600 --batch-size 8"
    )


def _read_config(folder: str | Path) -> tuple[ProjectorConfig, str]:
    known = {f.name for f in fields(ProjectorConfig)}
    return read_description(
        folder, NAME, lambda record: ProjectorConfig(**{key: record[key] for key in record.keys() & known})
    )
