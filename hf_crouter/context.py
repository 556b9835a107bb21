"""A text kept as latents only: compressed, saved as a context file, and rebuilt.

Axes: `N` chunks, `M` latents a chunk, `T` tokens a chunk.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from transformers import PreTrainedTokenizerBase

from .chunking import tokenizer_fingerprint
from .crouter import CRouterModel
from .crouter.fingerprint import crouter_fingerprint
from .errors import InputError, MismatchError
from .utils.batching import padded
from .utils.io import replaced_file

FORMAT = "crouter-context-1"
ON_DISK = {"reconstruction_nll": "residual"}  # tensors that files call otherwise since their first version
DTYPES = {
    "latents": torch.bfloat16,
    "tokens": torch.int32,
    "reconstruction_nll": torch.float32,
    "accuracy": torch.float32,
}


@dataclass(frozen=True, eq=False)
class CompressedContext:
    """The latents of a text, with what is needed to rebuild it and to know how well.

    Attributes:
        latents: `[N, M, latent_size]`, bfloat16.
        tokens: crouter tokens of each chunk, `[N]`, int32, 1 to T.
        reconstruction_nll: nats/token of each chunk as rebuilt from these latents, `[N]`, float32.
        accuracy: share of its tokens rebuilt exactly at their position (TRA), `[N]`, float32, 0 to 1.
        crouter: name of the crouter.
        crouter_fingerprint: of the weights that made the latents and rebuild them.
        tokenizer_fingerprint: of the crouter's tokenizer.
        source: where the text came from, for people.
        sha256: of the text's UTF-8 bytes, hexadecimal.
        num_bytes: length of the text in UTF-8 bytes.

    Raises:
        InputError: shapes that do not belong together, or values that are not finite.
    """

    latents: torch.Tensor
    tokens: torch.Tensor
    reconstruction_nll: torch.Tensor
    accuracy: torch.Tensor
    crouter: str
    crouter_fingerprint: str
    tokenizer_fingerprint: str
    source: str
    sha256: str
    num_bytes: int

    def __post_init__(self):
        if self.latents.ndim != 3 or not all(self.latents.shape):
            raise InputError(f"latents: expected shape [N, M, latent_size], got {list(self.latents.shape)}")
        for name, dtype in DTYPES.items():
            tensor = getattr(self, name)
            if tensor.dtype != dtype:
                raise InputError(f"{name}: expected {dtype}, got {tensor.dtype}")
            if name != "latents" and tensor.shape != self.latents.shape[:1]:
                raise InputError(f"{name}: expected {self.latents.shape[0]} values, got shape {list(tensor.shape)}")
        if bool((self.tokens < 1).any()):
            raise InputError("tokens: expected at least one token in every chunk")
        for name in ("latents", "reconstruction_nll", "accuracy"):
            check_finite(getattr(self, name), name)

    def __len__(self) -> int:
        """Number of chunks N."""
        return len(self.tokens)

    @property
    def num_tokens(self) -> int:
        """Crouter tokens of the text."""
        return int(self.tokens.sum())

    def save(self, path: str | os.PathLike) -> None:
        """Writes the context file, whole or not at all.

        Raises:
            InputError: the disk is full or the folder cannot be written.
            OSError: any other failure while writing.
        """
        tensors = {ON_DISK.get(name, name): getattr(self, name).cpu().contiguous() for name in DTYPES}
        metadata = {f.name: str(getattr(self, f.name)) for f in fields(self) if f.name not in DTYPES}
        metadata |= {"format": FORMAT, "chunks": str(len(self)), "num_tokens": str(self.num_tokens)}
        metadata["digest"] = _digest(tensors, metadata)
        data = save(tensors, metadata)
        with replaced_file(Path(path)) as part:
            part.write_bytes(data)

    @classmethod
    def load(cls, path: str | os.PathLike) -> CompressedContext:
        """Reads a context file.

        Raises:
            OSError: the file cannot be opened.
            InputError: it is truncated, altered, of another version or no context at all.
        """
        with open(path, "rb"):  # safetensors hides why a file cannot be opened
            pass
        try:
            with safe_open(path, "pt") as file:
                metadata = dict(file.metadata() or {})
                names = file.keys()
                tensors = {name: file.get_tensor(name) for name in names}
        except (SafetensorError, ValueError, OSError) as error:
            raise InputError(f"{path}: truncated, altered or no safetensors file ({error})") from error
        form = metadata.get("format", "")
        expected = {ON_DISK.get(name, name) for name in DTYPES}
        if not form.startswith("crouter-context-") or (form == FORMAT and set(tensors) != expected):
            raise InputError(f"{path}: a safetensors file, but not a compressed context")
        if form != FORMAT:
            raise InputError(f"{path}: expected a context of version {FORMAT!r}, got {form!r}")
        if metadata.pop("digest", "") != _digest(tensors, metadata):
            raise InputError(f"{path}: altered since it was written (checksum differs); compress the text again")
        names = [f.name for f in fields(cls) if f.name not in DTYPES and f.name != "num_bytes"]
        try:
            texts = {name: metadata[name] for name in names}
            named = {name: tensors[ON_DISK.get(name, name)] for name in DTYPES}
            return cls(**named, **texts, num_bytes=int(metadata["num_bytes"]))
        except (KeyError, ValueError) as error:
            raise InputError(f"{path}: not a usable context ({error})") from error


class Restored(NamedTuple):
    """A text rebuilt from latents alone.

    Attributes:
        text: the most probable token at each position, decoded.
        certain_share: share of tokens whose confidence reaches the threshold, 0 to 1.
        confidence: probability of each rebuilt token, `[num_tokens]`, float32.
    """

    text: str
    certain_share: float
    confidence: torch.Tensor


def check_finite(tensor: torch.Tensor, name: str, first: int = 0) -> None:
    """Refuses values `[N, ...]` that are not finite, naming the first chunk that holds one.

    Args:
        tensor: any values whose first axis is chunks.
        name: what they are, for the message.
        first: number of the first chunk.

    Raises:
        InputError: NaN or an infinity.
    """
    bad = ~torch.isfinite(tensor).flatten(1).all(1) if tensor.ndim > 1 else ~torch.isfinite(tensor)
    if bool(bad.any()):
        chunk = first + int(bad.nonzero()[0, 0])
        raise InputError(f"{name}: not finite in chunk {chunk}; the crouter's weights are damaged or overflow")


@torch.inference_mode()
def compress_text(
    text: str,
    crouter: CRouterModel,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int = 4,
    *,
    source: str = "",
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> CompressedContext:
    """Compresses a text, chunk after chunk; the last chunk may be shorter.

    The reconstruction NLL is measured on the latents as they are stored, rounded to bfloat16.

    Args:
        text: any text of at least one token.
        crouter: in evaluation mode.
        tokenizer: the crouter's own.
        batch_size: chunks a pass; a pass holds `batch_size * T * vocabulary` logits, about 100 MB a chunk.
        source: where the text came from, for people.
        progress: called after each pass with the chunks done and their total.

    Raises:
        InputError: an empty text, or latents that are not finite.
        MismatchError: the tokenizer has entries that the crouter does not.
    """
    length, data = crouter.config.chunk_length, text.encode()
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if not ids:
        raise InputError(f"{source or 'text'}: empty, expected at least one token")
    if max(ids) >= crouter.config.vocab_size:
        raise MismatchError(f"tokenizer: id {max(ids)} is outside the crouter's {crouter.config.vocab_size} entries")
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in DTYPES}
    chunks = [torch.tensor(ids[start : start + length]) for start in range(0, len(ids), length)]
    for start in range(0, len(chunks), batch_size):
        rows = chunks[start : start + batch_size]
        tokens = torch.tensor([len(row) for row in rows])
        batch, mask = padded(rows, crouter.device)
        latents = crouter.encode(batch, mask).to(torch.bfloat16)
        check_finite(latents, "latents", first=start)
        logits = crouter.decode(latents.to(crouter.dtype), length=batch.shape[1]).float()
        token_reconstruction_nll = F.cross_entropy(logits.flatten(0, 1), batch.flatten(), reduction="none")
        hits = (logits.argmax(-1) == batch) & mask
        count = mask.sum(-1)
        reconstruction_nll = (token_reconstruction_nll.view_as(batch) * mask).sum(-1) / count
        results = (latents, tokens.int(), reconstruction_nll, hits.sum(-1) / count)
        for part, result in zip(parts.values(), results, strict=True):
            part.append(result.cpu())
        progress(start + len(rows), len(chunks))
    return CompressedContext(
        **{name: torch.cat(part) for name, part in parts.items()},
        crouter=Path(crouter.name_or_path or "").name,
        crouter_fingerprint=crouter_fingerprint(crouter, decoder=True),
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        source=source,
        sha256=hashlib.sha256(data).hexdigest(),
        num_bytes=len(data),
    )


@torch.inference_mode()
def restore_text(
    context: CompressedContext,
    crouter: CRouterModel,
    tokenizer: PreTrainedTokenizerBase,
    threshold: float = 0.9,
    batch_size: int = 4,
) -> Restored:
    """Rebuilds a text from its latents alone.

    Args:
        context: the latents.
        crouter: the one that made them.
        tokenizer: its tokenizer.
        threshold: confidence from which a token counts as certain.
        batch_size: chunks a pass.

    Raises:
        MismatchError: another crouter or tokenizer made the context.
    """
    for what, expected, got in (
        ("crouter", context.crouter_fingerprint, crouter_fingerprint(crouter, decoder=True)),
        ("tokenizer", context.tokenizer_fingerprint, tokenizer_fingerprint(tokenizer)),
    ):
        if expected != got:
            raise MismatchError(
                f"context: made by crouter {context.crouter!r}, whose {what} ({expected}) is not {got}"
            )
    ids, confidence = [], []
    for start in range(0, len(context), batch_size):
        latents = context.latents[start : start + batch_size].to(crouter.device, crouter.dtype)
        rebuilt = crouter.reconstruct(latents)
        assert rebuilt.input_ids is not None and rebuilt.confidence is not None
        for row, tokens in enumerate(context.tokens[start : start + batch_size].tolist()):
            ids.append(rebuilt.input_ids[row, :tokens].cpu())
            confidence.append(rebuilt.confidence[row, :tokens].float().cpu())
    # all chunks at once: a character's bytes may lie on both sides of a border
    text = tokenizer.decode(torch.cat(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    probability = torch.cat(confidence)
    return Restored(str(text), float((probability >= threshold).float().mean()), probability)


def _digest(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> str:
    """SHA-256 over every tensor's name, type, shape and bytes and over the metadata, hexadecimal."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()
