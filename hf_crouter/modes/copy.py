"""Copying: what followed the last tokens in the compressed past, mixed into the host's scores."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..cache.kv_cache import CompressedCache
from ..ngram.archive import Matches
from ..ngram.gate import Gate
from ..ngram.mixture import Candidates, Mixture, collect, mix
from ..ngram.row_archive import Archives, RowArchive
from ..ngram.suffix_index import LONGEST


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
        past: Archives,
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
        for i, past in enumerate(self.archives(cache)):
            first = max(cache.rows[i].pad, columns[0] - LONGEST)
            recent = input_ids[i, first : columns[-1]].cpu().numpy()
            for column in columns:
                end = column - first
                matches.append(past.archive.match(recent[max(0, end - LONGEST) : end]))
        return matches

    def archives(self, cache: CompressedCache) -> list[RowArchive]:
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

    def taken(self, cache: CompressedCache, archives: Sequence[RowArchive], sequences: torch.Tensor) -> list[Copied]:
        """The generated tokens that copying brought; `sequences` `[sequences, T]` are what the call gave."""
        found = []
        if not self._brought:
            return found
        for i in range(len(sequences)):
            of = i * len(cache.rows) // len(sequences)  # several sequences of a prompt share its past
            row, past = cache.rows[of], archives[of]
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
