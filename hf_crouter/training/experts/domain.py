"""Documents of a domain as tokens of crouter and host, and pieces of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...chunking import tokenizer_fingerprint
from ...data.documents import Document
from ...data.tokens import TokenArray, encode_documents, join, select
from ...errors import InputError
from ...routing.experts import Texts
from ..loop import Batch
from .arguments import ExpertArguments
from .models import ExpertModels

_LEAST = 8  # documents that a calibration needs
_SHARE = 0.1  # of the training documents, where the data keeps fewer out


@dataclass(frozen=True, eq=False)
class Domain:
    """Documents of a domain: what is fitted and what is kept out, in the crouter's and in the host's tokens."""

    train: TokenArray
    held_out: TokenArray
    host_train: TokenArray
    host_held_out: TokenArray


def read_domain(folder: str | Path, models: ExpertModels, seed: int = 0) -> Domain:
    """Documents of a prepared folder; kept out are those of its calibration part.

    Where that part holds fewer than 8 documents, a tenth of the training documents (at least as many as are missing,
    at most half) is kept out as well, drawn by the seed. The parts for tests are not read.

    Args:
        folder: prepared with the crouter's tokenizer.
        models: whose tokenizers; where they differ, the text is encoded again for the host.
        seed: of the draw.

    Raises:
        InputError: no such data, data of another vocabulary, or fewer than two documents.
    """
    train = load_tokens(Path(folder) / "train.safetensors", models.crouter_tokenizer)
    path = Path(folder) / "calibration.safetensors"
    held_out = [load_tokens(path, models.crouter_tokenizer)] if path.exists() else []
    kept, count = sum(len(tokens.names) for tokens in held_out), len(train.names)
    if kept < _LEAST:
        drawn = min(max(_LEAST - kept, round(_SHARE * count)), count // 2)
        if not drawn:
            raise InputError(f"{folder}: expected at least 2 documents to train on, got {count}")
        order = np.random.default_rng(seed).permutation(count)
        held_out.append(select(train, np.sort(order[:drawn])))
        train = select(train, np.sort(order[drawn:]))
    kept_out = join(held_out)
    return Domain(train, kept_out, host_tokens(train, models), host_tokens(kept_out, models))


def load_tokens(path: str | Path, tokenizer: Any) -> TokenArray:
    """Token file in the crouter's ids.

    Raises:
        InputError: missing, damaged or of another vocabulary.
    """
    tokens = TokenArray.load(path)
    if tokens.vocab_size != len(tokenizer):
        raise InputError(
            f"{path}: expected data of the crouter's tokenizer with {len(tokenizer)} entries, "
            f"got one of {tokens.vocab_size}"
        )
    return tokens


def host_tokens(tokens: TokenArray, models: ExpertModels) -> TokenArray:
    """The same documents in the host's ids; the same array where both share a tokenizer."""
    if tokenizer_fingerprint(models.crouter_tokenizer) == tokenizer_fingerprint(models.host_tokenizer):
        return tokens
    decode = models.crouter_tokenizer.decode
    documents = [
        Document(name, group, decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False))
        for name, group, ids in tokens.documents()
    ]
    separator = models.host_tokenizer.eos_token_id
    return encode_documents(documents, models.host_tokenizer, separator_id=separator or 0)


def host_batch(tokens: TokenArray, arguments: ExpertArguments, index: int) -> Batch:
    """Batch number `index`: random windows of the documents, one after another with separators between them."""
    ids = tokens.windows(min(arguments.window, len(tokens)), arguments.seed, index, arguments.host_batch_size)
    return Batch((torch.from_numpy(ids),), ids.size)


def cut(tokens: TokenArray, length: int, limit: int, least: int) -> tuple[list[torch.Tensor], np.ndarray]:
    """Consecutive pieces of the documents, each of at most `length` tokens and at least `least`, evenly spread.

    Returns:
        At most `limit` tensors `[T]`, int64, and the document's number of each, `[N]`.
    """
    ids, mask = tokens.chunks(length)
    sizes = mask.sum(1)
    documents = np.repeat(np.arange(len(tokens.names)), -(-(np.diff(tokens.starts) - 1) // length))
    fitting = np.flatnonzero(sizes >= least)
    chosen = fitting[np.arange(min(limit, len(fitting))) * len(fitting) // max(1, min(limit, len(fitting)))]
    return [torch.from_numpy(ids[i, : sizes[i]].copy()) for i in chosen], documents[chosen]


def cut_by_length(tokens: TokenArray, length: int, limit: int) -> Texts:
    """Pieces of an eighth, a quarter, a half of a chunk's length and of the whole, where documents are so long.

    Raises:
        InputError: no document is long enough for any.
    """
    lengths = sorted({max(1, length >> shift) for shift in range(4)})
    ids, documents = {}, {}
    for size in lengths:
        pieces, groups = cut(tokens, size, limit, size)
        if pieces:
            ids[size], documents[size] = torch.stack(pieces).numpy(), groups
    if lengths[0] not in ids:
        raise InputError(f"expected documents of at least {lengths[0]} tokens to calibrate on, got none")
    return Texts(ids, documents)
