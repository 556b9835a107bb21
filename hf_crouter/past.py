"""The archives of a call's rows: what a compressed past still says word for word, for copying and recall."""

from __future__ import annotations

import bisect
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .archive.copying import CONFIG, Candidates, Gate, Mixture, collect, generic_gate, mix
from .archive.index import LONGEST
from .archive.store import Archive, Matches
from .compressor import CRouterModel
from .errors import MismatchError
from .host.cache import CompressedCache, CompressedChunk, Row
from .host.fingerprint import host_fingerprint
from .host.projector import crouter_folder

Rebuild = Callable[[Sequence[CompressedChunk]], list[tuple[np.ndarray, np.ndarray]]]
BATCH = 4  # chunks rebuilt at once
SHIPPED = Path(__file__).parent / "checkpoints" / "crouter-code-mini"


@dataclass(frozen=True, eq=False)
class RowPast:
    """The archive of one row's compressed tokens.

    Attributes:
        last: the latest chunk in it; None for an empty one.
        archive: their ids.
        ends: archived tokens up to the end of each chunk.
    """

    last: CompressedChunk | None
    archive: Archive
    ends: tuple[int, ...] = ()

    def chunk_of(self, position: int) -> int:
        """Number of the chunk in which an archived token stands."""
        return bisect.bisect_right(self.ends, position)


class Past:
    """Archives of the rows of one call, extended as their chunks are compressed.

    A row's chunks are shared by the beams that come from it, and so is its archive.

    Args:
        vocab_size: of the host.
        stop_ids: special tokens; never proposed, and no match reaches over one.
        exclude: spans `(start, end)` of a row's tokens that may be read but not repeated.
        rebuild: ids and confidences that stand for chunks; None archives the row's own ids.
    """

    def __init__(
        self,
        vocab_size: int,
        stop_ids: Iterable[int] = (),
        exclude: Sequence[tuple[int, int]] = (),
        rebuild: Rebuild | None = None,
    ):
        self.empty = RowPast(None, Archive.empty(vocab_size, stop_ids))
        self.exclude, self.rebuild = tuple(exclude), rebuild
        self.aligned = rebuild is None or getattr(rebuild, "aligned", False)
        self._known: dict[int, RowPast] = {}

    def rows(self, rows: Sequence[Row], input_ids: torch.Tensor, limits: Sequence[int]) -> list[RowPast]:
        """The archive of each row.

        Args:
            rows: state of the cache.
            input_ids: `[B, T]`.
            limits: tokens of each row that may be archived, the first ones; later ones were generated.
        """
        made: dict[tuple[int, bytes], RowPast] = {}
        found = [self._row(row, input_ids[i], limits[i], made) for i, row in enumerate(rows)]
        self._known = {id(past.last): past for past in found if past.last is not None}
        return found

    def _row(self, row: Row, ids: torch.Tensor, limit: int, made: dict[tuple[int, bytes], RowPast]) -> RowPast:
        # a chunk belongs to one history alone: where its object is known, so is all before it
        done = next((n for n in range(len(row.chunks), 0, -1) if id(row.chunks[n - 1]) in self._known), 0)
        past = self._known[id(row.chunks[done - 1])] if done else self.empty
        chunks = row.chunks[done:]
        if not chunks:
            return past
        text = ids[row.pad + chunks[0].start : row.pad + chunks[-1].end].cpu().numpy()
        key = (id(past), np.array([limit, chunks[0].start, *(c.end for c in chunks)]).tobytes() + text.tobytes())
        if key not in made:  # beams start as equal rows
            made[key] = self._extended(past, chunks, text, limit)
        self._known[id(chunks[-1])] = replace(made[key], last=chunks[-1])
        return self._known[id(chunks[-1])]

    def _extended(self, past: RowPast, chunks: Sequence[CompressedChunk], text: np.ndarray, limit: int) -> RowPast:
        """All new chunks at once: each extension of a long archive may sort it anew."""
        first, ends = chunks[0].start, []
        pieces, weights, flags = [], [], []
        archived = [c for c in chunks if c.start < limit and (self.aligned or c.end <= limit)]
        rebuilt = self.rebuild(archived) if self.rebuild else []
        for n, chunk in enumerate(chunks):
            if n < len(archived):
                if self.rebuild:
                    piece, weight = rebuilt[n]
                else:
                    piece = text[chunk.start - first : chunk.end - first]
                    weight = np.ones(len(piece))
                if self.aligned:
                    piece, weight = piece[: limit - chunk.start], weight[: limit - chunk.start]
                pieces.append(piece)
                weights.append(weight)
                flags.append(self._copyable(chunk, len(piece)))
            ends.append(len(past.archive) + sum(map(len, pieces)))
        archive = past.archive
        if pieces:
            flag = np.concatenate(flags)
            archive = archive.extended(
                np.concatenate(pieces),
                np.concatenate(weights) if self.rebuild else None,
                None if flag.all() else flag,
            )
        return RowPast(chunks[-1], archive, (*past.ends, *ends))

    def _copyable(self, chunk: CompressedChunk, length: int) -> np.ndarray:
        flags = np.ones(length, bool)
        for start, end in self.exclude:
            if start < chunk.end and end > chunk.start:
                if not self.aligned:  # places are not known: nothing of the chunk is repeated
                    return np.zeros(length, bool)
                flags[max(0, start - chunk.start) : max(0, end - chunk.start)] = False
        return flags


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
    def __call__(self, chunks: Sequence[CompressedChunk]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Ids `[tokens]` and confidence `[tokens]`, 0 to 1, for each chunk."""
        pieces = []
        for first in range(0, len(chunks), BATCH):
            batch = [chunk.ids for chunk in chunks[first : first + BATCH]]
            ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True)
            mask = torch.arange(ids.shape[1]) < torch.tensor([len(piece) for piece in batch])[:, None]
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


@dataclass(frozen=True)
class Copied:
    """A token that copying brought rather than the host.

    Attributes:
        row: row of the cache; several sequences of one prompt count for its rows in turn.
        position: its place in the row, counted from the first real token.
        chunk: number of the chunk that it was copied from.
    """

    row: int
    position: int
    chunk: int


class Copier:
    """Mixes what the archives of a call's rows propose into the host's scores.

    Holds no more than what can be made again from its arguments, so that made-up calls teach it nothing.

    Args:
        past: the archives.
        gate: weighs them against the host.
        strength: factor on the archives' weight, 0 to 1.
        width: columns of the prompt.
        archived: columns that may be archived, the first ones, of all rows or of each; None: all.
        prompts: rows of the prompt; beams and several sequences make more of them.
    """

    def __init__(
        self,
        past: Past,
        gate: Gate,
        strength: float,
        width: int,
        archived: int | Sequence[int] | None,
        prompts: int = 1,
    ):
        self.past, self.gate, self.strength, self.width = past, gate, strength, width
        self.archived, self.prompts = archived, prompts
        self._brought: dict[tuple[int, int, int], dict[int, int]] = {}

    def look(self, cache: CompressedCache, input_ids: torch.Tensor, columns: Sequence[int]) -> list[Matches]:
        """Matches before each of some columns of `input_ids`, row after row; `rows * len(columns)` of them."""
        matches = []
        for i, past in enumerate(self.pasts(cache)):
            first = max(cache.rows[i].pad, columns[0] - LONGEST)
            recent = input_ids[i, first : columns[-1]].cpu().numpy()
            for column in columns:
                end = column - first
                matches.append(past.archive.match(recent[max(0, end - LONGEST) : end]))
        return matches

    def pasts(self, cache: CompressedCache) -> list[RowPast]:
        """The archive of each row of a cache, made of the ids that the cache stands for: a call's may be made up."""
        columns = sys.maxsize if self.archived is None else self.archived
        limits = [columns] * len(cache.rows) if isinstance(columns, int) else columns
        return self.past.rows(cache.rows, cache.ids, [n - row.pad for n, row in zip(limits, cache.rows, strict=True)])

    def mix(self, matches: Sequence[Matches], scores: torch.Tensor) -> Mixture | None:
        """Scores `[N, V]` and the archives together; None where nothing matched."""
        if not any(match.length for match in matches):
            return None
        return mix(scores, collect(matches).to(scores.device), self.gate.to(scores.device), self.strength)

    @torch.no_grad()
    def step(self, cache: CompressedCache, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The scores `[B, V]` of one step with copying mixed in; the same ones where nothing matches."""
        matches = self.look(cache, input_ids, [input_ids.shape[1]])
        mixture = self.mix(matches, scores)
        if mixture is None:
            return scores
        mixed, brought = mixture.with_sources(scores)
        self._note(mixture.candidates, brought, matches, input_ids)
        return mixed.to(scores.dtype)

    def _note(
        self, entries: Candidates, brought: torch.Tensor, matches: Sequence[Matches], input_ids: torch.Tensor
    ) -> None:
        """Remembers which tokens would come from the archive: the report asks for those that were taken."""
        which = brought.nonzero()[:, 0]
        for place, token in set(zip(entries.places[which].tolist(), entries.tokens[which].tolist(), strict=True)):
            where = matches[place].positions
            if len(where):
                prompt = place * self.prompts // len(input_ids)
                self._brought.setdefault((prompt, *_step_key(input_ids[place])), {})[token] = int(where[-1])

    def taken(self, cache: CompressedCache, pasts: Sequence[RowPast], sequences: torch.Tensor) -> list[Copied]:
        """The generated tokens that copying brought; `sequences` `[sequences, T]` are what the call gave."""
        found = []
        if not self._brought:
            return found
        for i in range(len(sequences)):
            of = i * len(cache.rows) // len(sequences)  # several sequences of a prompt share its past
            row, past = cache.rows[of], pasts[of]
            for column in range(self.width, sequences.shape[1]):
                prompt = i * self.prompts // len(sequences)
                brought = self._brought.get((prompt, *_step_key(sequences[i, :column])), {})
                position = brought.get(int(sequences[i, column]))
                if position is not None:
                    found.append(Copied(of, column - row.pad, past.chunk_of(position)))
        return found


def _step_key(ids: torch.Tensor) -> tuple[int, int]:
    """Tells steps of different rows apart without reading all their ids."""
    return len(ids), hash(ids[-LONGEST:].cpu().numpy().tobytes())


def special_ids(tokenizer: Any, host: Any) -> frozenset[int]:
    """Ids that are never copied: the tokenizer's special ones, else what the host's configuration names.

    Added tokens that are not special count only if they look like marks, such as `<think>`: some tokenizers add runs
    of spaces.
    """
    if tokenizer is not None:
        added = {int(number) for number, token in tokenizer.added_tokens_decoder.items()
                 if token.special or re.fullmatch(r"<\S+>|\[[A-Z_/]+\]", token.content)}  # fmt: skip
        return frozenset({*map(int, tokenizer.all_special_ids), *added})
    found: set[int] = set()
    for config in (host.config.get_text_config(decoder=True), getattr(host, "generation_config", None)):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(config, name, None)
            found |= {int(v) for v in (value if isinstance(value, list | tuple) else [value]) if v is not None}
    return frozenset(found)


def find_gate(crouter: CRouterModel | None, host: Any, name: str | os.PathLike | None = None) -> Gate:
    """The gate that fits a host: a named one, its own in the crouter's folder or the shipped one's, or a generic one.

    Args:
        crouter: loaded from a local folder or the hub; its folder holds `gates/*/`.
        host: the decoder.
        name: a gate's folder.

    Raises:
        InputError: damaged files.
        MismatchError: the named gate was made for another host.
    """
    if name is not None:
        gate = Gate.load(os.fspath(name))
        wanted = gate.config.host_fingerprint
        if wanted and wanted != host_fingerprint(host):
            raise MismatchError(f"{name}: expected the host with fingerprint {wanted}, got {host_fingerprint(host)}")
        return gate
    origin = str(getattr(crouter.config, "_name_or_path", "") or "") if crouter is not None else ""
    folders = [path.parent for place in (crouter_folder(origin, "gates") if origin else None, SHIPPED)
               if place is not None for path in sorted(place.glob(f"gates/*/{CONFIG}"))]  # fmt: skip
    gates = [Gate.load(folder) for folder in folders]
    wanted = host_fingerprint(host) if gates else ""
    return next((gate for gate in gates if gate.config.host_fingerprint == wanted), None) or generic_gate()
