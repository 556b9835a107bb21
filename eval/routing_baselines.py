"""What else could route: character n-grams, TF-IDF centroids, a probe on latents, the host's own loss, PEFT's Arrow.

Each gives every piece a score per domain, the lower the better, `[N, n]`, and sees the training part alone.

Axes: `N` pieces, `n` domains, `T` tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import nn

from hf_crouter.errors import InputError
from hf_crouter.routing.adapters import AdapterStack

BUCKETS = 1 << 18
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def gram_buckets(text: str, orders: Sequence[int] = (1, 2, 3, 4)) -> np.ndarray:
    """Buckets of all character n-grams of a text, `[grams]`, int64."""
    characters = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)
    parts = []
    for order in orders:
        if len(characters) < order:
            continue
        code = np.full(len(characters) - order + 1, order, dtype=np.uint64)
        for shift in range(order):
            code = (code ^ characters[shift : len(characters) - order + 1 + shift]) * _MULTIPLIER
            code ^= code >> np.uint64(29)
        parts.append((code * _MULTIPLIER) >> np.uint64(64 - 18))
    return np.concatenate(parts).astype(np.int64) if parts else np.empty(0, dtype=np.int64)


class CharacterGrams:
    """Naive Bayes over hashed character 1- to 4-grams; scores are nats a gram.

    Args:
        texts: training texts of each domain.
        prior: pseudo-count of every bucket.
    """

    def __init__(self, texts: Sequence[Sequence[str]], prior: float = 0.1):
        counts = np.full((len(texts), BUCKETS), prior)
        for row, some in zip(counts, texts, strict=True):
            for text in some:
                row += np.bincount(gram_buckets(text), minlength=BUCKETS)
        self.log_shares = np.log(counts / counts.sum(1, keepdims=True)).astype(np.float32)

    @property
    def nbytes(self) -> int:
        """Bytes of all domains."""
        return self.log_shares.nbytes

    def scores(self, texts: Sequence[str]) -> np.ndarray:
        """`[N, n]`."""
        return np.stack([-self.log_shares[:, gram_buckets(text)].mean(1) for text in texts])


class TfIdfCentroids:
    """Cosine between a piece's TF-IDF vector over token ids and the mean one of each domain; scores are 1 - cosine.

    Args:
        pieces: training pieces of each domain, token ids.
        vocab_size: ids lie below it.
    """

    def __init__(self, pieces: Sequence[Sequence[np.ndarray]], vocab_size: int):
        found = np.zeros(vocab_size)
        for some in pieces:
            for piece in some:
                found[np.unique(piece)] += 1
        self.idf = (np.log((1 + sum(map(len, pieces))) / (1 + found)) + 1).astype(np.float32)
        centroids = np.zeros((len(pieces), vocab_size), dtype=np.float32)
        for row, some in zip(centroids, pieces, strict=True):
            for piece in some:
                ids, values = self._vector(piece)
                row[ids] += values
        self.centroids = centroids / np.linalg.norm(centroids, axis=1, keepdims=True)

    @property
    def nbytes(self) -> int:
        """Bytes of all domains."""
        return self.centroids.nbytes + self.idf.nbytes

    def _vector(self, piece: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        ids, counts = np.unique(piece, return_counts=True)
        values = counts * self.idf[ids]
        return ids, values / np.linalg.norm(values)

    def scores(self, pieces: Sequence[np.ndarray]) -> np.ndarray:
        """`[N, n]`."""
        rows = []
        for piece in pieces:
            ids, values = self._vector(piece)
            rows.append(1 - self.centroids[:, ids] @ values)
        return np.stack(rows)


class LatentProbe:
    """Softmax regression on the shared crouter's latents, all of them side by side; scores are minus log-shares.

    Args:
        latents: training latents `[N, M, latent_size]`.
        domains: `[N]`.
        steps: of full-batch AdamW.
        seed: of the first weights.
    """

    def __init__(self, latents: torch.Tensor, domains: torch.Tensor, steps: int = 300, seed: int = 0):
        torch.manual_seed(seed)
        inputs = latents.float().flatten(1)
        with torch.enable_grad():
            self.linear = nn.Linear(inputs.shape[1], int(domains.max()) + 1).to(inputs.device)
            optimizer = torch.optim.AdamW(self.linear.parameters(), lr=2e-3, weight_decay=1e-2)
            for _ in range(steps):
                optimizer.zero_grad()
                F.cross_entropy(self.linear(inputs), domains.to(inputs.device)).backward()
                optimizer.step()
        self.linear.requires_grad_(False)

    @property
    def nbytes(self) -> int:
        """Bytes of all domains."""
        return sum(parameter.nbytes for parameter in self.linear.parameters())

    def scores(self, latents: torch.Tensor) -> np.ndarray:
        """`[N, n]`, from `[N, M, latent_size]`."""
        return -self.linear(latents.float().flatten(1)).log_softmax(-1).cpu().numpy()


@torch.no_grad()
def latents_of(crouter: Any, pieces: Sequence[np.ndarray] | np.ndarray, rows: int) -> torch.Tensor:
    """Latents `[N, M, latent_size]` of pieces of one length, without any adapter."""
    ids = torch.from_numpy(np.asarray(pieces).astype(np.int64))
    return torch.cat([crouter.encode(part.to(crouter.device)).float() for part in ids.split(rows)])


@torch.no_grad()
def host_losses(
    host: Any, stack: AdapterStack | None, number: int, ids: np.ndarray, rows: int, parts: int = 1
) -> np.ndarray:
    """Mean next-token loss of each part of each row under one adapter, `[N, parts]`, nats/token.

    Args:
        host: a decoder.
        stack: its adapters; None: the plain host.
        number: the adapter's place; -1: the plain host.
        ids: `[N, T]`; a row is read at once, so a later part has the earlier ones as context.
        rows: at once.
        parts: equal stretches; the first token of all is not scored.
    """
    found = []
    for start in range(0, len(ids), rows):
        batch = torch.from_numpy(ids[start : start + rows].astype(np.int64)).to(host.device)
        if stack is None:
            logits = host(input_ids=batch, use_cache=False).logits
        else:
            with stack.using([number] * len(batch)):
                logits = host(input_ids=batch, use_cache=False).logits
        pieces = []  # a few rows at a time, float32 logits are large; flat, over a middle axis it takes far longer
        for one, targets in zip(logits.split(8), batch.split(8), strict=True):
            flat = one[:, :-1].float().flatten(0, 1)
            pieces.append(F.cross_entropy(flat, targets[:, 1:].flatten(), reduction="none").view(len(one), -1))
        nats = torch.cat(pieces)
        length = ids.shape[1] // parts
        edges = [0, *(length * (part + 1) - 1 for part in range(parts))]  # target t stands at place t - 1
        found.append(torch.stack([nats[:, a:b].mean(1) for a, b in zip(edges[:-1], edges[1:], strict=True)], 1).cpu())
    return torch.cat(found).float().numpy()


class ArrowVotes:
    """PEFT's Arrow router over the host's adapters: the share of tokens and layers that prefer each.

    Use as a context manager: the host holds PEFT's layers meanwhile.

    Args:
        host: changed in place until the block ends.
        folders: adapters saved by PEFT, in the domains' order.

    Raises:
        InputError: this PEFT has no Arrow.
    """

    def __init__(self, host: Any, folders: Sequence[str]):
        try:
            from peft import ArrowConfig, create_arrow_model
        except ImportError as error:
            raise InputError("arrow: expected a peft with ArrowConfig (0.18 or newer)") from error
        self.count = len(folders)
        self.host, self.flags = host, [parameter.requires_grad for parameter in host.parameters()]
        self.parameters = list(host.parameters())
        self.model = create_arrow_model(host, list(folders), ArrowConfig(top_k=1, router_temperature=1.0))
        self.model.eval()
        self.votes: list[torch.Tensor] = []
        self.width = 0  # of all layers' inputs together
        for module in self.model.modules():
            if type(module).__name__ == "ArrowLoraLinearLayer":
                module.register_forward_pre_hook(self._hook)
                self.width += int(module.in_features)  # pyright: ignore[reportArgumentType]

    def _hook(self, module: Any, inputs: tuple[Any, ...]) -> None:
        hidden = inputs[0]
        near = (hidden.to(module.prototypes.dtype) @ module.prototypes.T).abs().argmax(-1)  # [B, T]
        self.votes.append(F.one_hot(near, self.count).sum(1))

    def __enter__(self) -> ArrowVotes:
        return self

    def __exit__(self, *error: object) -> None:
        self.model.unload()
        if hasattr(self.host, "peft_config"):
            del self.host.peft_config
        for parameter, flag in zip(self.parameters, self.flags, strict=True):
            parameter.requires_grad_(flag)

    @torch.no_grad()
    def scores(self, pieces: Sequence[np.ndarray] | np.ndarray, rows: int) -> np.ndarray:
        """Minus the share of votes, `[N, n]`; pieces of one length."""
        ids = torch.from_numpy(np.asarray(pieces).astype(np.int64))
        found = []
        for batch in ids.split(rows):
            self.votes = []
            self.model(input_ids=batch.to(self.host.device), use_cache=False)
            votes = torch.stack(self.votes).sum(0).float()
            found.append(-(votes / votes.sum(1, keepdim=True)).cpu())
        return torch.cat(found).numpy()


def decoder(tokenizer: Tokenizer) -> Callable[[np.ndarray], str]:
    """Token ids to text."""
    return lambda ids: tokenizer.decode(ids.tolist(), skip_special_tokens=False)
