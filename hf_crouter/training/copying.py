"""Stage 2, second part: records what a host and the archives say of real documents, and fits the gate of copying.

Every document is read once, in one of the ways in which the gate will be used: with soft prompts, without, with a
longer raw window (as retrieval makes it), with its full history; its archive holds the true ids or what the crouter
rebuilds.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..chunking import tokenizer_fingerprint
from ..compressors.projector import Projector, find_projector
from ..compressors.rebuild import Rebuilder
from ..data.tokens import TokenArray
from ..errors import InputError, MismatchError
from ..hosts.fingerprint import host_architecture, host_fingerprint
from ..hosts.positions import max_positions
from ..hosts.tokenizers import special_ids
from ..hosts.unwrap import display_name
from ..ngram.archive import ORDERS, Archive
from ..ngram.gate import Gate, GateConfig
from ..ngram.mixture import BLOCK, Candidates, collect, gate_features, view_host
from ..ngram.suffix_index import LONGEST
from ..types import Chunk
from ..utils.progress import Progress
from .align import AlignArguments, Sample, compressed_logits, cut_sample, load_pair
from .gate import fit_gate
from .loop import device_name, make_accelerator

WAYS = ("window", "soft", "longer", "full")


@dataclass(frozen=True, eq=False)
class GateExamples:
    """What a gate learns from, at N positions.

    Attributes:
        features: `[N, F]`, float16, from `gate_features`.
        available: `[N, K]`, bool.
        copied: `[N, K]`, float32: probability that each order gave to the token that came.
        host: `[N]`, float32: the host's log-probability of it.
    """

    features: torch.Tensor
    available: torch.Tensor
    copied: torch.Tensor
    host: torch.Tensor


def copied_by_order(candidates: Candidates, targets: torch.Tensor) -> torch.Tensor:
    """`[N, K]`: the probability that each order gives to one token at each of N positions."""
    count = len(ORDERS)
    hit = targets[candidates.positions] == candidates.tokens
    cells = candidates.positions * count + candidates.orders
    flat = torch.zeros(len(candidates) * count, device=targets.device)
    return flat.index_add_(0, cells, candidates.probabilities * hit).view(-1, count)


@torch.no_grad()
def record_examples(logits: torch.Tensor, targets: torch.Tensor, before: np.ndarray, archive: Archive) -> GateExamples:
    """Examples of one text.

    Args:
        logits: `[T, V]`, the host's.
        targets: `[T]`, what came, on the same device.
        before: `[P]`, the text's ids before the first target.
        archive: what can be copied at all T positions.
    """
    text, parts = np.concatenate([before[-LONGEST:], targets.cpu().numpy()]), []
    first = len(text) - len(targets)
    for start in range(0, len(targets), BLOCK):
        some, came = logits[start : start + BLOCK], targets[start : start + BLOCK]
        matches = [
            archive.match(text[max(0, first + position - LONGEST) : first + position])
            for position in range(start, start + len(came))
        ]
        candidates = collect(matches).to(logits.device)
        view, normaliser = view_host(some, candidates)
        host = some.gather(1, came[:, None])[:, 0].float() - normaliser
        parts.append((gate_features(candidates, view).half(), candidates.available,
                      copied_by_order(candidates, came), host))  # fmt: skip
    return GateExamples(*(torch.cat(values) for values in zip(*parts, strict=True)))


class GateReader:
    """Reads samples with a frozen host in one of several ways.

    Args:
        host: a decoder.
        crouter: encodes the chunks.
        projector: makes soft prompts; None leaves the way `soft` out.
        rebuild: rebuilds chunks in the host's tokens.
        stop_ids: special tokens.
    """

    def __init__(
        self, host: Any, crouter: Any, projector: Projector | None, rebuild: Rebuilder, stop_ids: Iterable[int]
    ):
        self.host, self.crouter, self.projector = host, crouter, projector
        self.rebuild, self.stop_ids = rebuild, stop_ids
        self.ways = [way for way in WAYS if way != "soft" or projector is not None]
        self.positions = max_positions(host)

    @torch.no_grad()
    def examples(self, sample: Sample, way: str, rebuilt: bool, longer: int = 512) -> GateExamples:
        """Examples of a sample's target.

        Args:
            sample: prefix, chunks, window and target.
            way: one of `ways`; where the host's positions do not reach, "full" falls back to a "longer" that fits, and
                "soft" to "window".
            rebuilt: archive what the latents rebuild instead of the true ids.
            longer: tokens by which the raw window grows in the way "longer", as far as the positions reach.

        Raises:
            InputError: not even the window fits the host's positions.
        """
        device = self.host.get_input_embeddings().weight.device
        first, window = len(sample.prefix), len(sample.window)
        older = sample.history[first : len(sample.history) - window]
        latents = sample.chunks.shape[0] * (self.projector.config.num_latents if self.projector is not None else 0)
        room = (self.positions or len(sample.history) + len(sample.target)) - first - window - len(sample.target)
        if room < 0:
            raise InputError(
                f"gate: expected prefix, window and target within the host's {self.positions} positions, "
                f"got {first + window + len(sample.target)}"
            )
        if way == "soft" and latents > room:
            way = "window"
        if way == "full" and len(older) > room:
            way = "longer"
        grown = {"longer": min(longer, len(older), room), "full": len(older)}.get(way, 0)
        raw = sample.history[len(sample.history) - window - grown :]

        def tensor(ids: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(ids)).to(device)[None]

        soft = torch.zeros(1, 0, self.host.get_input_embeddings().weight.shape[1], device=device)
        if way == "soft" and self.projector is not None:
            latents = self.crouter.encode(sample.chunks.to(device), sample.chunk_mask.to(device))
            soft = self.projector(latents.float()).flatten(0, 1)[None]
        target = tensor(sample.target)
        inputs = torch.cat([tensor(raw), target[:, :-1]], dim=1)
        logits = compressed_logits(self.host, soft, tensor(sample.prefix), inputs, target.shape[1])[0]
        archive = Archive.empty(logits.shape[-1], self.stop_ids)
        if rebuilt:
            pieces = [ids[mask.bool()] for ids, mask in zip(sample.chunks, sample.chunk_mask, strict=True)]
            for ids, confidence in self.rebuild([Chunk(0, 0, piece, piece) for piece in pieces]):
                archive = archive.extended(ids, confidence)
        else:
            archive = archive.extended(older)
        return record_examples(logits, target[0], sample.history, archive)


def gate_samples(tokens: TokenArray, chunker: Any, arguments: AlignArguments, limit: int) -> list[tuple[Sample, str]]:
    """One window a document with its group, at most `limit`; groups take turns, so that none of them leads.

    A corpus of one group is grouped by document.

    Raises:
        InputError: no document is long enough.
    """
    generator = np.random.default_rng(arguments.seed)
    queues: dict[str, list[int]] = {}
    names = tokens.groups if len(set(tokens.groups)) > 1 else tokens.names
    for document in generator.permutation(len(names)).tolist():
        queues.setdefault(names[document], []).append(document)
    samples: list[tuple[Sample, str]] = []
    for turn in range(max(map(len, queues.values()), default=0)):
        for group, documents in queues.items():
            if turn >= len(documents) or len(samples) == limit:
                continue
            first, last = tokens.starts[documents[turn]], tokens.starts[documents[turn] + 1] - 1
            ids = np.asarray(tokens.ids[first:last], dtype=np.int64)
            for chunks in generator.permutation(arguments.chunks).tolist():
                length = arguments.keep_first + chunks * chunker.chunk_length + arguments.window + arguments.target
                start = int(generator.integers(0, max(1, len(ids) - length + 1)))
                sample = cut_sample(ids[start:], chunker, chunks, arguments)
                if sample is not None:
                    samples.append((sample, group))
                    break
    if not samples:
        raise InputError(f"gate: expected documents that hold {min(arguments.chunks)} chunks and a window, got none")
    return samples


def train_gate(
    reader: GateReader, samples: Sequence[tuple[Sample, str]], *, seed: int = 0, title: str = "gate"
) -> tuple[Gate, dict[str, Any]]:
    """Reads the samples and fits the gate of a host.

    Args:
        reader: of the host.
        samples: with the group (package, work) of each; groups are held out together.
        seed: of the ways, the held-out groups and the weights.
        title: shown with the progress.

    Returns:
        The gate, on the CPU, and the record of its fit: counts and the likelihood gained, nats/token.

    Raises:
        InputError: samples of fewer than two groups.
    """
    names = {name: number for number, name in enumerate(sorted({group for _, group in samples}))}
    if len(names) < 2:
        raise InputError(f"gate: expected documents of at least two groups, got {len(names)}")
    generator, parts, groups, start = np.random.default_rng(seed), [], [], time.monotonic()
    with Progress() as shown:
        shown.start(title, len(samples), "documents", "tokens")
        for sample, group in samples:
            way = reader.ways[int(generator.integers(len(reader.ways)))]
            longer = int(generator.choice([64, 512, 1024, 1536]))
            examples = reader.examples(sample, way, bool(generator.random() < 0.4), longer)
            parts.append(examples)
            groups += [names[group]] * len(examples.host)
            shown.advance(1, len(examples.host))
    fields = ("features", "available", "copied", "host")
    tensors = [torch.cat([getattr(part, name) for part in parts]) for name in fields]
    of = reader.host
    config = GateConfig(
        host_name=display_name(of), host_fingerprint=host_fingerprint(of), host_architecture=host_architecture(of)
    )
    features, available, copied, host = tensors
    gate, record = fit_gate(features, available, copied, host, np.array(groups), config=config, seed=seed)
    return gate, {**record, "documents": len(samples), "seconds": round(time.monotonic() - start, 1)}


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
    samples = gate_samples(tokens, pair.chunker, arguments, arguments.gate_documents)
    host, crouter = pair.host.to(accelerator.device).eval(), pair.crouter.to(accelerator.device).eval()
    try:
        projector = find_projector(crouter, host, tokenizer=pair.host_tokenizer).to(accelerator.device)
    except MismatchError:
        projector = None  # the way with soft prompts is left out
    tokenizers = None if pair.chunker.same_tokenizer else (pair.crouter_tokenizer, pair.host_tokenizer)
    rebuild = Rebuilder(crouter, tokenizers)
    reader = GateReader(host, crouter, projector, rebuild, special_ids(pair.host_tokenizer, host))
    gate, record = train_gate(reader, samples, seed=arguments.seed)
    folder = Path(arguments.crouter) / "gates" / gate.config.host_name
    record |= {"ways": reader.ways, "torch": torch.__version__, "device": device_name(accelerator.device)}
    if accelerator.is_main_process:
        tokenizer = tokenizer_fingerprint(pair.host_tokenizer)
        gate.config = replace(gate.config, host_tokenizer=tokenizer, training={"stage": "gate", **record})
        gate.save(folder)
    accelerator.wait_for_everyone()
    return {"path": str(folder), "stage": "gate", **record}
