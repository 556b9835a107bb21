"""A crouter's latents of each chunk, projected: entries that the host reads like tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..crouter import CRouterModel
from ..types import Chunk, Entries
from ..utils.batching import check_ids, padded
from .projector import Projector


class SoftPromptCompressor:
    """Entries of chunks by their crouter ids alone; see `EmbeddingCompressor`.

    Args:
        crouter: encodes the chunks.
        projector: of this crouter and the host, on the host's device.
    """

    beside_raw = True
    ids_decide = True
    reads = False

    def __init__(self, crouter: CRouterModel, projector: Projector):
        self.crouter, self.projector = crouter, projector
        self.most: int = projector.config.num_latents
        self.key: object = projector.config  # it names the crouter

    @torch.no_grad()
    def encode(self, chunks: Sequence[Chunk]) -> list[Entries]:
        """One soft prompt a latent, `[M, H]`.

        Raises:
            MismatchError: ids outside the crouter's vocabulary.
        """
        crouter: Any = self.crouter
        ids, mask = padded([chunk.ids for chunk in chunks])
        check_ids([ids], crouter.config.vocab_size)
        latents = crouter.encode(ids.to(crouter.device), None if mask.all() else mask.to(crouter.device))
        return [Entries(embeddings=prompts) for prompts in self.projector(latents.to(self.projector.scale.device))]
