"""Key-value pairs made while the host reads: chunks that leave the window are read once more, with what follows them.

A row's new chunks are cut into blocks of at most `Compressor.block` tokens. The reads of a row are: the raw prefix;
then block after block, and last the `window` tokens that follow the last chunk, each over the pairs of earlier chunks
and the raw block before it. In the forward of a read, layer after layer, the block before it is compressed from its
keys, its values and the queries of that read, and its raw slots make room for the pairs. So what is raw at any time is
two blocks, nothing but pairs is kept of a layer that the forward has passed, and all of it is a function of the row's
tokens: never of beams, drafts or of how decoding was cut. The same happens at a prompt's end (many blocks) and while
decoding (one chunk).

Everything keeps its true position. Rows whose reads have equal shapes are read together; equal rows (beams) once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ..errors import InputError
from ..hosts.attention import Attention, attention_met
from ..hosts.devices import input_device
from ..types import Entries, LayerRead, PairCompressor, Pairs, Row
from .kv_cache import CompressedCache
from .layout import row_experts
from .masks import piece_masks, sliding_layers
from .pairs import MadePairs
from .policy import ContextPolicy, ids_key

ROWS = 8  # read together


class _Pieces(DynamicLayer):
    """A layer that keeps what it is given in pieces, so that one can be replaced, and none is copied for long."""

    def __init__(self, pieces: list[Pairs]):
        super().__init__()
        self.pieces, self.is_initialized = pieces, True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Pairs:
        """Keys and values of all pieces, the new one behind them."""
        self.pieces.append((key_states, value_states))
        joined = [torch.cat([piece[k].to(key_states.device) for piece in self.pieces], 2) for k in (0, 1)]
        return joined[0], joined[1]

    def get_seq_length(self) -> int:
        """Slots of all pieces."""
        return sum(keys.shape[2] for keys, _ in self.pieces)


@dataclass(frozen=True)
class _Row:
    """A row that is read.

    Attributes:
        numbers: of the rows of the cache that it stands for; beams are equal.
        row: with every chunk; those of earlier calls have entries.
        ids: the row's tokens, `[T]`.
        missing: numbers of the chunks that are to be compressed.
        end: token after the last read.
    """

    numbers: list[int]
    row: Row
    ids: torch.Tensor
    missing: tuple[int, ...]
    end: int


@dataclass
class _Reading:
    """Rows that are read alike, under way.

    Attributes:
        rows: B of them.
        layers: of the host, in pieces: known pairs, prefix, then new pairs, a block that waits, what was read last.
        raw: positions of the raw tokens among them, `[S]`, of the first row.
        waiting: chunks of the block that was read last, by their places in `missing`.
        observed: of that block, by layer.
        made: pairs `[B, heads, n, D]` of each new chunk, by layer.
        ends: tokens of the row that each new chunk's pairs depend on.
    """

    rows: Sequence[_Row]
    layers: list[_Pieces]
    raw: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    waiting: tuple[int, ...] = ()
    observed: dict[int, Any] = field(default_factory=dict)
    made: list[list[Pairs]] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)


@torch.no_grad()
def pairs_by_reading(
    host: Any, policy: ContextPolicy, cache: CompressedCache, rows: Sequence[Row], tokens: Sequence[torch.Tensor]
) -> list[Row]:
    """The rows with entries for every chunk; the cache gets the pairs of new ones and no longer holds any slots.

    Args:
        host: the plain host.
        policy: its rule; its compressor has a `block`.
        cache: that holds the pairs of earlier chunks.
        rows: with every chunk that their tokens call for, routed.
        tokens: each row's decided tokens without padding, `[T]`.

    Raises:
        InputError: a host whose attention hides its queries, or pairs that are not finite.
    """
    wanted: dict[Any, _Row] = {}
    for number, (row, ids) in enumerate(zip(rows, tokens, strict=True)):
        missing = tuple(n for n, chunk in enumerate(row.chunks) if chunk.entries is None)
        if not missing:
            continue
        end = policy.compressed_at(row.chunks[-1], ids)
        made = tuple(id(chunk.entries) for chunk in row.chunks[: missing[0]])  # with them, all of the row before
        key = (made, row.prefix, tuple(row.chunks[n].end for n in missing), ids_key(ids[:end].cpu()))
        wanted.setdefault(key, _Row([], row, ids, missing, end)).numbers.append(number)
    groups: dict[Any, list[_Row]] = {}
    for some in wanted.values():
        groups.setdefault(_shape(some, cache), []).append(some)
    count = host.config.get_text_config(decoder=True).num_hidden_layers
    all_made, found = MadePairs.none(count), list(rows)
    for group in groups.values():
        for first in range(0, len(group), ROWS):
            reading = _read_all(host, policy, cache, group[first : first + ROWS])
            _hand_over(reading, all_made, found)
    cache.add_pairs(all_made)
    return found


def _shape(some: _Row, cache: CompressedCache) -> tuple:
    """Equal for rows that are read in the same pieces over equally many pairs."""
    places = cache.places
    kept = tuple(places.count(some.numbers[0], layer) for layer in range(places.layers)) if places is not None else ()
    return (
        kept,
        some.row.prefix,
        tuple((some.row.chunks[n].start, some.row.chunks[n].end) for n in some.missing),
        some.end,
    )


def _blocks(row: Row, missing: Sequence[int], most: int) -> list[tuple[int, ...]]:
    """Places of the missing chunks in runs of at most `most` tokens, one chunk at least."""
    blocks: list[tuple[int, ...]] = []
    for place, number in enumerate(missing):
        if blocks and row.chunks[number].end - row.chunks[missing[blocks[-1][0]]].start <= most:
            blocks[-1] = (*blocks[-1], place)
        else:
            blocks.append((place,))
    return blocks


def _read_all(host: Any, policy: ContextPolicy, cache: CompressedCache, rows: Sequence[_Row]) -> _Reading:
    compressor = cast(PairCompressor, policy.compressor)
    count = host.config.get_text_config(decoder=True).num_hidden_layers
    reading = _Reading(rows, [_Pieces([]) for _ in range(count)], made=[[] for _ in range(count)])
    lead = rows[0]
    blocks = _blocks(lead.row, lead.missing, compressor.block)
    spans = [(lead.missing[block[0]], lead.missing[block[-1]]) for block in blocks]
    pieces = [(lead.row.chunks[a].start, lead.row.chunks[b].end) for a, b in spans]
    if lead.row.prefix:  # which sees no pairs
        _read(host, policy, reading, (0, lead.row.prefix), (), keep=True)
    for number, layer in enumerate(reading.layers):
        layer.pieces[:0] = _known(cache, rows, number)
    for piece, block in zip(pieces, blocks, strict=True):
        _read(host, policy, reading, piece, block, keep=True)
    _read(host, policy, reading, (pieces[-1][1], lead.end), (), keep=False)
    return reading


def _known(cache: CompressedCache, rows: Sequence[_Row], layer: int) -> list[Pairs]:
    """Pairs of earlier chunks as they stand in the cache."""
    found = [pairs for row in rows if (pairs := cache.pairs_of_row(row.numbers[0], layer)) is not None]
    if len(found) < 2:
        return found
    return [(torch.cat([keys for keys, _ in found]), torch.cat([values for _, values in found]))]


def _read(
    host: Any,
    policy: ContextPolicy,
    reading: _Reading,
    piece: tuple[int, int],
    block: tuple[int, ...],
    keep: bool,
) -> None:
    """One forward of the next piece of each row, in which the block before it is compressed.

    Args:
        host: the plain host.
        policy: its rule.
        reading: of the rows.
        piece: tokens `(first, end)` of each row.
        block: chunks that the piece holds, by their places in `missing`.
        keep: whether its keys and values are needed later.
    """
    compressor = cast(PairCompressor, policy.compressor)
    (first, end), lead, device = piece, reading.rows[0], input_device(host)
    slides = sliding_layers(host)
    before, waiting = len(reading.raw), reading.waiting
    size = _tokens(lead, waiting)
    spans = [(lead.row.chunks[n].start, lead.row.chunks[n].end) for n in (lead.missing[place] for place in waiting)]
    own = [(lead.row.chunks[n].start, lead.row.chunks[n].end) for n in (lead.missing[place] for place in block)]
    observed: dict[int, Any] = {}

    def seen(attention: Attention) -> None:
        layer, slots, new = attention.layer, attention.keys.shape[2], end - first
        held = reading.layers[layer].pieces

        def read_of(chunks: list[tuple[int, int]], start: int) -> LayerRead:
            shifted = [(start + a - chunks[0][0], start + b - chunks[0][0]) for a, b in chunks]
            return LayerRead(
                layer, attention.keys, attention.values, attention.queries, attention.scaling, attention.softcap,
                attention.sinks, (shifted[0][0], shifted[-1][1]), tuple(shifted),
            )  # fmt: skip

        if block and not slides[layer]:
            observed[layer] = compressor.observe(read_of(own, slots - new))
        if waiting:
            pairs = []
            if not slides[layer]:
                pairs = compressor.compress(read_of(spans, slots - new - size), reading.observed.pop(layer))
                reading.made[layer] += pairs
            held[-2:-1] = [_joined(pairs)] if pairs else []
        if not keep:
            held.pop()

    past: Any = DynamicCache()
    past.layers = reading.layers
    ids, positions = torch.stack([some.ids[first:end] for some in reading.rows]), torch.arange(first, end)
    kept = [0 if slides[n] else layer.get_seq_length() - before for n, layer in enumerate(reading.layers)]
    masks = piece_masks(host, kept, reading.raw, positions, len(reading.rows), device)
    served = torch.stack([row_experts(some.row, positions) for some in reading.rows])
    with policy.serving(served), attention_met(host, masks.of, seen):
        host.base_model(
            input_ids=ids.to(device),
            past_key_values=past,
            attention_mask=masks.stand_in,
            position_ids=positions[None].expand(len(ids), -1).to(device),
            use_cache=True,
        )
    reading.raw = reading.raw[: before - size]
    if keep:
        reading.raw = torch.cat([reading.raw, positions])
    reading.ends += [end] * len(waiting)
    reading.waiting, reading.observed = block, observed


def _tokens(some: _Row, places: Sequence[int]) -> int:
    chunks = [some.row.chunks[some.missing[place]] for place in places]
    return chunks[-1].end - chunks[0].start if chunks else 0


def _joined(pairs: Sequence[Pairs]) -> Pairs:
    return torch.cat([keys for keys, _ in pairs], 2), torch.cat([values for _, values in pairs], 2)


def _hand_over(reading: _Reading, made: MadePairs, rows: list[Row]) -> None:
    """Gives the rows of a reading their entries, and `made` the pairs."""
    counts = [tuple(layer[place][0].shape[2] if layer else None for layer in reading.made)
              for place in range(len(reading.ends))]  # fmt: skip
    for some in reading.rows:
        for number in some.numbers:
            chunks = list(rows[number].chunks)
            for place, chunk in enumerate(some.missing):
                entries = Entries(pairs=counts[place])
                chunks[chunk] = replace(chunks[chunk], entries=entries, decided_at=reading.ends[place])
                made.counts[number, chunk] = counts[place]
            rows[number] = replace(rows[number], chunks=tuple(chunks))
    flags = [part.isfinite().all().cpu() for layer in reading.made for pair in layer[-1:] for part in pair]
    if flags and not bool(torch.stack(flags).all()):
        raise InputError("entries: expected finite numbers, got others; the host's keys or values are not")
    for layer, all_pairs in enumerate(reading.made):
        for place, (keys, values) in enumerate(all_pairs):
            for i, some in enumerate(reading.rows):
                for number in some.numbers:
                    made.made[layer][number, some.missing[place]] = keys[i], values[i]
        all_pairs.clear()
