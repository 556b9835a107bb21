"""Documents as one flat array of token ids, with windows and chunks that are the same whoever draws them."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from ..errors import InputError
from ..utils.io import replaced_file
from .documents import Document
from .parallel import map_texts

_FORMAT = "hf_crouter.tokens.1"


@dataclass(frozen=True)
class TokenArray:
    """Token ids of documents, one after another, each followed by a separator.

    Attributes:
        ids: `[tokens]`, uint16 or uint32.
        starts: `[documents + 1]`, int64: document d and its separator are `ids[starts[d] : starts[d + 1]]`.
        names: the documents' ids.
        groups: the documents' groups.
        separator_id: the token between documents; it occurs nowhere else.
        vocab_size: ids lie below it.
    """

    ids: np.ndarray
    starts: np.ndarray
    names: tuple[str, ...]
    groups: tuple[str, ...]
    separator_id: int
    vocab_size: int

    def __len__(self) -> int:
        """Number of tokens, separators included."""
        return len(self.ids)

    def documents(self) -> Iterator[tuple[str, str, np.ndarray]]:
        """Yields id, group and token ids `[tokens]` (a view, without separator) of every document."""
        for index, (name, group) in enumerate(zip(self.names, self.groups, strict=True)):
            yield name, group, self.ids[self.starts[index] : self.starts[index + 1] - 1]

    def windows(self, length: int, seed: int, index: int, batch: int) -> np.ndarray:
        """Batch number `index` of random windows, `[batch, length]`, int64; they may cross borders of documents.

        The generator counts instead of remembering: batch `index` is the same in a resumed run and on every machine.

        Args:
            length: tokens in a window.
            seed: of the whole run, 0 or more.
            index: number of the batch, 0 or more.
            batch: windows in it.

        Raises:
            InputError: if there are fewer tokens than one window has.
        """
        if len(self.ids) < length:
            raise InputError(f"windows of {length} tokens need a longer text: there are {len(self.ids)} tokens")
        generator = np.random.Generator(np.random.Philox(key=[seed, index]))
        first = generator.integers(0, len(self.ids) - length, size=batch, endpoint=True)
        return self._gather(first, length)

    def chunks(self, length: int, limit: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Consecutive chunks of every document, none across a border, the last of a document ragged.

        Args:
            length: tokens in a chunk.
            limit: at most so many, evenly spread over the array; all where None.

        Returns:
            ids `[N, length]`, int64, 0 where there is no token; mask `[N, length]`, bool, true at tokens.
        """
        sizes = np.diff(self.starts) - 1
        counts = -(-sizes // length)
        document = np.repeat(np.arange(len(sizes)), counts)
        within = (np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)) * length
        chosen = np.arange(len(document))
        if limit is not None and limit < len(chosen):
            chosen = np.arange(limit) * len(document) // limit
        first = self.starts[document[chosen]] + within[chosen]
        held = np.minimum(sizes[document[chosen]] - within[chosen], length)
        mask = np.arange(length) < held[:, None]
        return np.where(mask, self._gather(first, length), 0), mask

    def document_windows(self, length: int, seed: int = 0, limit: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """One random window of every document that is long enough; documents in random order.

        Args:
            length: tokens in a window.
            seed: of order and positions, 0 or more; a smaller `limit` gives the first of the same windows.
            limit: at most so many documents; all where None.

        Returns:
            windows `[N, length]`, int64, and the documents' indices `[N]`, int64.
        """
        generator = np.random.Generator(np.random.Philox(key=[seed, 0]))
        sizes = np.diff(self.starts) - 1
        positions = generator.random(len(sizes))
        order = generator.permutation(len(sizes))
        order = order[sizes[order] >= length][:limit]
        first = self.starts[order] + (positions[order] * (sizes[order] - length + 1)).astype(np.int64)
        return self._gather(first, length), order.astype(np.int64)

    def _gather(self, first: np.ndarray, length: int) -> np.ndarray:
        at = np.minimum(np.asarray(first)[:, None] + np.arange(length), max(len(self.ids) - 1, 0))
        return self.ids[at].astype(np.int64)

    def save(self, path: str | Path) -> None:
        """Writes everything as one safetensors file, atomically.

        Raises:
            InputError: if it cannot be written.
        """
        names = json.dumps([self.names, self.groups], ensure_ascii=False).encode("utf-8", "surrogatepass")
        metadata = {"format": _FORMAT, "separator_id": str(self.separator_id), "vocab_size": str(self.vocab_size)}
        tensors = {"ids": self.ids, "starts": self.starts, "names": np.frombuffer(names, dtype=np.uint8)}
        with replaced_file(path) as temporary:
            try:
                save_file(tensors, temporary, metadata)
            except SafetensorError as error:
                raise InputError(f"cannot write {path}: {error}") from error

    @classmethod
    def load(cls, path: str | Path) -> TokenArray:
        """Reads what `save` wrote.

        Raises:
            InputError: if the file is missing, truncated, altered or of another kind.
        """
        if not Path(path).is_file():
            raise InputError(f"no such token file: {path}")
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise InputError(f"{path} is no token file: its format is {metadata.get('format')!r}")
                ids, starts = file.get_tensor("ids"), file.get_tensor("starts")
                names, groups = json.loads(file.get_tensor("names").tobytes().decode("utf-8", "surrogatepass"))
            separator, vocab = int(metadata["separator_id"]), int(metadata["vocab_size"])
        except (SafetensorError, ValueError, KeyError, OSError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path} is damaged: prepare the data again ({error})") from error
        array = cls(ids, starts, tuple(names), tuple(groups), separator, vocab)
        if len(starts) != len(names) + 1 or starts[-1] != len(ids) or (len(ids) and int(ids.max()) >= vocab):
            raise InputError(f"{path} is damaged: its ids, documents and vocabulary do not fit each other")
        return array


def select(tokens: TokenArray, documents: np.ndarray) -> TokenArray:
    """The documents of these numbers `[D]`, in this order."""
    pieces = [tokens.ids[tokens.starts[d] : tokens.starts[d + 1]] for d in documents]
    starts = np.cumsum([0, *map(len, pieces)]).astype(np.int64)
    ids = np.concatenate(pieces) if pieces else tokens.ids[:0]
    names, groups = (tuple(values[d] for d in documents) for values in (tokens.names, tokens.groups))
    return TokenArray(ids, starts, names, groups, tokens.separator_id, tokens.vocab_size)


def join(arrays: Sequence[TokenArray]) -> TokenArray:
    """The documents of several arrays of one tokenizer, one after another."""
    first = arrays[0]
    ends = np.cumsum([0, *map(len, arrays)])
    starts = [a.starts[:-1] + end for a, end in zip(arrays, ends[:-1], strict=True)]
    names, groups = (tuple(v for a in arrays for v in getattr(a, key)) for key in ("names", "groups"))
    ids = np.concatenate([a.ids for a in arrays])
    return TokenArray(ids, np.concatenate([*starts, ends[-1:]]), names, groups, first.separator_id, first.vocab_size)


def plain_tokenizer(tokenizer: Any) -> Tokenizer:
    """A copy of the tokenizer that reads text only: names of special tokens inside it are ordinary characters.

    Args:
        tokenizer: a fast tokenizer of transformers, or one of `tokenizers`.

    Raises:
        InputError: if there is no fast tokenizer behind it.
    """
    backend = tokenizer if isinstance(tokenizer, Tokenizer) else getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise InputError(f"expected a fast tokenizer (tokenizer.json), not {type(tokenizer).__name__}")
    copy = Tokenizer.from_str(backend.to_str())
    copy.encode_special_tokens = True
    copy.no_padding()
    copy.no_truncation()
    return copy


def encode_documents(
    documents: Sequence[Document],
    tokenizer: Any,
    *,
    separator_id: int,
    workers: int | None = None,
    advance: Callable[[int, int], None] | None = None,
) -> TokenArray:
    """Encodes documents on all cores.

    Args:
        documents: the documents, in the order that the array keeps.
        tokenizer: a fast tokenizer of transformers, or one of `tokenizers`.
        separator_id: the token put behind every document.
        workers: processes; by default one for each core.
        advance: called with (files, characters) as they are encoded.

    Raises:
        InputError: if the tokenizer is not a fast one, or the separator lies outside its vocabulary.
    """
    plain = plain_tokenizer(tokenizer)
    vocab = plain.get_vocab_size(with_added_tokens=True)
    if not 0 <= separator_id < vocab:
        raise InputError(f"the separator must be one of the tokenizer's {vocab} ids, not {separator_id}")
    kind = np.uint16 if vocab <= 1 << 16 else np.uint32
    pieces: list[np.ndarray] = []
    sizes: list[np.ndarray] = []
    # Processes, not the tokenizer's own threads: those share one cache of words, and their lists become arrays here.
    results = map_texts(
        _encode_batch,
        [document.text for document in documents],
        workers,
        prepare=_prepare_worker,
        arguments=(plain.to_str(), separator_id, kind),
    )
    for first, (ids, lengths) in results:
        pieces.append(ids)
        sizes.append(lengths)
        if advance is not None:
            done = documents[first : first + len(lengths)]
            advance(len(done), sum(len(document.text) for document in done))
    ids = np.concatenate(pieces) if pieces else np.empty(0, dtype=kind)
    starts = np.concatenate([np.zeros(1, dtype=np.int64), *sizes]).cumsum()
    names, groups = tuple(d.id for d in documents), tuple(d.group for d in documents)
    return TokenArray(ids, starts, names, groups, separator_id, vocab)


@dataclass
class _Worker:
    tokenizer: Tokenizer
    separator_id: int
    kind: type


_worker: list[_Worker] = []  # one a process, so that the tokenizer is sent once and not with every batch


def _prepare_worker(tokenizer: str, separator_id: int, kind: type) -> None:
    if multiprocessing.parent_process() is not None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a thread pool in each process would only get in the way
    plain = Tokenizer.from_str(tokenizer)
    plain.encode_special_tokens = True  # not part of the tokenizer's JSON
    _worker[:] = [_Worker(plain, separator_id, kind)]


def _encode_batch(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    worker = _worker[0]
    encodings = worker.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    pieces = [np.array([*encoding.ids, worker.separator_id], worker.kind) for encoding in encodings]
    return np.concatenate(pieces), np.array([len(piece) for piece in pieces], dtype=np.int64)
