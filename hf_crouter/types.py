"""The frozen values that travel between the stages of the flow."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

BASE = -1  # the number that stands for no adapter


@dataclass(frozen=True)
class Chunks:
    """Consecutive spans of one row's host tokens, each as at most `chunk_length` crouter tokens.

    Attributes:
        input_ids: crouter token ids `[N, T]`, int64, right-padded with 0.
        attention_mask: `[N, T]`, int64; 1 where `input_ids` holds a token.
        spans: for each chunk its half-open span `(start, end)` of host tokens in the row.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    spans: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        """Number of chunks N."""
        return len(self.spans)


@dataclass(frozen=True)
class Residuals:
    """How far chunks can be rebuilt from their latents.

    Attributes:
        nats: mean negative log-likelihood of the rebuilt chunk, `[N]`, nats/token.
        accuracy: token reconstruction accuracy (TRA), exact token at exact position, `[N]`, 0 to 1.
        token_reconstruction_nll: the same per position, `[N, T]`, nats; 0 at padding.
    """

    nats: torch.Tensor
    accuracy: torch.Tensor
    token_reconstruction_nll: torch.Tensor


@dataclass(frozen=True)
class Route:
    """Which expert serves a chunk, and how clearly.

    Attributes:
        expert: its name; None: the base model.
        number: its place in the set; -1: the base model.
        verdict: `known`; `overlap`: a second expert rebuilds the chunk nearly as well; `unknown`: it looks like the
            texts of none, so the base model serves; `short`: too few tokens to tell, what was before stays.
        nats: residual under every expert that was scored, nats/token, by name.
        margin: mean log residual of a token (0.01 nats added) under the best other expert minus that under this one:
            0.1 is a tenth less; below 0 where hysteresis keeps it, or where the best one does not know the chunk.
            Where the base model serves, the lead of the least one; infinite where only one was compared.
    """

    expert: str | None
    number: int
    verdict: str
    nats: dict[str, float]
    margin: float


class Chooser(Protocol):
    """Chooses the chunks that come back raw: a pure function of what it is given.

    Attributes:
        query: last tokens that it wants to see.
    """

    query: int

    def __call__(
        self, index: Any, new: Sequence[np.ndarray], recent: np.ndarray
    ) -> tuple[Sized, tuple[int, ...], tuple[dict[str, float], ...]]:
        """The index of all chunks, the numbers of those chosen, ascending, and why: parts of each one's score by name.

        Args:
            index: of the chunks before, as it was given back; None at first.
            new: token ids of the chunks since then, `[tokens]` each.
            recent: last tokens of the row, at most `query`.
        """
        ...


class ChunkRouter(Protocol):
    """Finds the expert of a chunk: a pure function of what it is given.

    Attributes:
        names: of the experts.
        fewest: chunks of fewer tokens are not judged.
    """

    names: tuple[str, ...]
    fewest: int

    def remove(self) -> None:
        """Leaves the crouter as it was."""
        ...

    def reconstruction_nlls(self, pieces: Sequence[torch.Tensor]) -> torch.Tensor:
        """What rebuilding chunks `[tokens]` of crouter ids costs, under every expert and alone, `[N, n + 1, 2]`."""
        ...

    def decide(self, reconstruction_nlls: torch.Tensor, tokens: int, previous: int | None = None) -> Route:
        """The route of one chunk.

        Args:
            reconstruction_nlls: `[n + 1, 2]`; nan where it is too short to judge.
            tokens: its length.
            previous: number of the expert before it in its row, -1 the base model; None where nothing is before.
        """
        ...


@dataclass(frozen=True, eq=False)
class Chunk:
    """A compressed span of one row.

    Attributes:
        start: first host token of the span, counted from the row's first real token.
        end: host token after the span.
        ids: its crouter ids, int64 on the CPU, `[tokens]`.
        soft: soft prompts `[M, H]` on the host's device; None where the chunk is dropped (or not encoded yet).
        route: the expert that serves it; None without experts (or not decided yet).
    """

    start: int
    end: int
    ids: torch.Tensor
    soft: torch.Tensor | None = None
    route: Route | None = None


@dataclass(frozen=True, eq=False)
class Choice:
    """The chunks that a row recalled from some length on.

    Attributes:
        at: tokens of the row when it was made; it depends on nothing later.
        count: chunks that were compressed then.
        chunks: numbers of the recalled ones, ascending.
        scores: why, for each of them: parts of its score by name.
    """

    at: int
    count: int
    chunks: tuple[int, ...]
    scores: tuple[dict[str, float], ...]


@dataclass(frozen=True, eq=False)
class WindowRoute:
    """The expert that serves a row's raw window from some length on.

    Attributes:
        at: tokens of the row when it was decided; it depends on nothing later.
        count: chunks that were compressed then.
        route: the decision on the window's last tokens.
    """

    at: int
    count: int
    route: Route


@dataclass(frozen=True, eq=False)
class Row:
    """What the cache knows of one row; all counts in host tokens.

    Attributes:
        pad: padding columns before the row's first token in `input_ids`.
        prefix: tokens kept raw at the start; None until known.
        chunks: the compressed spans, contiguous, from `prefix` on.
        pending: the next chunk, already cut but still in the raw window.
        probed: tokens after the last chunk up to which a next chunk was looked for.
        prompt: tokens of the call's prompt.
        index: of the chunks, for recall; made when first needed, and may lag behind.
        choices: what was recalled in this call, one after the other; the last one is in force.
        routes: the experts that served the raw window in this call; the last one is in force.
    """

    pad: int
    prefix: int | None = None
    chunks: tuple[Chunk, ...] = ()
    pending: Chunk | None = None
    probed: int = 0
    prompt: int = 0
    index: Sized | None = None
    choices: tuple[Choice, ...] = ()
    routes: tuple[WindowRoute, ...] = ()

    @property
    def retrieved(self) -> tuple[Chunk, ...]:
        """The chunks that stand raw before the window."""
        return tuple(self.chunks[i] for i in self.choices[-1].chunks) if self.choices else ()

    @property
    def raw_start(self) -> int:
        """First host token of the raw window."""
        return self.chunks[-1].end if self.chunks else self.prefix or 0
