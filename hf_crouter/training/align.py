"""Stage 2: trains a projector so that a frozen host reads a crouter's latents as soft prompts.

Loss: next-token cross-entropy plus, as far as the host's positions reach, the KL divergence to the same host with full
raw history. Tokens are not weighted by how much history helped on them: such a weight depends on the target and the
objective is no longer proper. Tasks, mixed over the batches: continue the document; go on copying from a position in
the older chunks whose first tokens end the window (`copy`); recite the older chunks without a window (`rebuild`).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from ..chunking import make_chunker
from ..compressors.projector import Projector, new_projector
from ..crouter import CRouterModel
from ..crouter.loading import load_crouter
from ..data.tokens import TokenArray
from ..errors import InputError
from ..hosts.loading import load_host
from ..hosts.positions import max_positions
from .loop import Batch, LoopArguments, device_name, make_accelerator, run_loop


@dataclass
class AlignArguments(LoopArguments):
    """Arguments of `hf-crouter align`; the box of steps, tokens or seconds is that of the projector."""

    host: str = field(default="", metadata={"help": "known name, folder or hub name of the frozen host"})
    crouter: str = field(
        default="", metadata={"help": "local folder of the crouter; the projector is written into it"}
    )
    data: str = field(default="", metadata={"help": "folder prepared with the host's tokenizer"})
    chunks: list[int] = field(default_factory=lambda: [1, 2, 4, 8], metadata={"help": "chunk counts to train on"})
    window: int = field(default=512, metadata={"help": "raw tokens before the predicted ones"})
    target: int = field(default=512, metadata={"help": "predicted tokens"})
    keep_first: int = field(default=4, metadata={"help": "raw tokens kept at the start (attention sinks)"})
    kl_weight: float = field(default=1.0, metadata={"help": "weight of the KL to the full-history host"})
    copy_share: float = field(default=0.2, metadata={"help": "share of batches that copy out of the older chunks"})
    rebuild_share: float = field(default=0.1, metadata={"help": "share of batches that recite the older chunks"})
    hidden_size: int = field(default=576, metadata={"help": "width of the projector's hidden layer"})
    only: str = field(default="", metadata={"help": "train only the 'projector' or the 'gate' of copying, not both"})
    gate_documents: int = field(default=400, metadata={"help": "documents that the gate learns from, at most"})

    def check(self) -> None:
        """Refuses what would only be noticed later.

        Raises:
            InputError: a length that is none, an unknown part, or a crouter without a folder of its own.
        """
        for name in ("keep_first", "window", "target", "gate_documents"):
            least = 0 if name == "keep_first" else 1
            if getattr(self, name) < least:
                raise InputError(f"--{name.replace('_', '-')}: expected at least {least}, got {getattr(self, name)}")
        if self.only not in ("", "projector", "gate"):
            raise InputError(f"--only: expected 'projector' or 'gate', got {self.only!r}")
        if not Path(self.crouter).is_dir():
            raise InputError(f"{self.crouter}: expected a crouter's local folder, which gets projector and gate")


CUE = 64  # tokens before what is to be copied that end the window
Task = Literal["continue", "copy", "rebuild"]


@dataclass(frozen=True)
class Sample:
    """One document window cut for alignment; all ids are the host's but `chunks`.

    Attributes:
        history: `[S]`, everything before the target that a full-history host reads.
        prefix: `[P]`, the raw tokens kept at the start.
        chunks: `[N, T]` crouter ids of what lies between prefix and window.
        chunk_mask: `[N, T]`.
        window: `[W]`, raw tokens right before the target.
        target: `[G]`, tokens to predict.
    """

    history: np.ndarray
    prefix: np.ndarray
    chunks: torch.Tensor
    chunk_mask: torch.Tensor
    window: np.ndarray
    target: np.ndarray


def cut_sample(
    ids: np.ndarray,
    chunker: Any,
    chunks: int,
    arguments: AlignArguments,
    task: Task = "continue",
    start_at: float = 0.0,
) -> Sample | None:
    """Cuts a document window `[L]` into prefix, `chunks` chunks, window and target; none if it is too short.

    Args:
        ids: the document window.
        chunker: cuts the chunks.
        chunks: their number.
        arguments: lengths of prefix, window and target; the target of the other tasks is half as long.
        task: what stands in window and target.
        start_at: where in the older chunks `copy` starts, 0 to 1.
    """
    start = arguments.keep_first
    pieces = chunker.chunk(ids.tolist(), start=start, limit=chunks)
    if len(pieces) < chunks:
        return None
    end = pieces.spans[-1][1]
    split, stop = end + arguments.window, end + arguments.window + arguments.target
    if len(ids) < stop:
        return None
    window, target = ids[end:split], ids[split:stop]
    if task != "continue":
        cue = min(CUE, arguments.window, (end - start) // 2) if task == "copy" else 0
        length = min(max(1, arguments.target // 2), end - start - cue)
        first = start + int(start_at * (end - start - cue - length)) if task == "copy" else start
        window = np.concatenate([window[: len(window) - cue], ids[first : first + cue]]) if cue else ids[:0]
        target = ids[first + cue : first + cue + length]
    return Sample(np.concatenate([ids[:end], window]), ids[:start], pieces.input_ids, pieces.attention_mask,
                  window, target)  # fmt: skip


def compressed_logits(
    host: PreTrainedModel, soft: torch.Tensor, prefix: torch.Tensor, raw: torch.Tensor, keep: int
) -> torch.Tensor:
    """Logits of a host that reads `[prefix | soft prompts | raw]` with compact positions.

    Args:
        host: a decoder.
        soft: `[B, S, H]` soft prompts, in order.
        prefix: `[B, P]` token ids.
        raw: `[B, R]` token ids.
        keep: logits wanted, the last ones.

    Returns:
        `[B, keep, V]`.
    """
    embed: Any = host.get_input_embeddings()
    inputs = torch.cat([embed(prefix), soft.to(embed.weight.dtype), embed(raw)], dim=1)
    return host(inputs_embeds=inputs, logits_to_keep=keep, use_cache=False).logits


class AlignmentLoss(nn.Module):
    """The trainable projector between a frozen crouter and a frozen host."""

    def __init__(self, host: PreTrainedModel, crouter: CRouterModel, projector: Projector, kl_weight: float):
        super().__init__()
        self.host, self.crouter = host.requires_grad_(False), crouter.requires_grad_(False)
        self.projector, self.kl_weight = projector, kl_weight

    def train(self, mode: bool = True) -> AlignmentLoss:
        """Only the projector has a training mode."""
        super().train(mode)
        self.host.eval()
        self.crouter.eval()
        return self

    def soft_prompts(self, chunks: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Chunks `[B, N, T]` to soft prompts `[B, N·M, H]`."""
        batch, count = chunks.shape[:2]
        with torch.no_grad():
            latents = self.crouter.encode(chunks.flatten(0, 1), mask.flatten(0, 1))
        latents = latents.float().unflatten(0, (batch, count))
        return self.projector(latents).flatten(1, 2)

    def forward(
        self,
        history: torch.Tensor,
        history_mask: torch.Tensor,
        prefix: torch.Tensor,
        chunks: torch.Tensor,
        chunk_mask: torch.Tensor,
        window: torch.Tensor,
        target: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Scalars `loss`, `nll` and `kl`, nats/token; shapes as in `Sample` with a leading batch axis.

        `kl` is 0 where there is no teacher: with a weight of 0, or a history beyond the host's positions.
        """
        keep = target.shape[1]
        raw = torch.cat([window, target[:, :-1]], dim=1)
        logits = compressed_logits(self.host, self.soft_prompts(chunks, chunk_mask), prefix, raw, keep)
        student = logits.float().log_softmax(-1)
        nll = F.nll_loss(student.flatten(0, 1), target.flatten())
        positions = max_positions(self.host)
        if not self.kl_weight or (positions and history.shape[1] + keep > positions):
            return {"loss": nll, "nll": nll.detach(), "kl": torch.zeros_like(nll)}
        with torch.no_grad():
            full = torch.cat([history, target[:, :-1]], dim=1)
            mask = F.pad(history_mask, (0, keep - 1), value=1)
            positions = (mask.long().cumsum(1) - 1).clamp(min=0)
            teacher = self.host(
                full, attention_mask=mask, position_ids=positions, logits_to_keep=keep, use_cache=False
            ).logits.float()
            teacher = teacher.log_softmax(-1)
        kl = F.kl_div(student.flatten(0, 1), teacher.flatten(0, 1), log_target=True, reduction="batchmean")
        return {"loss": nll + self.kl_weight * kl, "nll": nll.detach(), "kl": kl.detach()}


class AlignmentData:
    """Random document windows, the same for the same batch number.

    Args:
        tokens: the host's ids.
        chunker: cuts them.
        arguments: chunk counts, window, target and seed.
        separator: id that pads; it is masked.
        positions: most positions that the host was trained on.
        latents: slots a chunk.

    Raises:
        InputError: no chunk count, shares that are none, no document is long enough, or more slots than the host was
            trained on.
    """

    def __init__(
        self,
        tokens: TokenArray,
        chunker: Any,
        arguments: AlignArguments,
        separator: int,
        positions: int | None = None,
        latents: int = 8,
    ):
        self.tokens, self.chunker, self.arguments, self.separator = tokens, chunker, arguments, separator
        if not arguments.chunks or min(arguments.chunks) < 1 or min(arguments.window, arguments.target) < 1:
            raise InputError(
                "expected at least one of each of --chunks, --window and --target, "
                f"got {arguments.chunks}, {arguments.window} and {arguments.target}"
            )
        shares = arguments.copy_share, arguments.rebuild_share
        if min(shares) < 0 or sum(shares) > 1:
            raise InputError(f"--copy-share, --rebuild-share: expected shares of at most 1 together, got {shares}")
        raw = arguments.keep_first + arguments.window + arguments.target
        chunk = chunker.chunk_length if chunker.same_tokenizer else self._longest_chunk()
        self.length = {n: raw + n * chunk for n in arguments.chunks}
        self.sizes = np.diff(tokens.starts) - 1
        self.eligible = {n: np.flatnonzero(self.sizes >= length) for n, length in self.length.items()}
        for n, found in self.eligible.items():
            slots = raw + n * latents
            if positions is not None and slots > positions:
                raise InputError(
                    f"expected at most {positions} slots, which the host was trained on, got {slots} for {n} chunks"
                )
            if not len(found):
                raise InputError(f"expected documents of {self.length[n]} tokens for {n} chunks, got none")

    def _longest_chunk(self, documents: int = 32, chunks: int = 4, slack: float = 1.25) -> int:
        """Host tokens that hold a chunk of a crouter with another tokenizer, from the first documents."""
        longest = 0
        for _, _, ids in itertools.islice(self.tokens.documents(), documents):
            spans = self.chunker.chunk(ids[: 64 * self.chunker.chunk_length].tolist(), limit=chunks).spans
            longest = max([longest, *(end - start for start, end in spans)])
        if not longest:
            raise InputError(f"expected documents of at least {self.chunker.chunk_length} crouter tokens, got none")
        return math.ceil(slack * longest)

    def batch(self, index: int) -> Batch:
        """Batch number `index`; its rows share one chunk count and one task.

        Raises:
            InputError: hardly any window holds as many chunks as asked for.
        """
        generator = np.random.Generator(np.random.Philox(key=[self.arguments.seed, index]))
        chunks = int(generator.choice(self.arguments.chunks))
        draw, task = generator.random(), "continue"
        if draw < self.arguments.copy_share + self.arguments.rebuild_share:
            task = "copy" if draw < self.arguments.copy_share else "rebuild"
        samples: list[Sample] = []
        for _ in range(100 * self.arguments.batch_size):
            document = int(generator.choice(self.eligible[chunks]))
            start = int(generator.integers(0, self.sizes[document] - self.length[chunks] + 1))
            first = int(self.tokens.starts[document]) + start
            ids = np.asarray(self.tokens.ids[first : first + self.length[chunks]], dtype=np.int64)
            sample = cut_sample(ids, self.chunker, chunks, self.arguments, task, generator.random())
            if sample is not None:
                samples.append(sample)
            if len(samples) == self.arguments.batch_size:
                return Batch(collate(samples, self.separator), sum(len(s.history) + len(s.target) for s in samples))
        raise InputError(f"expected {chunks} chunks in windows of {self.length[chunks]} tokens, got fewer")


def collate(samples: list[Sample], pad_id: int) -> tuple[torch.Tensor, ...]:
    """Stacks samples of one chunk count; `history` is left-padded with `pad_id` and comes with its mask."""
    longest = max(len(s.history) for s in samples)
    history = np.stack([np.pad(s.history, (longest - len(s.history), 0), constant_values=pad_id) for s in samples])
    mask = np.stack([np.arange(longest) >= longest - len(s.history) for s in samples]).astype(np.int64)
    width = max(s.chunks.shape[1] for s in samples)

    def widen(tensor: torch.Tensor) -> torch.Tensor:
        return F.pad(tensor, (0, width - tensor.shape[1]))

    return (
        torch.from_numpy(history),
        torch.from_numpy(mask),
        torch.from_numpy(np.stack([s.prefix for s in samples])),
        torch.stack([widen(s.chunks) for s in samples]),
        torch.stack([widen(s.chunk_mask) for s in samples]),
        torch.from_numpy(np.stack([s.window for s in samples])),
        torch.from_numpy(np.stack([s.target for s in samples])),
    )


@dataclass(frozen=True, eq=False)
class Pair:
    """A host and a crouter with their tokenizers, and the chunker that joins them."""

    host: PreTrainedModel
    host_tokenizer: Any
    crouter: CRouterModel
    crouter_tokenizer: Any
    chunker: Any


def load_pair(arguments: AlignArguments, tokens: TokenArray) -> Pair:
    """Host and crouter that the arguments name.

    Raises:
        InputError: one of them is missing, or the tokens are of another vocabulary than the host's.
    """
    crouter, crouter_tokenizer = load_crouter(arguments.crouter)
    host, host_tokenizer = load_host(arguments.host, dtype=torch.bfloat16 if arguments.bf16 else torch.float32)
    if tokens.vocab_size != len(host_tokenizer):
        raise InputError(
            f"expected data of the host's tokenizer with {len(host_tokenizer)} entries, got one of {tokens.vocab_size}"
        )
    chunker = make_chunker(crouter.config.chunk_length, host_tokenizer, crouter_tokenizer)
    return Pair(host, host_tokenizer, crouter, crouter_tokenizer, chunker)


def train_alignment(arguments: AlignArguments) -> dict[str, Any]:
    """Trains the projector, writes it to the crouter's `projectors/` folder and returns the record.

    Args:
        arguments: the host is a folder or hub name, the crouter a local folder.

    Raises:
        InputError: host, crouter or data are missing or do not fit each other, or no document is long enough.
    """
    arguments.check()
    tokens = TokenArray.load(Path(arguments.data) / "train.safetensors")
    accelerator = make_accelerator(arguments)
    pair = load_pair(arguments, tokens)
    host, crouter, chunker = pair.host, pair.crouter, pair.chunker
    projector = new_projector(
        host,
        crouter,
        host_tokenizer=pair.host_tokenizer,
        crouter_tokenizer=pair.crouter_tokenizer,
        hidden_size=arguments.hidden_size,
    )
    positions = max_positions(host)
    latents = crouter.config.num_latents
    data = AlignmentData(tokens, chunker, arguments, tokens.separator_id, positions, latents)
    module = AlignmentLoss(host, crouter, projector, arguments.kl_weight)
    result = run_loop(
        module,
        data.batch,
        arguments,
        accelerator,
        positions_per_sequence=float(np.mean([data.length[n] for n in arguments.chunks])),
        title="align",
    )
    folder = Path(arguments.crouter) / "projectors" / projector.config.host_name
    record = {
        "stage": "align",
        "arguments": {k: v for k, v in asdict(arguments).items() if k not in ("data", "output", "host", "crouter")},
        "processes": result.processes,
        "steps": result.steps,
        "tokens": result.tokens,
        "seconds": round(result.seconds, 1),
        "final": result.final,
        "torch": torch.__version__,
        "device": device_name(accelerator.device),
    }
    if accelerator.is_main_process:
        projector.save(folder, training=record)
    accelerator.wait_for_everyone()
    return {"path": str(folder), **record}
