"""Measures how much a host loses where one layer keeps few key-value pairs, on documents of its own tokens.

Each document window is read as in use, `[prefix | chunks | window | target]`: once with every pair, then for each
layer and number of slots with that layer alone compacted. What is lost is the KL divergence from the first of the
predictions of the target.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..cache.kv_cache import CompressedDynamicCache
from ..cache.policy import ContextPolicy
from ..chunking import SameTokenizerChunker, tokenizer_fingerprint
from ..compressors.compact import PairSelector
from ..compressors.layer_budgets import LayerBudgets
from ..data.tokens import TokenArray
from ..errors import InputError
from ..hosts.attention import sliding_layers
from ..hosts.devices import input_device
from ..hosts.fingerprint import host_architecture, host_fingerprint
from ..hosts.pair_probe import check_pairs
from ..hosts.unwrap import display_name
from ..scoring import read_on
from ..utils.progress import Progress
from .loop import device_name

COLUMNS = 128  # predictions compared at once


@dataclass
class BudgetArguments:
    """Arguments of `hf-crouter budgets`."""

    host: str = field(default="", metadata={"help": "known name, folder or hub name of the host"})
    data: str = field(default="", metadata={"help": "folder prepared with the host's tokenizer"})
    output: str = field(default="runs/budgets", metadata={"help": "folder that gets layer_budgets.json"})
    documents: int = field(default=16, metadata={"help": "documents that are read, one window of each"})
    slots: list[int] = field(
        default_factory=lambda: [2, 8, 32, 128], metadata={"help": "pairs a chunk and head at which it is measured"}
    )
    chunks: int = field(default=8, metadata={"help": "older chunks of a window"})
    window: int = field(default=512, metadata={"help": "raw tokens before the predicted ones"})
    target: int = field(default=512, metadata={"help": "predicted tokens"})
    batch_size: int = field(default=4, metadata={"help": "windows read at once"})
    block: int = field(default=2048, metadata={"help": "tokens of older chunks read at once"})
    seed: int = field(default=0, metadata={"help": "of the documents and windows"})

    def check(self) -> None:
        """Refuses what would only be noticed later.

        Raises:
            InputError: numbers that measure nothing.
        """
        if len(self.slots) < 2 or sorted(set(self.slots)) != self.slots or self.slots[0] < 1 or self.slots[-1] > 256:
            raise InputError(f"--slots: expected two ascending numbers of 1 to 256 or more of them, got {self.slots}")
        for name in ("documents", "chunks", "window", "target", "batch_size", "block"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class WindowShape:
    """Tokens of the parts of a window `[prefix | chunks | window | target]`."""

    prefix: int = 4
    chunk: int = 512
    chunks: int = 8
    window: int = 512
    target: int = 512

    @property
    def length(self) -> int:
        """Of all of them."""
        return self.prefix + self.chunk * self.chunks + self.window + self.target


def document_windows(tokens: TokenArray, shape: WindowShape, count: int, seed: int) -> np.ndarray:
    """One window of each of `count` documents, groups in turn, `[count, shape.length]`, int64.

    Raises:
        InputError: no document is long enough.
    """
    generator = np.random.default_rng(seed)
    queues: dict[str, list[np.ndarray]] = {}
    for number in generator.permutation(len(tokens.names)).tolist():
        ids = tokens.ids[tokens.starts[number] : tokens.starts[number + 1] - 1]
        if len(ids) >= shape.length:
            queues.setdefault(tokens.groups[number], []).append(ids)
    found: list[np.ndarray] = []
    for turn in range(max(map(len, queues.values()), default=0)):
        for documents in queues.values():
            if turn < len(documents) and len(found) < count:
                start = int(generator.integers(0, len(documents[turn]) - shape.length + 1))
                found.append(np.asarray(documents[turn][start : start + shape.length], dtype=np.int64))
    if not found:
        raise InputError(f"--data: expected documents of {shape.length} tokens or more, got none")
    return np.stack(found)


def measure_losses(
    host: Any, windows: np.ndarray, shape: WindowShape, slots: Sequence[int], *, batch_size: int = 4, block: int = 2048
) -> list[list[float]]:
    """What is lost where one layer alone is compacted, nats/token, by layer and number of slots.

    Args:
        host: the plain host.
        windows: `[D, shape.length]`.
        shape: of the windows.
        slots: pairs a chunk and head.
        batch_size: windows read at once.
        block: tokens of older chunks read at once.

    Returns:
        A list a layer; an empty one for a layer that keeps nothing old.
    """
    slides, device = sliding_layers(host), input_device(host)
    layers = [n for n, slide in enumerate(slides) if not slide]
    whole = tuple(0 if slide else shape.chunk for slide in slides)
    lost = {(n, count): 0.0 for n in layers for count in slots}
    with Progress() as shown:
        shown.start("layers", len(windows) * (1 + len(lost)), "reads", "tokens")
        for first in range(0, len(windows), batch_size):
            rows = torch.from_numpy(windows[first : first + batch_size]).to(device)
            full = list(_predictions(host, rows, shape, whole, block))
            shown.advance(len(rows), rows.numel())
            for n, count in lost:
                counts = tuple(count if layer == n else some for layer, some in enumerate(whole))
                divergence = 0.0
                for ours, theirs in zip(_predictions(host, rows, shape, counts, block), full, strict=True):
                    divergence += float((theirs.exp() * (theirs - ours)).sum())
                lost[n, count] += divergence / shape.target
                shown.advance(len(rows), rows.numel())
    return [[lost[n, count] / len(windows) for count in slots] if n in layers else [] for n in range(len(slides))]


def _predictions(
    host: Any, rows: torch.Tensor, shape: WindowShape, counts: tuple[int, ...], block: int
) -> Iterator[torch.Tensor]:
    """Log-probabilities of the target, a few columns at once, `[B, columns, V]`, float32."""
    policy = ContextPolicy(
        window=shape.window,
        chunker=SameTokenizerChunker(shape.chunk),
        prefix=lambda ids: shape.prefix,
        compressor=PairSelector(counts, block),
    )
    cache = CompressedDynamicCache(config=host.config.get_text_config(decoder=True))
    ends = [rows.shape[1] - shape.target] * len(rows)
    for _, _, logits in read_on(host, policy, cache, rows, [0] * len(rows), ends):
        for start in range(0, logits.shape[1], COLUMNS):
            yield logits[:, start : start + COLUMNS].float().log_softmax(-1)


def measure_budgets(host: Any, tokenizer: Any, arguments: BudgetArguments) -> LayerBudgets:
    """The budgets of a host, measured on its documents.

    Args:
        host: on its device.
        tokenizer: of the host.
        arguments: see there.

    Raises:
        InputError: data is missing, no document is long enough, or a host whose pairs cannot be compacted.
    """
    arguments.check()
    check_pairs(host)
    tokens = TokenArray.load(Path(arguments.data) / "train.safetensors")
    shape = WindowShape(chunks=arguments.chunks, window=arguments.window, target=arguments.target)
    windows = document_windows(tokens, shape, arguments.documents, arguments.seed)
    losses = measure_losses(
        host, windows, shape, arguments.slots, batch_size=arguments.batch_size, block=arguments.block
    )
    record = {
        "documents": len(windows),
        "chunks": shape.chunks,
        "block": arguments.block,
        "seed": arguments.seed,
        "torch": torch.__version__,
        "device": device_name(input_device(host)),
    }
    return LayerBudgets(
        tuple(arguments.slots),
        tuple(tuple(round(loss, 7) for loss in one) for one in losses),
        chunk=shape.chunk,
        host_name=display_name(host),
        host_fingerprint=host_fingerprint(host),
        host_architecture=host_architecture(host),
        host_tokenizer=tokenizer_fingerprint(tokenizer),
        training=record,
    )
