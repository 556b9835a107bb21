"""What a crouter's decoder rebuilds of chunks, in the host's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..crouter import CRouterModel
from ..types import Chunk
from ..utils.batching import padded

BATCH = 4  # chunks rebuilt at once


class Rebuilder:
    """What a crouter's decoder rebuilds of chunks from their latents alone, in the host's tokens.

    Args:
        crouter: encodes and rebuilds.
        tokenizers: those of crouter and host where they differ; None where both share their ids.
    """

    def __init__(self, crouter: CRouterModel, tokenizers: tuple[Any, Any] | None = None):
        self.crouter, self.tokenizers = crouter, tokenizers
        self.aligned = tokenizers is None  # what is rebuilt stands token for token where it stood

    @torch.no_grad()
    def __call__(self, chunks: Sequence[Chunk]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Ids `[tokens]` and confidence `[tokens]`, 0 to 1, for each chunk."""
        pieces = []
        for first in range(0, len(chunks), BATCH):
            batch = [chunk.ids for chunk in chunks[first : first + BATCH]]
            ids, mask = padded(batch)
            device = self.crouter.device
            rebuilt = self.crouter.reconstruct(self.crouter.encode(ids.to(device), mask.to(device)))
            for row, piece in enumerate(batch):
                tokens = rebuilt.input_ids[row, : len(piece)].cpu().numpy()  # pyright: ignore
                confidence = rebuilt.confidence[row, : len(piece)].float().cpu().numpy()  # pyright: ignore
                pieces.append(self._in_host_tokens(tokens, confidence))
        return pieces

    def _in_host_tokens(self, tokens: np.ndarray, confidence: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if self.tokenizers is None:
            return tokens, confidence
        own, host = self.tokenizers
        text = own.decode(tokens.tolist(), clean_up_tokenization_spaces=False)
        ids = np.array(host.encode(text, add_special_tokens=False), np.int64)
        return ids, np.full(len(ids), confidence.mean() if len(confidence) else 0.0)
