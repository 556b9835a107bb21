"""Documents without exact and near duplicates, and the share of a document that training has seen.

Source: one-permutation MinHash with rotation (Li, Owen and Zhang 2012; Shrivastava and Li 2014).
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from .documents import Document
from .parallel import map_texts
from .shingles import gram_hashes, sorted_unique, token_hashes

SHINGLE = 5  # tokens in the grams whose sets are compared
GRAM = 13  # tokens in the grams of an overlap, as usual in contamination reports
_BINS = 128
_BANDS, _ROWS = 21, 6  # finds 99.9% of pairs at Jaccard 0.8, 27% at 0.5


@dataclass(frozen=True)
class Deduplicated:
    """What is left of a corpus.

    Attributes:
        documents: kept documents, in order of their ids.
        exact: documents dropped because a kept one is the same but for white space.
        near: documents dropped because a kept one has nearly the same shingles.
    """

    documents: list[Document]
    exact: int
    near: int


def deduplicate(
    documents: Iterable[Document],
    *,
    threshold: float = 0.8,
    workers: int | None = None,
    advance: Callable[[int, int], None] | None = None,
) -> Deduplicated:
    """Drops documents that repeat an earlier one; of equals the first in order of ids is kept.

    Args:
        documents: documents of unique ids.
        threshold: Jaccard similarity of two documents' sets of token 5-grams from which the later one is dropped.
        workers: processes; by default one for each core.
        advance: called with (files, characters) as they are read.
    """
    ordered = sorted(documents, key=lambda document: document.id)
    digests: list[bytes] = []
    sketches: list[np.ndarray] = []
    for first, (batch_digests, batch_sketches) in map_texts(_fingerprints, [d.text for d in ordered], workers):
        digests += batch_digests
        sketches.append(batch_sketches)
        if advance is not None:
            done = ordered[first : first + len(batch_digests)]
            advance(len(done), sum(len(document.text) for document in done))
    if not ordered:
        return Deduplicated([], 0, 0)
    signatures = np.concatenate(sketches)
    grams = functools.lru_cache(maxsize=4096)(lambda index: _shingles(ordered[index].text))

    seen: set[bytes] = set()
    buckets: dict[bytes, list[int]] = {}
    kept: list[Document] = []
    exact = near = 0
    for index, document in enumerate(ordered):
        if digests[index] in seen:
            exact += 1
            continue
        seen.add(digests[index])
        row = signatures[index]
        keys = [bytes([band]) + row[band * _ROWS : (band + 1) * _ROWS].tobytes() for band in range(_BANDS)]
        candidates = np.array(sorted({other for key in keys for other in buckets.get(key, ())}), dtype=np.int64)
        if _repeats(index, candidates, signatures, grams, threshold):
            near += 1
            continue
        kept.append(document)
        for key in keys:
            buckets.setdefault(key, []).append(index)
    return Deduplicated(kept, exact, near)


def _repeats(
    index: int,
    candidates: np.ndarray,
    signatures: np.ndarray,
    grams: Callable[[int], np.ndarray],
    threshold: float,
) -> bool:
    # Bins estimate the similarity within about 0.04; only what is within three of these is compared exactly.
    if not len(candidates):
        return False
    estimates = (signatures[candidates] == signatures[index]).mean(axis=1)
    likely = candidates[estimates > threshold - 0.12]
    for other in likely[np.argsort(-estimates[estimates > threshold - 0.12], kind="stable")]:
        left, right = grams(int(other)), grams(index)
        common = len(np.intersect1d(left, right, assume_unique=True))
        if common >= threshold * (len(left) + len(right) - common):
            return True
    return False


def _shingles(text: str) -> np.ndarray:
    tokens = token_hashes(text)
    return sorted_unique(gram_hashes(tokens, min(SHINGLE, max(len(tokens), 1))))


def _fingerprints(texts: list[str]) -> tuple[list[bytes], np.ndarray]:
    digests = [hashlib.blake2b(" ".join(text.split()).encode("utf-8", "surrogatepass"), digest_size=16).digest()
               for text in texts]  # fmt: skip
    return digests, np.stack([_signature(_shingles(text)) for text in texts])


_EDGES = np.arange(_BINS, dtype=np.uint64) << np.uint64(64 - 7)


def _signature(shingles: np.ndarray) -> np.ndarray:
    # The smallest hash in each of 128 equal ranges; shingles are sorted, so it is the first one at or after the edge.
    if not len(shingles):
        return np.zeros(_BINS, dtype=np.uint64)
    first = np.searchsorted(shingles, _EDGES)
    ends = np.append(first[1:], len(shingles))
    empty = first == ends
    if not empty.any():
        return shingles[first]
    # An empty range takes the value of the next filled one, mixed with the distance so that ranges stay distinct.
    filled = np.flatnonzero(~empty)
    source = filled[np.searchsorted(filled, np.arange(_BINS)) % len(filled)]
    distance = (source - np.arange(_BINS)) % _BINS
    return shingles[first[source]] + distance.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)


def training_grams(documents: Sequence[Document], *, workers: int | None = None) -> np.ndarray:
    """Sorted unique 64-bit hashes of all 13-grams of the documents, `[grams]`, uint64."""
    parts = [grams for _, grams in map_texts(_unique_grams, [d.text for d in documents], workers)]
    return sorted_unique(np.concatenate(parts)) if parts else np.empty(0, dtype=np.uint64)


def ngram_overlap(
    documents: Sequence[Document], training_hashes: np.ndarray, *, workers: int | None = None
) -> np.ndarray:
    """Share of each document's 13-grams that also occur in training, `[documents]`, 0 to 1.

    Args:
        documents: the documents to check; one of fewer than 13 tokens has overlap 0.
        training_hashes: as from `training_grams`.
        workers: processes; by default one for each core.
    """
    shares: list[float] = []
    for _, batch in map_texts(_all_grams, [d.text for d in documents], workers):
        lengths = [len(grams) for grams in batch]
        grams = np.concatenate(batch)
        order = np.argsort(grams)  # neighbours in order find their places in memory that is already cached
        at = np.searchsorted(training_hashes, grams[order])
        found = np.zeros(len(grams), dtype=bool)
        inside = at < len(training_hashes)
        found[order[inside]] = training_hashes[at[inside]] == grams[order[inside]]
        hits = np.concatenate(([0], np.cumsum(found)))
        ends = np.cumsum(lengths)
        shares += [
            float(hits[end] - hits[end - length]) / length if length else 0.0
            for end, length in zip(ends, lengths, strict=True)
        ]
    return np.array(shares)


def _unique_grams(texts: list[str]) -> np.ndarray:
    return sorted_unique(np.concatenate(_all_grams(texts)))


def _all_grams(texts: list[str]) -> list[np.ndarray]:
    return [gram_hashes(token_hashes(text), GRAM) for text in texts]
