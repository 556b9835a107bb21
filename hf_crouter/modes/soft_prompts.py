"""Soft prompts: a crouter's latents of each chunk, projected to what the host reads as input embeddings."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import ClassVar

from ..compressors.projector import Projector, find_projector
from ..compressors.soft_prompts import SoftPromptCompressor
from ..errors import InputError, MismatchError
from ..fitting import HostInUse
from ..hosts.devices import input_device
from ..hosts.families import looks_ids_up
from ..types import Contribution, Parts, Setting


@dataclass(frozen=True)
class SoftPrompts:
    """A few soft prompts stand for each chunk: the gist, at 64 tokens a slot. Needs a crouter and a projector.

    Attributes:
        projector: a folder or a `Projector`; None finds the one in the crouter's folder that was made for this host
            or a twin of it (`hf-crouter align` makes one).

    Example:
        >>> history = CompressedHistory(host, crouter, modes=[SoftPrompts()])
    """

    name: ClassVar[str] = "soft_prompts"
    gives: ClassVar[tuple[Contribution, ...]] = ("entries",)

    projector: str | os.PathLike | Projector | None = None

    @property
    def needs_crouter(self) -> bool:
        """Whether it can do nothing without a crouter."""
        return True

    @classmethod
    def ready(cls, setting: Setting) -> SoftPrompts | None:
        """See `Mode`: with a crouter that has a projector for this host."""
        if setting.crouter is None or looks_ids_up(setting.host):
            return None
        try:
            return cls(find_projector(setting.crouter, HostInUse.of(setting)))
        except MismatchError:
            return None

    def bind(self, setting: Setting) -> Parts:
        """See `Mode.bind`.

        Raises:
            InputError: damaged files, or a host that needs token ids in its layers.
            MismatchError: no projector for this host and crouter.
        """
        if looks_ids_up(setting.host):
            name = type(setting.host).__name__
            raise InputError(
                f"SoftPrompts: expected a host that reads embeddings alone, got {name}, whose layers look ids up too"
            )
        host, given = HostInUse.of(setting), self.projector
        if given is None:
            projector = find_projector(setting.crouter, host)
        else:
            projector = given if isinstance(given, Projector) else Projector.load(os.fspath(given))
        fitted = projector.check(host, setting.crouter)
        device = input_device(setting.host)
        config = projector.config
        return Parts(
            compressor=SoftPromptCompressor(setting.crouter, projector.to(device).eval()),
            tokenizers=(config.host_tokenizer, config.crouter_tokenizer),
            fitted=(fitted,),
        )
