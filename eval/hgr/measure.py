"""What a host says of a row's last tokens, arm by arm: log-probabilities, greedy hits, slots.

Axes: `D` rows, `T` scored tokens, `V` vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from eval.arms import ARMS, Reader
from eval.hgr.stand_ins import MeanPool, OtherPrompts, chunk_partners
from eval.rows import Shape
from hf_crouter import Compact, Retrieve
from hf_crouter.hosts.tokenizers import special_ids
from hf_crouter.ngram.archive import Archive
from hf_crouter.ngram.candidates import Evidence, collect
from hf_crouter.ngram.mixture import mix
from hf_crouter.ngram.raw_text import RawText
from hf_crouter.ngram.suffix_index import LONGEST
from hf_crouter.types import Row

BLOCK = 64  # columns that become float32 at once


class Said(NamedTuple):
    """What a host says of the scored tokens.

    Attributes:
        log_probabilities: `[D, T]`, float32, nats.
        right: `[D, T]`, bool: the token is the greedy choice.
        slots: `[D]`, positions that the cache holds before the first scored token.
    """

    log_probabilities: np.ndarray
    right: np.ndarray
    slots: np.ndarray


def exists(name: str, count: int) -> bool:
    """Whether an arm is less than reading everything, with so many chunks in the past."""
    arm = ARMS[name]
    modes = arm.modes or ()
    retrieved = sum(mode.chunks for mode in modes if isinstance(mode, Retrieve))
    kept = sum(mode.slots for mode in modes if isinstance(mode, Compact))
    if arm.special == "oracle":
        return 2 < count <= 8  # all pairs are tried
    return retrieved * 512 + kept * count < count * 512 and arm.extra(count) < count * 512


@torch.inference_mode()
def read(
    reader: Reader,
    name: str,
    rows: np.ndarray,
    shape: Shape,
    count: int,
    tokens: int,
    others: np.ndarray | None = None,
    advance: Callable[[int, int], None] = lambda rows, tokens: None,
) -> Said:
    """Reads rows by one arm, as many at once as `tokens` in a forward allow.

    Args:
        reader: the host and what arms need.
        name: of `ARMS`.
        rows: `[D, shape.length]`, token ids.
        shape: of the rows.
        count: chunks of the past; the latest ones.
        tokens: forwarded at once, about.
        others: `[D, shape.length]`: rows whose soft prompts `shuffled` shows.
        advance: told of rows done, and the tokens that the host read for them.
    """
    arm = ARMS[name]
    some = shape.latest(rows, count).astype(np.int64)
    if arm.special == "oracle":
        return _oracle(reader, some, shape, count, tokens, advance)
    if arm.special == "full_copy":
        return _full_copy(reader, some, shape, tokens, advance)
    if arm.modes is None or (arm.modes == () and not arm.special):  # the host alone, on all or on the latest part
        raw = some if arm.modes is None else shape.latest(rows, 0, arm.extra(count)).astype(np.int64)
        return _plain(reader, raw, shape.target, tokens, advance)
    parts, near = [], (count + 2) * shape.chunk  # of a row's forwards, about
    step = max(1, tokens // min(near, 4 * shape.chunk))
    for first in range(0, len(some), step):
        part = some[first : first + step]
        swap = others[first : first + step] if others is not None else None
        parts.append(_history(reader, name, part, shape, count, swap))
        advance(len(part), part.size)
    return Said(*(np.concatenate(values) for values in zip(*parts, strict=True)))


def _batches(rows: np.ndarray, tokens: int, advance: Callable[[int, int], None]) -> Iterator[np.ndarray]:
    step = max(1, tokens // rows.shape[1])
    for first in range(0, len(rows), step):
        part = rows[first : first + step]
        yield part
        advance(len(part), part.size)


def _logits(reader: Reader, rows: np.ndarray, last: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits `[D, last, V]` of the last tokens and these tokens `[D, last]`."""
    ids = torch.from_numpy(rows.astype(np.int64)).to(reader.host.device)
    return reader.host(input_ids=ids[:, :-1], logits_to_keep=last, use_cache=False).logits, ids[:, -last:]


def _plain(reader: Reader, rows: np.ndarray, last: int, tokens: int, advance: Callable[[int, int], None]) -> Said:
    """What the host alone says of the last tokens of rows `[D, T]` that it reads whole."""
    parts = []
    for some in _batches(rows, tokens, advance):
        logits, targets = _logits(reader, some, last)
        scores, hits = [], []
        for start in range(0, last, BLOCK):
            part, chosen = logits[:, start : start + BLOCK].float(), targets[:, start : start + BLOCK]
            scores.append(part.gather(-1, chosen[..., None])[..., 0] - part.logsumexp(-1))
            hits.append(part.argmax(-1) == chosen)
        parts.append((torch.cat(scores, 1).cpu().numpy(), torch.cat(hits, 1).cpu().numpy()))
    slots = np.full(len(rows), rows.shape[1] - last, np.float32)
    return Said(*(np.concatenate(values) for values in zip(*parts, strict=True)), slots)


def _history(
    reader: Reader, name: str, rows: np.ndarray, shape: Shape, count: int, others: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same by the product, with the slots of each row where its prompt ends."""
    ids = torch.from_numpy(rows).to(reader.host.device)
    swapped = OtherPrompts({}, reader.projector) if name == "shuffled" else None
    modes = [swapped] if swapped else [MeanPool()] if name == "mean_pool" else None
    history = reader.history(name, count, modes)
    assert history is not None
    try:
        if swapped is not None:
            assert others is not None
            swapped.others.update(chunk_partners(history.policy, rows, shape.latest(others, count), shape.split))
        scored, greedy = history.score(ids, last=shape.target, greedy=True)
        prompt = rows.shape[1] - shape.target
        slots = [_slots(history.policy, row[:prompt].cpu()) for row in ids]
    finally:
        history.detach()
    return scored.cpu().numpy(), greedy.cpu().numpy(), np.array(slots, np.float32)


def _slots(policy, ids: torch.Tensor) -> int:
    row = policy.extend(Row(0, prompt=len(ids)), ids)
    return policy.slots(policy.retrieve(row, ids), len(ids))


def _oracle(
    reader: Reader, rows: np.ndarray, shape: Shape, count: int, tokens: int, advance: Callable[[int, int], None]
) -> Said:
    """The pair of chunks of least loss, each read raw before the window."""
    best: Said | None = None
    for pair in itertools.combinations(range(count), 2):
        starts = [shape.prefix + n * shape.chunk for n in pair]
        chunks = [rows[:, start : start + shape.chunk] for start in starts]
        end = shape.prefix + count * shape.chunk
        raw = np.concatenate([rows[:, : shape.prefix], *chunks, rows[:, end:]], axis=1)
        said = _plain(reader, raw, shape.target, tokens, lambda *_: None)
        if best is None:
            best = said
            continue
        better = said.log_probabilities.mean(1) > best.log_probabilities.mean(1)
        both = zip(said[:2], best[:2], strict=True)
        best = Said(*(np.where(better[:, None], new, old) for new, old in both), said.slots)
    assert best is not None
    advance(len(rows), rows.size)
    return best


def _full_copy(
    reader: Reader, rows: np.ndarray, shape: Shape, tokens: int, advance: Callable[[int, int], None]
) -> Said:
    """The whole text raw, and copying from the part that another arm would hold compressed."""
    gate = reader.own_gate().to(reader.host.device)
    stop_ids = special_ids(reader.tokenizer, reader.host)
    scores, hits = [], []
    for part in _batches(rows, tokens, advance):
        logits, targets = _logits(reader, part, shape.target)
        for row, own, wanted in zip(part, logits, targets, strict=True):
            past = row[shape.prefix : len(row) - shape.target - shape.window]
            archive = Archive.empty(own.shape[-1], stop_ids).extended(past)
            first = len(row) - shape.target
            raw = RawText((), row.astype(np.int64))
            evidence = [
                Evidence.of(archive, row[max(0, end - LONGEST) : end], raw, end) for end in range(first, len(row))
            ]
            said, right = [], []
            for start in range(0, shape.target, BLOCK):
                view, chosen = own[start : start + BLOCK], wanted[start : start + BLOCK]
                mixture = mix(view, collect(evidence[start : start + BLOCK]).to(view.device), gate)
                said.append(mixture.of(chosen, view))
                right.append(mixture.greedy() == chosen)
            scores.append(torch.cat(said).cpu().numpy())
            hits.append(torch.cat(right).cpu().numpy())
    slots = np.full(len(rows), rows.shape[1] - shape.target, np.float32)
    return Said(np.stack(scores), np.stack(hits), slots)


def partners(names: Sequence[str], clusters: Sequence[str]) -> np.ndarray:
    """For every row one of another text: the next one of its package where there is one, else the next of the set."""
    texts = [name.partition("#")[0] for name in names]  # `#k`: window k of a text
    found = np.arange(len(names))
    for i in range(len(names)):
        others = [(i + n) % len(names) for n in range(1, len(names)) if texts[(i + n) % len(names)] != texts[i]]
        own = [j for j in others if clusters[j] == clusters[i]]
        found[i] = (own or others or [i])[0]
    return found
