"""What a way of reading may contribute, and when it is asked: the door that every mode comes through.

A mode is a frozen dataclass that a user makes (`modes/`). When a history is made, `Mode.bind` turns it into `Parts`:

- `Compressor`: entries in the cache for a chunk that leaves the window. Asked once a chunk, in batches of all rows,
  at the prompt's end and whenever `window` tokens follow a chunk. Made of ids alone (input embeddings), or layer by
  layer of keys, values and queries when the chunk and what follows it is read (key-value pairs, `LayerRead`).
- `ScoreMode`: a change of the scores. Opened once a call, asked at every step.
- `Retriever`: chunks that stand raw again. Asked at the prompt's end, at each compaction and every so many tokens.
- `ChunkRouter` and `Adapters`: the adapter under which slots are read. Asked once a chunk, and for the window.

State. All that a mode knows of a row lives in frozen values: `Chunk.entries`, `Chunk.route`, `Row.retrievals`,
`Row.index`, `Row.routes`. They are functions of the row's decided tokens and of where its prompt ends, so rows of a
batch are independent, beams share values by reference, and a draft that is rolled back never made one. Only entries
cannot be made again from ids at no cost: embeddings are plain tensors there, pairs stand in the cache alone. A
`ScoreState` lives as long as its call and holds nothing that its arguments could not give again.

Axes: `B` rows, `S` slots, `F` tokens of a piece, `N` chunks, `V` vocabulary, `H` hidden size, `D` head size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch

from .values import Chunk, Entries, Fitted, Route, Row

Contribution = Literal["entries", "scores", "chunks", "adapters"]


@dataclass(frozen=True, eq=False)
class LayerRead:
    """What one layer held and asked in a read of rows that are read alike; the piece read is the last `F` slots.

    Attributes:
        layer: its number.
        keys: of all slots, as they stand in the cache (rotated where the host rotates them), `[B, heads, S, D]`.
        values: likewise.
        queries: of the piece, `[B, query heads, F, D]`; they see every slot before it, and it causally.
        scaling: factor on their products with the keys.
        softcap: a product s becomes `softcap * tanh(s / softcap)`; None: it stays.
        sinks: a logit beside the products that takes attention, `[query heads]`; None: there is none.
        chunks: slots `(first, end)` of each leaving chunk of the block before the piece, one behind the other.
        own: likewise of each that the piece itself holds.
    """

    layer: int
    keys: torch.Tensor
    values: torch.Tensor
    queries: torch.Tensor
    scaling: float
    softcap: float | None
    sinks: torch.Tensor | None
    chunks: tuple[tuple[int, int], ...]
    own: tuple[tuple[int, int], ...]


class Pairs(NamedTuple):
    """Key-value pairs that are kept of chunks, one chunk's behind the other's.

    Attributes:
        keys: those of the read at these places, unchanged, so that they can be moved, `[B, heads, n, D]`.
        values: likewise; they may be others.
        places: how many tokens of its chunk are before each, `[B, heads, n]`, an integer type.
        counts: how many are each chunk's.
    """

    keys: torch.Tensor
    values: torch.Tensor
    places: torch.Tensor
    counts: tuple[int, ...]


class Compressor(Protocol):
    """Turns chunks that leave the window into entries; a pure function of what it is given.

    Attributes:
        key: entries are read on only by a history whose compressor has an equal key.
        most: most entries a chunk; the numbers may differ from chunk to chunk. Of pairs the mean over the layers.
        reads: whether it makes pairs while the host reads (`PairCompressor`), beside which every token keeps its
            position while that fits the host; otherwise embeddings (`EmbeddingCompressor`), at consecutive positions.
    """

    key: object
    most: int
    reads: bool


class EmbeddingCompressor(Compressor, Protocol):
    """Makes input embeddings of chunks by their ids alone.

    Attributes:
        beside_raw: whether a chunk's entries are read while the chunk also stands raw.
        ids_decide: whether equal chunks have equal entries, wherever they stand; they are then made once.
    """

    beside_raw: bool
    ids_decide: bool

    def encode(self, chunks: Sequence[Chunk]) -> list[Entries]:
        """Entries of chunks.

        Raises:
            InputError: entries that are not finite.
            MismatchError: ids that the compressor does not know.
        """
        ...


class PairCompressor(Compressor, Protocol):
    """Makes key-value pairs of what the host's layers held and asked when chunks were read.

    Pairs of a chunk that stands raw are not read.

    Attributes:
        most_by_layer: most pairs a chunk in each layer of the host; 0 in one that keeps nothing old.
    """

    most_by_layer: tuple[int, ...]

    def block(self, tokens: int) -> int:
        """Most tokens of leaving chunks that are read at once where so many leave."""
        ...

    def compress(self, read: LayerRead, observed: Any) -> tuple[Pairs | None, Any]:
        """A layer's pairs of `read.chunks`, None without any, and what to know of `read.own`; asked layer by layer.

        Args:
            read: its queries are those of what follows the chunks; of its own chunks they are the chunks' own.
            observed: what this gave second when the chunks themselves were read; None where there are none.
        """
        ...


@runtime_checkable
class Retriever(Protocol):
    """Chooses the chunks that stand raw again: a pure function of what it is given."""

    @property
    def chunks(self) -> int:
        """How many."""
        ...

    @property
    def every(self) -> int:
        """They are chosen anew every so many tokens behind a row's prompt."""
        ...

    @property
    def query(self) -> int:
        """Last tokens of a row that it wants to see."""
        ...

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


class Rescored(Protocol):
    """A host's distribution at N positions with a mode's change."""

    def log_probabilities(self, scores: torch.Tensor) -> torch.Tensor:
        """The whole of it, `[N, V]`, float32, from the host's scores `[N, V]`."""
        ...

    def of(self, targets: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Log-probability of one token a position, `[N]`."""
        ...

    def greedy(self) -> torch.Tensor:
        """The most probable token, `[N]`."""
        ...


class CopiedToken(NamedTuple):
    """A generated token that came from the archive rather than from the host.

    Attributes:
        sequence: of those that came, its number.
        row: of the batch.
        position: tokens of its row before it.
        chunk: number of the chunk that it was copied from.
        source: position in the row of the token that it repeats, or that was rebuilt there; None where places in a
            chunk are not known.
    """

    sequence: int
    row: int
    position: int
    chunk: int
    source: int | None


@dataclass(frozen=True)
class ScoreUse:
    """What a change of the scores brought in a call.

    Attributes:
        copied: every generated token that the change brought rather than the host, sequence after sequence.
        archive_tokens: tokens that could be copied, all rows.
        archive_bytes: bytes of them in main memory, without indexes.
        index_bytes: bytes of the indexes over them.
    """

    copied: tuple[CopiedToken, ...] = ()
    archive_tokens: int = 0
    archive_bytes: int = 0
    index_bytes: int = 0


class CacheView(Protocol):
    """What a change of the scores sees of the cache."""

    @property
    def rows(self) -> tuple[Row, ...]:
        """One a row of the batch."""
        ...

    @property
    def ids(self) -> torch.Tensor:
        """The `input_ids` that its slots stand for, `[B, width]`."""
        ...


class ScoreState(Protocol):
    """A mode's change of the scores in one call. Asked only once something is compressed."""

    def ahead(self, cache: CacheView, input_ids: torch.Tensor) -> None:
        """Called before the host's forward whose scores `step` is given, with what stands there, `[B, T]`.

        What does not depend on the scores can begin here; it may never be asked for.
        """
        ...

    def step(self, cache: CacheView, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores `[B, V]` of the next token; the same object where there is nothing to change.

        Pure: assisted decoding also asks with made-up scores on hypothetical ids. A token at -inf stays there.
        """
        ...

    def rescore(
        self, cache: CacheView, input_ids: torch.Tensor, columns: Sequence[int], scores: torch.Tensor
    ) -> Rescored | None:
        """The same for the tokens in some columns of given ids, row after row, `[B * columns, V]`; None: no change."""
        ...

    def use(self, cache: CacheView, sequences: torch.Tensor, first: int = 0) -> ScoreUse:
        """What it brought, for the report.

        Args:
            cache: of the call.
            sequences: what the call gave, `[sequences, T]`.
            first: column from which on tokens are asked for; those of the prompt came from nowhere.
        """
        ...


@dataclass(frozen=True)
class Opening:
    """What is known of a call when its scores are changed for the first time.

    Attributes:
        vocab_size: V.
        width: columns of the prompt.
        prompts: rows of the prompt; beams and several sequences make more of them.
        archived: columns of each row that are a given text; None: the prompt's.
        same_tokenizer: whether chunks hold the host's own ids.
        grows: whether every step's ids are those of the step before and one more token a row: no beams, no drafts.
    """

    vocab_size: int
    width: int
    prompts: int
    archived: tuple[int, ...] | None = None
    same_tokenizer: bool = True
    grows: bool = False


ScoreMode = Callable[[Opening], ScoreState]


class ChunkRouter(Protocol):
    """Finds the expert of a chunk: a pure function of what it is given."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the experts."""
        ...

    @property
    def fewest(self) -> int:
        """Chunks of fewer tokens are not judged."""
        ...

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


class Adapters(Protocol):
    """Adapters of the host, by number."""

    def using(self, numbers: torch.Tensor | None) -> contextlib.AbstractContextManager[None]:
        """A block in which slots are read under these adapters, `[B, slots]`; None: the plain host."""
        ...

    def activate(self, numbers: torch.Tensor | None) -> None:
        """The same from now on."""
        ...

    def remove(self) -> None:
        """Leaves the host as it was."""
        ...


@dataclass(frozen=True, eq=False)
class Setting:
    """What a history is made of, before its modes.

    Attributes:
        host: the plain host.
        crouter: None where there is none.
        tokenizer: of the host; None where none is known.
        crouter_tokenizer: likewise.
    """

    host: Any
    crouter: Any = None
    tokenizer: Any = None
    crouter_tokenizer: Any = None


@dataclass(frozen=True, eq=False)
class Parts:
    """What a mode contributes to one history; what it leaves out is None.

    Attributes:
        compressor: entries for chunks that leave the window.
        scores: a change of the scores.
        retriever: chunks that stand raw again.
        router: finds the adapter of each chunk.
        adapters: of the host, in the router's order.
        adapters_key: entries made under other adapters are not read on.
        tokenizers: fingerprints of host's and crouter's tokenizer that the mode was made for; empty ones are unknown.
        fitted: which hosts the files that it reads with were fitted to, for the report.
        close: undoes what `bind` did to the models.
    """

    compressor: Compressor | None = None
    scores: ScoreMode | None = None
    retriever: Retriever | None = None
    router: ChunkRouter | None = None
    adapters: Adapters | None = None
    adapters_key: tuple[str, ...] = ()
    tokenizers: tuple[str, str] | None = None
    fitted: tuple[Fitted, ...] = ()
    close: Callable[[], None] | None = field(default=None, repr=False)


@runtime_checkable
class Mode(Protocol):
    """A way to read the past: a frozen dataclass that checks its own options.

    One that may also be chosen by `modes="auto"` has a class method `ready(setting)`: the mode, or None where it would
    not work at once.

    Attributes:
        name: for the command line and for `modes=["name"]`.
        gives: what it contributes; of "entries", "chunks" and "adapters" a history takes one mode each.
    """

    name: ClassVar[str]
    gives: ClassVar[tuple[Contribution, ...]]

    @property
    def needs_crouter(self) -> bool:
        """Whether it can do nothing without a crouter."""
        ...

    def bind(self, setting: Setting) -> Parts:
        """Its parts for one history.

        Raises:
            InputError: something that it needs cannot be read.
            MismatchError: something that it needs was made for another host or crouter.
        """
        ...
