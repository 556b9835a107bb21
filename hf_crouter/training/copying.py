"""Stage 2, second part: records what a host and the archives say of texts, and fits the gate of copying.

Every text is read by `CompressedHistory`, in one of the ways in which the gate will be used: with the window alone or
a longer one, with chunks retrieved, as by default, with soft prompts where there is a projector. Beside documents
there are records that are set anew (`records`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from ..chunking import tokenizer_fingerprint
from ..compressors.projector import Projector, find_projector
from ..data.tokens import TokenArray
from ..errors import CapacityError, InputError, MismatchError
from ..history import CHUNK_LENGTH, CompressedHistory
from ..hosts.fingerprint import host_architecture, host_fingerprint
from ..hosts.unwrap import display_name
from ..modes import Copy, Retrieve, SoftPrompts, resolve_modes
from ..ngram.candidates import Candidates, collect
from ..ngram.gate import Gate, GateConfig
from ..ngram.mixture import gate_features, view_host
from ..types import CacheView, Contribution, Mode, Parts, ScoreState, ScoreUse, Setting
from ..utils.progress import Progress
from .align import AlignArguments, load_pair
from .gate import fit_gate
from .loop import device_name, make_accelerator
from .records import record_row

RECORDS = 0.25  # texts with records for each document
ROOM, TAIL = 256, 192  # tokens of the older part that records are hidden in, and behind it, at least
RECORD = "records"  # begins the group of each text of records
LONGER = (64, 512, 1024, 1536)  # tokens by which the window grows in the way "longer"


@dataclass(frozen=True, eq=False)
class GateExamples:
    """What a gate learns from, at N positions.

    Attributes:
        features: `[N, F]`, float16, from `gate_features`.
        available: `[N, K]`, bool.
        copied: `[N, K]`, float32: probability that each source gave to the token that came.
        host: `[N]`, float32: the host's log-probability of it.
    """

    features: torch.Tensor
    available: torch.Tensor
    copied: torch.Tensor
    host: torch.Tensor

    @classmethod
    def joined(cls, parts: Sequence[GateExamples]) -> GateExamples:
        """Several as one."""
        return cls(*(torch.cat(values) for values in zip(*(vars(part).values() for part in parts), strict=True)))


def copied_by_source(candidates: Candidates, targets: torch.Tensor) -> torch.Tensor:
    """`[N, K]`: the probability that each source gives to one token at each of N positions."""
    return candidates.expected(targets[candidates.positions] == candidates.tokens)


class Recorder:
    """A mode that changes nothing and notes what a gate would have seen, at positions where anything matches."""

    name: ClassVar[str] = "recorder"
    gives: ClassVar[tuple[Contribution, ...]] = ("scores",)

    def __init__(self):
        self.copy, self.needs_crouter = Copy(gate=Gate()), False
        self.examples: list[GateExamples] = []

    @classmethod
    def ready(cls, setting: Setting) -> None:
        """See `Mode`: never by itself."""

    def bind(self, setting: Setting) -> Parts:
        """See `Mode.bind`."""
        opened = self.copy.bind(setting).scores
        assert opened is not None
        return Parts(scores=lambda opening: _Recording(self.examples, opened(opening)))


class _Recording:
    """The recorder in one call; see `ScoreState`."""

    def __init__(self, examples: list[GateExamples], copier: ScoreState):
        self.examples, self.copier = examples, copier

    def ahead(self, cache: CacheView, input_ids: torch.Tensor) -> None:
        """See `ScoreState.ahead`."""

    def step(self, cache: CacheView, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """See `ScoreState.step`."""
        return scores

    def rescore(self, cache: CacheView, input_ids: torch.Tensor, columns: Sequence[int], scores: torch.Tensor) -> None:
        """See `ScoreState.rescore`."""
        candidates = collect(self.copier.look(cache, input_ids, columns)).to(scores.device)  # pyright: ignore
        ids = input_ids[:, columns[0] : columns[-1] + 1].flatten().to(scores.device)
        view, normaliser = view_host(scores, candidates)
        host = scores.gather(1, ids[:, None])[:, 0].float() - normaliser
        some = candidates.available.any(1)
        found = (gate_features(candidates, view).half(), candidates.available, copied_by_source(candidates, ids), host)
        self.examples.append(GateExamples(*(value[some].cpu() for value in found)))

    def use(self, cache: CacheView, sequences: torch.Tensor, first: int = 0) -> ScoreUse:
        """See `ScoreState.use`."""
        return ScoreUse()


class GateReader:
    """Reads texts with a frozen host in one of several ways.

    Args:
        host: a decoder.
        tokenizer: of the host.
        crouter: cuts the chunks; None: chunks of 512 tokens.
        crouter_tokenizer: of the crouter.
        projector: makes soft prompts; None leaves the way `soft` out.
        window: raw tokens at the end.
        keep_first: raw tokens at the start.
    """

    def __init__(
        self,
        host: Any,
        tokenizer: Any,
        crouter: Any = None,
        crouter_tokenizer: Any = None,
        projector: Projector | None = None,
        window: int = 512,
        keep_first: int = 4,
    ):
        self.host, self.tokenizer, self.crouter = host, tokenizer, crouter
        self.crouter_tokenizer, self.window, self.keep_first = crouter_tokenizer, window, keep_first
        auto = resolve_modes("auto", Setting(host, None, tokenizer, None))
        default = [mode for mode in auto if not isinstance(mode, Copy)]
        self.ways: dict[str, list[Mode]] = {"window": [], "longer": [], "retrieve": [Retrieve(2)], "default": default}
        if projector is not None:
            self.ways["soft"] = [SoftPrompts(projector)]

    @property
    def chunk_length(self) -> int:
        """Tokens of a chunk."""
        return self.crouter.config.chunk_length if self.crouter is not None else CHUNK_LENGTH

    def examples(self, ids: np.ndarray, last: int, way: str, *, longer: int = 512) -> GateExamples | None:
        """Examples of the last tokens of a text, at positions where anything matches; None where nothing does.

        A way that does not fit the host's positions gives way to the window alone.

        Args:
            ids: of the text, `[T]`.
            last: tokens that are predicted.
            way: one of `ways`.
            longer: tokens by which the raw window grows in the way "longer".

        Raises:
            CapacityError: not even the window fits the host's positions.
        """
        try:
            return self._read(ids, last, way, longer)
        except CapacityError:
            if way == "window":
                raise
            return self._read(ids, last, "window", 0)

    def _read(self, ids: np.ndarray, last: int, way: str, longer: int) -> GateExamples | None:
        recorder = Recorder()
        history = CompressedHistory(
            self.host,
            self.crouter,
            modes=[*self.ways[way], recorder],
            window=self.window + (longer if way == "longer" else 0),
            keep_first=self.keep_first,
            tokenizer=self.tokenizer,
            crouter_tokenizer=self.crouter_tokenizer,
        )
        try:
            history.score(torch.from_numpy(ids.astype(np.int64))[None], last=last)
        finally:
            history.detach()
        return GateExamples.joined(recorder.examples) if recorder.examples else None


def gate_rows(
    tokens: TokenArray, chunk_length: int, arguments: AlignArguments, limit: int
) -> list[tuple[np.ndarray, str]]:
    """One window `[T]` a document with its group, at most `limit`; groups take turns, so that none of them leads.

    A corpus of one group is grouped by document.

    Raises:
        InputError: no document is long enough.
    """
    generator = np.random.default_rng(arguments.seed)
    queues: dict[str, list[int]] = {}
    names = tokens.groups if len(set(tokens.groups)) > 1 else tokens.names
    for document in generator.permutation(len(names)).tolist():
        queues.setdefault(names[document], []).append(document)
    rows: list[tuple[np.ndarray, str]] = []
    for turn in range(max(map(len, queues.values()), default=0)):
        for group, documents in queues.items():
            if turn >= len(documents) or len(rows) == limit:
                continue
            first, last = tokens.starts[documents[turn]], tokens.starts[documents[turn] + 1] - 1
            ids = np.asarray(tokens.ids[first:last], dtype=np.int64)
            for chunks in generator.permutation(arguments.chunks).tolist():
                length = arguments.keep_first + chunks * chunk_length + arguments.window + arguments.target
                if length <= len(ids):
                    start = int(generator.integers(0, len(ids) - length + 1))
                    rows.append((ids[start : start + length], group))
                    break
    if not rows:
        raise InputError(f"gate: expected documents that hold {min(arguments.chunks)} chunks and a window, got none")
    return rows


def read_examples(
    reader: GateReader,
    rows: Sequence[tuple[np.ndarray, str]],
    last: int,
    *,
    seed: int | Sequence[int] = 0,
    title: str = "gate",
) -> list[tuple[GateExamples, str]]:
    """Examples of documents and of records hidden among them, with their groups.

    Args:
        reader: of the host.
        rows: ids of documents, `[T]` each, with the group (package, work) of each.
        last: tokens at the end of a document that are predicted.
        seed: of the ways and of the records.
        title: shown with the progress.
    """
    generator, found = np.random.default_rng(seed), []
    names = list(reader.ways)

    def encode(text: str) -> list[int]:
        return reader.tokenizer.encode(text, add_special_tokens=False)

    def add(group: str, ids: np.ndarray, last: int) -> None:
        way = names[int(generator.integers(len(names)))]
        longer = int(generator.choice(LONGER))
        examples = reader.examples(ids, last, way, longer=longer)
        if examples is not None and len(examples.host):
            found.append((examples, group))

    with Progress() as shown:
        shown.start(title, len(rows), "documents", "tokens")
        for n, (ids, group) in enumerate(rows):
            add(group, ids, last)
            end = len(ids) - last - reader.window
            room = end - reader.keep_first >= ROOM and len(ids) - end >= TAIL
            if generator.random() < RECORDS and room:
                row, listed = record_row(encode, ids, len(ids), (reader.keep_first, end), generator)
                add(f"{RECORD} {title} {seed} {n}", row, listed)
            shown.advance(1, last)
    return found


def train_gate(
    examples: Sequence[tuple[GateExamples, str]], config: GateConfig, *, seed: int = 0, device: Any = "cpu"
) -> tuple[Gate, dict[str, Any]]:
    """Fits a gate to what was read.

    Args:
        examples: with the group (package, work) of each; groups are held out together.
        config: of the gate, with the host that it is for.
        seed: of the held-out groups and the weights.
        device: that it is fitted on.

    Returns:
        The gate, on the CPU, and the record of its fit: counts and the likelihood gained, nats at each position where
        anything matched.

    Raises:
        InputError: examples of fewer than two groups.
    """
    names = {name: number for number, name in enumerate(sorted({group for _, group in examples}))}
    documents = [name for name in names if not name.startswith(RECORD)]
    if len(documents) < 2:
        raise InputError(f"gate: expected documents of at least two groups, got {len(documents)}")
    groups = np.concatenate([np.full(len(part.host), names[group]) for part, group in examples])
    known = GateExamples.joined([part for part, _ in examples])
    features, available, copied, host = (value.to(device) for value in vars(known).values())
    return fit_gate(features, available, copied, host, groups, config=config, seed=seed)


def train_copying(arguments: AlignArguments) -> dict[str, Any]:
    """Fits the gate of a host, writes it to the crouter's `gates/` folder and returns the record.

    Args:
        arguments: of `hf-crouter align`; the data should hold many kinds of text.

    Raises:
        InputError: host, crouter or data are missing or do not fit each other, or no document is long enough.
    """
    arguments.check()
    tokens = TokenArray.load(Path(arguments.data) / "train.safetensors")
    accelerator = make_accelerator(arguments)
    pair = load_pair(arguments, tokens)
    host, crouter = pair.host.to(accelerator.device).eval(), pair.crouter.to(accelerator.device).eval()
    try:
        projector = find_projector(crouter, host, tokenizer=pair.host_tokenizer).to(accelerator.device)
    except MismatchError:
        projector = None  # the way with soft prompts is left out
    reader = GateReader(
        host, pair.host_tokenizer, crouter, pair.crouter_tokenizer, projector, arguments.window, arguments.keep_first
    )
    start = time.monotonic()
    rows = gate_rows(tokens, reader.chunk_length, arguments, arguments.gate_documents)
    examples = read_examples(reader, rows, arguments.target, seed=arguments.seed)
    config = GateConfig(
        host_name=display_name(host), host_fingerprint=host_fingerprint(host),
        host_architecture=host_architecture(host), host_tokenizer=tokenizer_fingerprint(pair.host_tokenizer),
    )  # fmt: skip
    gate, record = train_gate(examples, config, seed=arguments.seed, device=accelerator.device)
    record |= {"documents": len(rows), "seconds": round(time.monotonic() - start, 1), "ways": list(reader.ways)}
    record |= {"torch": torch.__version__, "device": device_name(accelerator.device)}
    folder = Path(arguments.crouter) / "gates" / gate.config.host_name
    if accelerator.is_main_process:
        gate.config = replace(gate.config, training={"stage": "gate", **record})
        gate.save(folder)
    accelerator.wait_for_everyone()
    return {"path": str(folder), "stage": "gate", **record}
