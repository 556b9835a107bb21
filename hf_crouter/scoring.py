"""Log-probabilities of given tokens as `generate` would have seen them, in few passes."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from .cache.capacity import check_length
from .cache.kv_cache import CompressedDynamicCache
from .cache.masks import given_to, mask_and_positions
from .cache.policy import ContextPolicy
from .cache.prefill import prefill
from .errors import InputError
from .hosts.devices import input_device
from .hosts.pair_probe import check_pairs
from .hosts.probe import check_reading
from .hosts.rope import rope_switch
from .types import Opening, Row, ScoreState
from .utils.batching import left_pads

COLUMNS = 512  # most logits a row at once
BLOCK = 64  # columns that become float32 at once


class Scored(NamedTuple):
    """What came of scoring.

    Attributes:
        log_probabilities: `[B, last]`, float32, nats.
        greedy: `[B, last]`, bool: the token had the highest score; all False where it was not asked.
        cache: as it stands after the last token.
        states: changes of the scores, opened.
    """

    log_probabilities: torch.Tensor
    greedy: torch.Tensor
    cache: CompressedDynamicCache
    states: Sequence[ScoreState]


@torch.no_grad()
def score_last(
    host: Any,
    policy: ContextPolicy,
    open_states: Callable[[Opening], Sequence[ScoreState]],
    input_ids: torch.Tensor,
    last: int | Sequence[int],
    attention_mask: torch.Tensor | None,
    *,
    archive_scored: bool,
    greedy: bool,
) -> Scored:
    """Scores the last tokens of each row; see `CompressedHistory.score`.

    Args:
        host: the plain host.
        policy: what a row's tokens call for.
        open_states: makes the changes of the scores, once something is compressed.
        input_ids: `[B, T]`, left-padded.
        last: tokens scored at the end of each row, or of every row its own number.
        attention_mask: `[B, T]`.
        archive_scored: whether the scored tokens are a given text, archived like the prompt.
        greedy: whether it matters which token had the highest score.

    Raises:
        InputError: `last` is not below the shortest row's length, or a mask with holes.
        CapacityError: more history than the host's positions can hold compressed.
    """
    pads, width = left_pads(attention_mask, input_ids), input_ids.shape[1]
    lasts = [last] * len(pads) if isinstance(last, int) else [int(n) for n in last]
    if len(lasts) != len(pads):
        raise InputError(f"last: expected one number, or one for each of {len(pads)} rows, got {len(lasts)}")
    if min(lasts) < 1 or max(lasts) >= width - max(pads):
        raise InputError(f"last: expected 1 to {width - max(pads) - 1} (tokens of a row but one), got {last}")
    check_reading(host)
    if policy.true_positions:
        check_pairs(host)
    for ids, pad, n in zip(input_ids, pads, lasts, strict=True):
        prompt = width - pad - n
        prefix = policy.raw_prefix(ids[pad:], prompt) if width - pad - 1 >= policy.fewest else 0
        if width - pad - 1 - prefix >= policy.fewest:
            check_length(host, policy, prefix, prompt, n - 1)
    first, ends = width - max(lasts), [width - n for n in lasts]  # of the rows' prompts
    states: Sequence[ScoreState] | None = None
    pieces, best, cache = [], [], CompressedDynamicCache(config=host.config.get_text_config(decoder=True))
    for start, end, logits in read_on(host, policy, cache, input_ids, pads, ends):
        targets = input_ids[:, start:end].to(logits.device)
        if states is None and cache.compressed:
            archived = tuple([width] * len(ends) if archive_scored else ends)
            opening = Opening(logits.shape[-1], first, len(pads), archived, policy.chunker.same_tokenizer)
            states = open_states(opening)
        scored, chosen = _scored(logits, targets, states or (), cache, input_ids, start, greedy)
        pieces.append(scored)
        best.append(chosen)
    return Scored(torch.cat(pieces, dim=1), torch.cat(best, dim=1), cache, states or ())


@torch.no_grad()
def read_on(
    host: Any,
    policy: ContextPolicy,
    cache: CompressedDynamicCache,
    input_ids: torch.Tensor,
    pads: Sequence[int],
    ends: Sequence[int],
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Reads given rows as `generate` would, in few passes.

    Args:
        host: the plain host.
        policy: what a row's tokens call for.
        cache: an empty one.
        input_ids: `[B, T]`, left-padded.
        pads: padding columns of each row.
        ends: columns at which the rows' prompts end; those from the first of them on are predicted.

    Yields:
        Columns `(first, end)` and the host's logits for the tokens in them, `[B, end - first, V]`; the cache stands as
        it was read for them.
    """
    switch, device = rope_switch(host), input_device(host)
    rows = [Row(pad, prompt=end - pad) for pad, end in zip(pads, ends, strict=True)]
    cache.start(rows, input_ids, policy.key)
    first, width = min(ends), input_ids.shape[1]
    while first < width:
        end = _segment(policy, cache.rows, input_ids, first, switch)
        main = end - first
        ids = input_ids[:, : end - 1]
        prefill(host, policy, cache, ids, first, main, one_rotation=True)
        mask, positions = mask_and_positions(host, cache, main, device)
        with policy.serving(cache.experts[:, -main:]), given_to(host, mask) as given:
            out = host(
                input_ids=ids[:, -main:].to(device),
                past_key_values=cache,
                attention_mask=given,
                position_ids=positions,
                return_dict=True,
                use_cache=True,
            )
        yield first, end, out.logits
        first = end


def _segment(
    policy: ContextPolicy, rows: tuple[Row, ...], input_ids: torch.Tensor, first: int, switch: int | None
) -> int:
    """Column after the longest run of targets from `first` on that see the same chunks compressed and retrieved.

    On a host whose rotary factors switch, it also ends where the slots cross the switch.
    """
    limit = min(first + COLUMNS, input_ids.shape[1])
    end = limit
    for i, row in enumerate(rows):
        row = policy.extend(row, input_ids[i, row.pad : first])
        end = min(end, row.pad + policy.next_retrieval(row, first - row.pad))
        if switch is not None:
            left = switch - policy.slots(policy.retrieve(row, input_ids[i, row.pad : first]), first - row.pad)
            end = min(end, first + 1 + left) if left >= 0 else end
        if row.pad + row.prompt > first:
            end = min(end, row.pad + row.prompt)  # where a shorter part begins, its row chooses

        def grown(column: int, i: int = i, row: Row = row) -> bool:
            return len(policy.extend(row, input_ids[i, row.pad : column]).chunks) > len(row.chunks)

        # a chunk once compressed stays so: the first column at which there is one more is found by halving
        end = first + 1 + bisect.bisect_left(range(first + 1, end), True, key=grown)
    return end


def _scored(
    logits: torch.Tensor,
    targets: torch.Tensor,
    states: Sequence[ScoreState],
    cache: CompressedDynamicCache,
    input_ids: torch.Tensor,
    first: int,
    greedy: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of targets, and whether each had the highest.

    Args:
        logits: `[B, T, V]`; a few columns at once become float32.
        targets: `[B, T]`.
        states: changes of the scores, one after the other; without any the host's own stay.
        cache: that the logits come from.
        input_ids: `[B, width]`.
        first: column of `input_ids` in which the first target stands.
        greedy: whether it matters which token had the highest score.

    Returns:
        `[B, T]`, float32, and `[B, T]`, bool, all False if it does not matter.
    """
    scores, hits = [], []
    for start in range(0, targets.shape[1], BLOCK):
        part, chosen = logits[:, start : start + BLOCK].flatten(0, 1), targets[:, start : start + BLOCK]
        columns = range(first + start, first + start + chosen.shape[1])
        changed = None
        for state in states:
            if changed is not None:
                part = changed.log_probabilities(part)
            changed = state.rescore(cache, input_ids, columns, part)
        if changed is None:
            part = part.float()
            found = part.gather(1, chosen.reshape(-1, 1))[:, 0] - part.logsumexp(-1)
        else:
            found = changed.of(chosen.flatten(), part)
        scores.append(found.view_as(chosen))
        hits.append(torch.zeros_like(chosen, dtype=torch.bool))
        if greedy:
            best = part.argmax(-1) if changed is None else changed.greedy()
            hits[-1] = best.view_as(chosen) == chosen
    return torch.cat(scores, dim=1), torch.cat(hits, dim=1)
