"""What else could route, without the host: character n-grams, TF-IDF centroids, a probe on latents.

Each gives every piece a score per domain, the lower the better, `[N, n]`, and sees the training part alone.

Axes: `N` pieces, `n` domains.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import TfidfTransformer
from sklearn.preprocessing import normalize
from torch import nn

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

    Not by scikit-learn's `HashingVectorizer`: it joins white space, which tells code from prose, hashes into other
    buckets, and does not say where in the text a gram stands, which borders are found by.

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


def gram_costs(grams: CharacterGrams, tokens: Sequence[str]) -> np.ndarray:
    """Nats of the n-grams that end in each token, `[n, T]`, divided by the number of orders."""
    text = "".join(tokens)
    owner = np.repeat(np.arange(len(tokens)), [len(token) for token in tokens])
    costs = np.zeros((len(grams.log_shares), len(tokens)))
    for order in (1, 2, 3, 4):
        buckets = gram_buckets(text, (order,))
        ends_in = owner[order - 1 :]
        for row, shares in zip(costs, grams.log_shares, strict=True):
            row += np.bincount(ends_in, -shares[buckets] / 4, minlength=len(tokens))
    return costs


class TfIdfCentroids:
    """Cosine between a piece's TF-IDF vector over token ids and the mean one of each domain; scores are 1 - cosine.

    Args:
        pieces: training pieces of each domain, token ids.
        vocab_size: ids lie below it.
    """

    def __init__(self, pieces: Sequence[Sequence[np.ndarray]], vocab_size: int):
        self.vocab_size, self.tfidf = vocab_size, TfidfTransformer()
        self.tfidf.fit(self._counts([piece for some in pieces for piece in some]))
        sums = [np.asarray(self.tfidf.transform(self._counts(some)).sum(0)) for some in pieces]
        self.centroids = normalize(np.concatenate(sums)).astype(np.float32)

    @property
    def nbytes(self) -> int:
        """Bytes of all domains, with the tokens' weights."""
        return self.centroids.nbytes + self.centroids[0].nbytes

    def _counts(self, pieces: Sequence[np.ndarray]) -> csr_matrix:
        ids, ends = np.concatenate(pieces), np.cumsum([0, *map(len, pieces)])
        counts = csr_matrix((np.ones(len(ids), np.float32), ids, ends), (len(pieces), self.vocab_size))
        counts.sum_duplicates()
        return counts

    def scores(self, pieces: Sequence[np.ndarray]) -> np.ndarray:
        """`[N, n]`."""
        return 1 - np.asarray(self.tfidf.transform(self._counts(pieces)) @ self.centroids.T)


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
