"""The frozen values that travel between the stages of the flow."""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch

BASE = -1  # the number that stands for no adapter
Fit = Literal["exact", "twin", "either", "general", "other"]


@dataclass(frozen=True)
class Fitted:
    """Which host a part that reads was fitted to.

    Attributes:
        part: such as "gate", "projector" or "expert python".
        fit: `exact`, this very copy of the host; `twin`, other weights of the same architecture and tokenizer;
            `either` of them, where this host's weights cannot be read; `general`, no single host; `other`, a host
            that is neither, which only a part that the caller made and passed can have.
        host_name: of the host that it was fitted to; empty for a general one.
        shared: what this host and that one share, for people.
    """

    part: str
    fit: Fit
    host_name: str = ""
    shared: str = ""

    @property
    def origin(self) -> str:
        """What it was fitted to, such as "fitted to this very copy of smollm2-135m"."""
        name = self.host_name or "a host without a name"
        return {
            "exact": f"fitted to this very copy of {name}",
            "twin": f"fitted to a twin ({name}, other weights of the same {self.shared})",
            "either": f"fitted to this host or a twin ({name}, of the same {self.shared}; no weights to compare)",
            "general": "general, for any host",
            "other": f"fitted to another host ({name})",
        }[self.fit]

    def __str__(self) -> str:
        return f"{self.part}: {self.origin}"


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
class Route:
    """Which expert serves a chunk, and how clearly.

    Attributes:
        expert: its name; None: the base model.
        number: its place in the set; -1: the base model.
        status: `known`; `overlap`: a second expert rebuilds the chunk nearly as well; `unknown`: it looks like the
            texts of none, so the base model serves; `short`: too few tokens to tell, what was before stays.
        reconstruction_nll: under every expert that was scored, nats/token, by name.
        margin: mean log reconstruction NLL of a token (0.01 nats added) under the best other expert minus that under
            this one: 0.1 is a tenth less; below 0 where the best one does not know the chunk. Where the base model
            serves, the lead of the least one; infinite where only one was compared.
    """

    expert: str | None
    number: int
    status: str
    reconstruction_nll: dict[str, float]
    margin: float


@dataclass(frozen=True, eq=False)
class Entries:
    """What stands for one chunk: input embeddings that the host reads like tokens, or key-value pairs of its layers.

    Attributes:
        embeddings: `[n, H]`; None for pairs.
        pairs: how many each layer keeps, which the cache holds; None in a layer that keeps nothing old (sliding
            window). None for embeddings.
        places: of pairs that may have to be moved, each layer's tokens before them in their chunk, `[heads, n]`
            int32; None in a layer that keeps nothing old. None where pairs stay.
    """

    embeddings: torch.Tensor | None = None
    pairs: tuple[int | None, ...] | None = None
    places: tuple[torch.Tensor | None, ...] | None = None

    def __post_init__(self):
        kept = [count for count in self.pairs or () if count is not None]
        count = len(self.embeddings) if self.embeddings is not None else -(-sum(kept) // max(1, len(kept)))
        object.__setattr__(self, "_count", count)  # asked at every step

    def __len__(self) -> int:
        """Number of slots n; of pairs the mean over the layers that keep some, rounded up."""
        return self._count  # pyright: ignore[reportAttributeAccessIssue]


@dataclass(frozen=True, eq=False)
class Chunk:
    """A compressed span of one row.

    Attributes:
        start: first host token of the span, counted from the row's first real token.
        end: host token after the span.
        ids: its crouter ids, int64 on the CPU, `[tokens]`.
        host_ids: its host ids, likewise; the same ones where both share a tokenizer.
        entries: that stand for it; None where it is dropped (or not compressed yet).
        decided_at: tokens of the row that its entries depend on.
        route: the expert that serves it; None without experts (or not decided yet).
    """

    start: int
    end: int
    ids: torch.Tensor
    host_ids: torch.Tensor
    entries: Entries | None = None
    decided_at: int = 0
    route: Route | None = None


@dataclass(frozen=True, eq=False)
class Retrieval:
    """The chunks of a row that stand raw again from some length on.

    Attributes:
        at: tokens of the row when they were chosen; the choice depends on nothing later.
        count: chunks that were compressed then.
        chunks: numbers of the chosen ones, ascending.
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
        end: tokens of the row where it ended in this call, while others go on; what is behind them is padding.
        index: of the chunks, for retrieval; made when first needed, and may lag behind.
        retrievals: what was retrieved in this call, one after the other; the last one is in force.
        routes: the experts that served the raw window in this call; the last one is in force.
        compact: its pairs and the tokens behind them have left their true positions for consecutive ones; it stays so.
    """

    pad: int
    prefix: int | None = None
    chunks: tuple[Chunk, ...] = ()
    pending: Chunk | None = None
    probed: int = 0
    prompt: int = 0
    end: int | None = None
    index: Sized | None = None
    retrievals: tuple[Retrieval, ...] = ()
    routes: tuple[WindowRoute, ...] = ()
    compact: bool = False

    @property
    def retrieved(self) -> tuple[int, ...]:
        """Numbers of the chunks that stand raw again, ascending."""
        return self.retrievals[-1].chunks if self.retrievals else ()

    @property
    def raw_start(self) -> int:
        """First host token of the raw window."""
        return self.chunks[-1].end if self.chunks else self.prefix or 0

    @cached_property
    def pairs_end(self) -> int:
        """Position behind the pairs of a compact row; each chunk takes as many as it has entries."""
        return (self.prefix or 0) + sum(len(chunk.entries) for chunk in self.chunks if chunk.entries is not None)
