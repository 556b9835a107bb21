"""What stands in a chunk's slots to compare with: another text's soft prompts, means of token embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch

from hf_crouter import SoftPrompts
from hf_crouter.cache.policy import ContextPolicy, ids_key
from hf_crouter.compressors.projector import Projector
from hf_crouter.errors import InputError
from hf_crouter.types import Chunk, Contribution, Entries, Parts, Row, Setting


@dataclass(frozen=True)
class OtherPrompts:
    """Soft prompts of other chunks: a mode like `SoftPrompts`, of ids that are swapped before they are encoded.

    Attributes:
        others: crouter ids of the chunk shown instead, by `ids_key` of a chunk's own.
        projector: of the host; the one in the crouter's folder by default.
    """

    name: ClassVar[str] = "other_prompts"
    gives: ClassVar[tuple[Contribution, ...]] = ("entries",)
    needs_crouter: ClassVar[bool] = True

    others: dict[bytes, torch.Tensor]
    projector: Projector | None = None

    def bind(self, setting: Setting) -> Parts:
        """See `Mode.bind`."""
        parts = SoftPrompts(self.projector).bind(setting)
        compressor: Any = parts.compressor
        encode = compressor.encode

        def swapped(chunks: Sequence[Chunk]) -> list[Entries]:
            # a chunk without a partner would show its own prompts: an error
            return encode([replace(chunk, ids=self.others[ids_key(chunk.ids)]) for chunk in chunks])

        compressor.encode = swapped
        return parts


def chunk_partners(
    policy: ContextPolicy, rows: np.ndarray, others: np.ndarray, prompt: int
) -> dict[bytes, torch.Tensor]:
    """For every chunk of rows `[D, T]` the one of the same number in the other rows `[D, T]`, by its ids."""
    found = {}
    for row, other in zip(rows, others, strict=True):
        own, theirs = (
            policy.extend(Row(0, prompt=min(prompt, len(ids))), torch.from_numpy(ids.astype(np.int64))).chunks
            for ids in (row, other)
        )
        for n, chunk in enumerate(own):
            found[ids_key(chunk.ids)] = theirs[n % len(theirs)].ids
    return found


@dataclass(frozen=True)
class MeanPool:
    """Means of the host's token embeddings over equal spans of a chunk, as a mode.

    Attributes:
        slots: spans of a chunk.
    """

    name: ClassVar[str] = "mean_pool"
    gives: ClassVar[tuple[Contribution, ...]] = ("entries",)
    needs_crouter: ClassVar[bool] = False

    slots: int = 8

    def bind(self, setting: Setting) -> Parts:
        """See `Mode.bind`."""
        return Parts(compressor=MeanPooler(setting.host, self.slots))


class MeanPooler:
    """Entries of chunks by their host ids; see `Compressor`."""

    beside_raw = True
    ids_decide = True
    reads = False

    def __init__(self, host: Any, slots: int):
        self.host, self.most, self.key = host, slots, ("mean_pool", slots)

    @torch.no_grad()
    def encode(self, chunks: Sequence[Chunk]) -> list[Entries]:
        """One mean a span, `[slots, H]`."""
        embed = self.host.get_input_embeddings()
        found = []
        for chunk in chunks:
            vectors = embed(chunk.host_ids.to(embed.weight.device))
            spans = vectors.float().tensor_split(self.most)
            found.append(Entries(embeddings=torch.stack([span.mean(0) for span in spans]).to(vectors.dtype)))
        return found

    def compress(self, reads: Sequence[Any]) -> list[Entries]:
        """Not asked: ids decide."""
        raise InputError("mean pooling: expected chunks by their ids, got reads")
