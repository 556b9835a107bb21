"""Token ids of a host to chunks of at most `chunk_length` crouter tokens.

A chunk depends only on the ids from its first token on, never on how much of the text was there when it was cut: so a
prompt read at once and the same text generated token by token give the same chunks.
"""

from __future__ import annotations

import bisect
import hashlib
import json
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from .errors import InputError
from .types import Chunks

REPLACEMENT = "\ufffd"  # what a tokenizer decodes an incomplete character to


class Chunker(Protocol):
    """Cuts a row of host tokens.

    Attributes:
        same_tokenizer: host and crouter share their token ids.
        chunk_length: most crouter tokens a chunk, T.
        step: another chunk can only become known each `step` host tokens after the chunk's start.
    """

    same_tokenizer: bool
    chunk_length: int
    step: int

    def next_chunk(self, ids: Sequence[int], start: int, final: bool = False) -> tuple[int, list[int]] | None:
        """The chunk that begins at host token `start`.

        Args:
            ids: host token ids of one row, without padding.
            start: first host token of the chunk.
            final: no more text will come: the last chunk may be ragged.

        Returns:
            The host token after the chunk and its crouter ids, 1 to T; None where `ids` are too few to tell.

        Raises:
            InputError: a single host token is longer than a chunk.
        """
        ...

    def chunk(self, ids: Sequence[int], start: int = 0, limit: int | None = None, final: bool = False) -> Chunks:
        """All chunks from `start` on, at most `limit`; with `final` the ragged tail as well."""
        ...


class _Chunker:
    chunk_length: int

    def next_chunk(self, ids: Sequence[int], start: int, final: bool = False) -> tuple[int, list[int]] | None:
        raise NotImplementedError

    def chunk(self, ids: Sequence[int], start: int = 0, limit: int | None = None, final: bool = False) -> Chunks:
        """All chunks from `start` on, at most `limit`; with `final` the ragged tail as well."""
        spans, pieces = [], []
        while limit is None or len(spans) < limit:
            found = self.next_chunk(ids, start, final)
            if found is None:
                break
            spans.append((start, found[0]))
            pieces.append(found[1])
            start = found[0]
        input_ids = torch.zeros(len(spans), self.chunk_length, dtype=torch.long)
        mask = torch.zeros_like(input_ids)
        for row, piece in enumerate(pieces):
            input_ids[row, : len(piece)] = torch.tensor(piece)
            mask[row, : len(piece)] = 1
        return Chunks(input_ids, mask, tuple(spans))


class SameTokenizerChunker(_Chunker):
    """Spans of exactly `chunk_length` host tokens, which are crouter tokens."""

    same_tokenizer = True

    def __init__(self, chunk_length: int):
        self.chunk_length = self.step = chunk_length

    def next_chunk(self, ids: Sequence[int], start: int, final: bool = False) -> tuple[int, list[int]] | None:
        """See `Chunker.next_chunk`."""
        end = min(start + self.chunk_length, len(ids))
        if end == start or (end < start + self.chunk_length and not final):
            return None
        return end, [int(i) for i in ids[start:end]]


class CrossTokenizerChunker(_Chunker):
    """A whole number of host tokens that covers the text of at most `chunk_length` crouter tokens.

    The text after `step`, `2 * step`, ... host tokens is encoded until it holds more than a chunk; the character at
    which the crouter's T-th token ends decides, and the chunk is encoded once more alone to be sure. A chunk never
    ends inside a character of several bytes.

    Args:
        host_tokenizer: decodes the host's ids.
        crouter_tokenizer: a fast tokenizer.
        chunk_length: crouter tokens a chunk, T.

    Raises:
        InputError: the crouter's tokenizer gives no character offsets.
    """

    same_tokenizer = False

    def __init__(self, host_tokenizer: Any, crouter_tokenizer: Any, chunk_length: int):
        if not getattr(crouter_tokenizer, "is_fast", False):
            raise InputError("crouter's tokenizer: expected a fast one (with character offsets), got a slow one")
        self.host_tokenizer, self.crouter_tokenizer = host_tokenizer, crouter_tokenizer
        self.chunk_length, self.step = chunk_length, max(1, chunk_length // 8)
        # Some decoders drop the space before the first word: decode behind an anchor that is then cut off.
        anchor = host_tokenizer.encode("a", add_special_tokens=False)
        self.anchor = anchor if self._decode(anchor) == "a" else []

    def next_chunk(self, ids: Sequence[int], start: int, final: bool = False) -> tuple[int, list[int]] | None:
        """See `Chunker.next_chunk`."""
        available = len(ids) - start
        if available <= 0:
            return None
        for taken in range(self.step, available + 1, self.step):
            text = self.text(ids, start, start + taken)
            offsets = self._offsets(text)
            # one more than fits, and not the text's last token, which later characters could still change
            if len(offsets) > self.chunk_length + 1:
                return self._cut(ids, start, start + taken, offsets[self.chunk_length - 1][1])
        if not final:
            return None
        text = self.text(ids, start, len(ids))
        offsets = self._offsets(text)
        if len(offsets) > self.chunk_length:
            return self._cut(ids, start, len(ids), offsets[self.chunk_length - 1][1])
        return len(ids), self._encode(text)

    def text(self, ids: Sequence[int], start: int, end: int) -> str:
        """Text of the host tokens `[start, end)`."""
        text = self._decode([*self.anchor, *(int(i) for i in ids[start:end])])
        return text[1:] if self.anchor else text

    def _cut(self, ids: Sequence[int], start: int, stop: int, characters: int) -> tuple[int, list[int]]:
        """The most host tokens within the first `characters` that re-encode to at most a chunk."""
        lengths = range(start + 1, stop + 1)
        count = bisect.bisect_right(lengths, characters, key=lambda end: len(self.text(ids, start, end)))
        fitting = []
        for end in range(start + count, start, -1):
            text = self.text(ids, start, end)
            encoded = self._encode(text)
            if len(encoded) <= self.chunk_length:
                if not text.endswith(REPLACEMENT):
                    return end, encoded
                fitting.append((end, encoded))  # undecodable bytes may truly stand there
                if len(fitting) == 8:
                    break
        if not fitting:
            raise InputError(
                f"chunking: expected host tokens of at most {self.chunk_length} crouter tokens, "
                f"got a longer one (id {int(ids[start])} at {start})"
            )
        return fitting[0]

    def _decode(self, ids: list[int]) -> str:
        return self.host_tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _encode(self, text: str) -> list[int]:
        return self.crouter_tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] or [0]

    def _offsets(self, text: str) -> list[tuple[int, int]]:
        encoded = self.crouter_tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return encoded["offset_mapping"]


def make_chunker(chunk_length: int, host_tokenizer: Any = None, crouter_tokenizer: Any = None) -> Chunker:
    """The chunker for a pair of tokenizers; equal ones, or none at all, share their token ids.

    Args:
        chunk_length: crouter tokens a chunk, T.
        host_tokenizer: of the host.
        crouter_tokenizer: of the crouter.

    Raises:
        InputError: only one of two tokenizers is known, or the crouter's is slow and differs from the host's.
    """
    if (host_tokenizer is None) != (crouter_tokenizer is None):
        missing = "host" if host_tokenizer is None else "crouter"
        raise InputError(f"chunking: expected both tokenizers or none, the {missing}'s is missing")
    if host_tokenizer is None or tokenizer_fingerprint(host_tokenizer) == tokenizer_fingerprint(crouter_tokenizer):
        return SameTokenizerChunker(chunk_length)
    return CrossTokenizerChunker(host_tokenizer, crouter_tokenizer, chunk_length)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 (first 32 hexadecimal digits) of what decides how text becomes ids.

    Vocabulary, merges, normaliser and pre-tokeniser of the fast backend; chat template and special-token settings,
    which differ between loads of the same file, do not count.
    """
    if getattr(tokenizer, "is_fast", False):
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        model = backend["model"]
        vocab = model["vocab"]
        merges = [m.split(" ") if isinstance(m, str) else m for m in model.get("merges", [])]
        parts = [sorted(vocab.items()) if isinstance(vocab, dict) else vocab, merges]
        parts += [backend["normalizer"], backend["pre_tokenizer"]]
    else:
        parts = [sorted(tokenizer.get_vocab().items())]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
