"""Copying: what followed the last tokens in the compressed past, mixed into the host's scores."""

from __future__ import annotations

import os
import sys
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ..compressors.rebuild import Rebuilder
from ..errors import InputError
from ..fitting import HostInUse
from ..hosts.tokenizers import local_tokenizer, special_ids
from ..ngram.candidates import Evidence, Proposals, collect
from ..ngram.device_index import DeviceSearch, searched_there
from ..ngram.gate import Gate, find_gate, own_gate
from ..ngram.mixture import Mixture, mix
from ..ngram.raw_text import RawText
from ..ngram.row_archive import Archives, RowArchive
from ..ngram.suffix_index import LONGEST
from ..types import CacheView, Contribution, CopiedToken, Opening, Parts, Row, ScoreUse, Setting
from .receipts import BranchingReceipts, GrowingReceipts, Receipts


@dataclass(frozen=True)
class Copy:
    """Exact far tokens at no slot, mixed into the scores; needs nothing, and a crouter only for `source="rebuilt"`.

    Attributes:
        source: "ids", the compressed past's own; or "rebuilt", what the crouter's decoder makes of the latents alone,
            each token weighted by its confidence.
        strength: factor on the weight of copying, 0 to 1.
        generated: archive the tokens generated in the call as well; a model that copies itself tends to loop. In a
            conversation earlier answers are part of the prompt and archived in any case: `exclude` them.
        exclude: spans `(start, end)` of a row's tokens, counted from its first real one, that may be read but not
            copied.
        gate: weighs copying against the host: a folder or a `Gate`; None finds the host's or a twin's in the crouter's
            folder, or takes the general one.

    Raises:
        InputError: options that do not make a copier.

    Example:
        >>> history = CompressedHistory(host, modes=[Copy(strength=0.5)])
    """

    name: ClassVar[str] = "copy"
    gives: ClassVar[tuple[Contribution, ...]] = ("scores",)

    source: Literal["ids", "rebuilt"] = "ids"
    strength: float = 1.0
    generated: bool = False
    exclude: tuple[tuple[int, int], ...] = ()
    gate: str | os.PathLike | Gate | None = None

    def __post_init__(self):
        if self.source not in ("ids", "rebuilt"):
            raise InputError(f"Copy(source=): expected 'ids' or 'rebuilt', got {self.source!r}")
        if not isinstance(self.strength, int | float) or not 0 <= self.strength <= 1:
            raise InputError(f"Copy(strength=): expected 0 to 1, got {self.strength!r}")
        try:
            spans = tuple((int(start), int(end)) for start, end in self.exclude)
        except (TypeError, ValueError):
            spans = ((1, 0),)
        if any(not 0 <= start <= end for start, end in spans):
            raise InputError(f"Copy(exclude=): expected spans (start, end) of tokens, got {self.exclude!r}")
        object.__setattr__(self, "exclude", spans)

    @property
    def needs_crouter(self) -> bool:
        """Whether it can do nothing without a crouter."""
        return self.source == "rebuilt"

    @classmethod
    def ready(cls, setting: Setting) -> Copy | None:
        """See `Mode`: with a crouter and a gate that was fitted to this host or a twin of it."""
        gate = own_gate(setting.crouter, HostInUse.of(setting)) if setting.crouter is not None else None
        return cls(gate=gate) if gate is not None else None

    def bind(self, setting: Setting) -> Parts:
        """See `Mode.bind`.

        Raises:
            InputError: a damaged gate.
            MismatchError: a gate that was made for another host.
        """
        if not self.strength:
            return Parts()
        host = HostInUse.of(setting)
        gate = self.gate if isinstance(self.gate, Gate) else find_gate(setting.crouter, host, self.gate)
        stop_ids = special_ids(setting.tokenizer, setting.host)

        def opened(opening: Opening) -> Copier:
            rebuild = None
            if self.source == "rebuilt":
                own = setting.crouter_tokenizer or local_tokenizer(setting.crouter.name_or_path)
                rebuild = Rebuilder(setting.crouter, None if opening.same_tokenizer else (own, setting.tokenizer))
            archives = Archives(opening.vocab_size, stop_ids, self.exclude, rebuild)
            archived = None if self.generated else opening.archived or opening.width
            return Copier(archives, gate, self.strength, opening.width, archived, opening.prompts, opening.grows)

        return Parts(scores=opened, fitted=(gate.fitted(host),))


class Copier:
    """Mixes what the archives of a call's rows propose into the host's scores; see `ScoreState`.

    Holds no more than what can be made again from its arguments, so that made-up calls teach it nothing.

    Args:
        archives: of the rows.
        gate: weighs them against the host.
        strength: factor on the archives' weight, 0 to 1.
        width: columns of the prompt.
        archived: columns that may be archived, the first ones, of all rows or of each; None: all.
        prompts: rows of the prompt; beams and several sequences make more of them.
        grows: see `Opening`.
    """

    def __init__(
        self,
        archives: Archives,
        gate: Gate,
        strength: float,
        width: int,
        archived: int | Sequence[int] | None,
        prompts: int = 1,
        grows: bool = False,
    ):
        self.archives, self.gate, self.strength, self.width = archives, gate, strength, width
        self.archived, self.prompts, self.grows = archived, prompts, grows
        self._receipts: Receipts = GrowingReceipts() if grows else BranchingReceipts(prompts)
        self._sources: dict[Hashable, tuple[int, int | None]] = {}
        self._searched: DeviceSearch | None = None
        self._ahead: tuple[int, Proposals | None] = 0, None  # columns of a step, and what is proposed behind them
        self._found: tuple[tuple[Row, ...], list[RowArchive], tuple[int, ...]] = (), [], ()  # of the latest rows

    def look(self, cache: CacheView, input_ids: torch.Tensor, columns: Sequence[int]) -> list[Evidence]:
        """What is known before each of some columns of `input_ids`, row after row: `rows * len(columns)` of them."""
        evidence = []
        for row, of_row, ids in zip(cache.rows, self.of_rows(cache), input_ids, strict=True):
            begin = row.pad + row.raw_start
            first = max(row.pad, min(begin, columns[0] - LONGEST))
            recent, archive = ids[first : columns[-1]].cpu().numpy(), of_row.archive
            prefix = ids[row.pad : row.pad + (row.prefix or 0)].cpu().numpy()
            chunks = [row.chunks[n].host_ids.numpy() for n in row.retrieved]
            raw = RawText([prefix, *chunks], recent[begin - first :])
            for column in columns:
                suffix = recent[max(0, column - LONGEST - first) : column - first]
                evidence.append(Evidence.of(archive, suffix, raw, column - begin))
        return evidence

    def of_rows(self, cache: CacheView) -> list[RowArchive]:
        """The archive of each row of a cache, made of the ids that the cache stands for: a call's may be made up."""
        return self._archived(cache)[0]

    def _archived(self, cache: CacheView) -> tuple[list[RowArchive], tuple[int, ...]]:
        """The same, and how many tokens each holds; in most steps the rows are those of the step before."""
        if cache.rows is not self._found[0]:
            columns = sys.maxsize if self.archived is None else self.archived
            limits = [columns] * len(cache.rows) if isinstance(columns, int) else columns
            found = self.archives.rows(
                cache.rows, cache.ids, [n - row.pad for n, row in zip(limits, cache.rows, strict=True)]
            )
            self._found = cache.rows, found, tuple(len(of_row.archive) for of_row in found)
        return self._found[1:]

    def mix(self, proposals: Proposals | None, scores: torch.Tensor) -> Mixture | None:
        """Scores `[N, V]` and the archives together; None where nothing matched."""
        if proposals is None:
            return None
        return mix(scores, proposals, self.gate.to(scores.device), self.strength)

    @torch.no_grad()
    def ahead(self, cache: CacheView, input_ids: torch.Tensor) -> None:
        """See `ScoreState.ahead`: an accelerator searches before it is given the host's forward."""
        if self._searched is not None and self.grows:
            self._receipts.chosen(input_ids)
            self._ahead = input_ids.shape[1], self._proposed(cache, input_ids, self._searched.device)

    @torch.no_grad()
    def step(self, cache: CacheView, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The scores `[B, V]` of one step with copying mixed in; the same ones where nothing matches."""
        if self._ahead[0] == input_ids.shape[1]:
            proposals = self._ahead[1]
        else:
            self._receipts.chosen(input_ids)
            proposals = self._proposed(cache, input_ids, scores.device)
        mixture = self.mix(proposals, scores)
        if mixture is None:
            return scores
        mixed, brought = mixture.with_sources(scores)
        self._receipts.note(mixture.candidates, brought, self._archived(cache)[1], input_ids)
        return mixed.to(scores.dtype)

    def _proposed(self, cache: CacheView, input_ids: torch.Tensor, device: torch.device) -> Proposals | None:
        """What the archives propose after the last column; None where nothing matches."""
        if not searched_there(device):
            return proposed(self.look(cache, input_ids, [input_ids.shape[1]]), device)
        found, sizes = self._archived(cache)
        if not any(sizes):
            return None
        if self._searched is None:
            self._searched = DeviceSearch(device, self.grows)
        return self._searched([of_row.archive for of_row in found], cache.rows, input_ids.to(device))

    def rescore(
        self, cache: CacheView, input_ids: torch.Tensor, columns: Sequence[int], scores: torch.Tensor
    ) -> Mixture | None:
        """See `ScoreState.rescore`."""
        return self.mix(proposed(self.look(cache, input_ids, columns), scores.device), scores)

    def use(self, cache: CacheView, sequences: torch.Tensor, first: int = 0) -> ScoreUse:
        """See `ScoreState.use`."""
        of_rows = self.of_rows(cache)
        archives = list({id(found.archive): found.archive for found in of_rows}.values())  # beams share theirs
        copied = []
        self._receipts.settle(sequences)
        for i in range(len(sequences)):
            number = i * len(cache.rows) // len(sequences)  # several sequences of a prompt share its past
            copied += self._copied(i, number, cache.rows[number], of_rows[number], sequences[i].cpu(),
                                   max(first, self.width))  # fmt: skip
        indexes = sum(archive.index_bytes for archive in archives)
        indexes += self._searched.nbytes if self._searched is not None else 0
        return ScoreUse(tuple(copied), sum(map(len, archives)), sum(archive.nbytes for archive in archives), indexes)

    def _copied(
        self, sequence: int, number: int, row: Row, found: RowArchive, ids: torch.Tensor, first: int
    ) -> Iterator[CopiedToken]:
        """The tokens of one sequence from column `first` on that came from the archive."""
        for column in range(first, len(ids)):
            tokens = self._receipts.size(sequence, ids, column)
            if tokens is None:
                continue
            key, token = self._receipts.key(sequence, ids, column), int(ids[column])
            if self._sources.get(key, (None,))[0] != token:
                before = self._sources.get(self._receipts.key(sequence, ids, column - 1), (None, None))
                after = before[1] if before[0] == int(ids[column - 1]) else None
                recent = ids[max(row.pad, column - LONGEST) : column].numpy()
                self._sources[key] = token, found.archive.source(recent, token, tokens, after)
            position = self._sources[key][1]
            if position is not None:
                chunk = found.chunk_of(position)
                source = row.chunks[chunk].start + found.place_in_chunk(position) if self.archives.aligned else None
                yield CopiedToken(sequence, number, column - row.pad, chunk, source)


def proposed(evidence: Sequence[Evidence], device: torch.device) -> Proposals | None:
    """What is known as candidates on a device; None where nothing matched."""
    return collect(evidence).to(device) if any(known.matches.length for known in evidence) else None
