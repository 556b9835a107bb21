"""Key-value pairs made while the host reads: chunks that leave the window are read once more, with what follows them.

A row's new chunks are cut into blocks of at most `Compressor.block` tokens. The reads of a row are: the raw prefix;
then block after block, and last the `window` tokens that follow the last chunk, each over the pairs of earlier chunks
and the raw block before it. In the forward of a read, layer after layer, the block before it is compressed from its
keys, its values and the queries of that read, and its raw slots make room for the pairs. So what is raw at any time is
two blocks, nothing but pairs is kept of a layer that the forward has passed, and all of it is a function of the row's
tokens: never of beams, drafts or of how decoding was cut. The same happens at a prompt's end (many blocks) and while
decoding (one chunk).

Everything keeps its true position while that fits the host. From the first read on that does not (`positions.py`), a
row's pairs stand at compact positions and what is read comes right behind them: the block before, moved up to the
pairs, and the piece itself. A pair's keys are rotated once, in float32, from where the host made them to where they
stay; a waiting block's for the time of a read, too.

Rows whose reads have equal shapes are read together; equal rows (beams) once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ..errors import InputError
from ..hosts.attention import Attention, attention_met, sliding_layers
from ..hosts.devices import input_device
from ..hosts.rotation import KeyRotation
from ..types import Entries, LayerRead, PairCompressor, Pairs, Row
from .capacity import check_read, read_block
from .kv_cache import CompressedCache, Layer
from .layout import row_experts
from .masks import PieceMasks, masked_by_kernel
from .pairs import MadePairs
from .policy import ContextPolicy, ids_key
from .positions import spread

ROWS, TOKENS = 8, 8 * 2048  # read together at most


class _Pieces(DynamicLayer):
    """A layer that keeps what it is given in pieces, so that some can be replaced, and none is copied for long.

    Attributes:
        known: pairs of earlier chunks.
        prefix: raw.
        pairs: of new chunks, a piece a block.
        raw: a block that waits, then what was read last.
        turned: gives the waiting block's keys where they stand now; None where they were made there.
    """

    def __init__(self):
        super().__init__()
        self.known: list[Layer] = []
        self.prefix: list[Layer] = []
        self.pairs: list[Layer] = []
        self.raw: list[Layer] = []
        self.turned: Callable[[torch.Tensor], torch.Tensor] | None = None
        self.is_initialized = True

    @property
    def pieces(self) -> list[Layer]:
        """All, in the order of their slots."""
        return [*self.known, *self.prefix, *self.pairs, *self.raw]

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Layer:
        """Keys and values of all pieces, the new one behind them."""
        self.raw.append((key_states, value_states))
        pieces = self.pieces
        if self.turned is not None:
            pieces[-2] = self.turned(pieces[-2][0]), pieces[-2][1]
        device = key_states.device
        joined = [torch.cat([p[k] if p[k].device == device else p[k].to(device) for p in pieces], 2) for k in (0, 1)]
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


@dataclass(frozen=True, eq=False)
class _Made:
    """A layer's pairs of one block of new chunks, one chunk's behind the other's.

    Attributes:
        keys: `[B, heads, n, D]`.
        values: likewise.
        places: tokens before each pair in its chunk, `[B, heads, n]` int32; None where pairs stay.
        counts: how many are each chunk's.
        chunks: the chunks, by their places in `missing`.
    """

    keys: torch.Tensor
    values: torch.Tensor
    places: torch.Tensor | None
    counts: tuple[int, ...]
    chunks: tuple[int, ...]


@dataclass
class _Reading:
    """Rows that are read alike, under way.

    Attributes:
        rows: B of them.
        layers: of the host, in pieces.
        compact: whether pairs stand at compact positions, and what is read comes behind them.
        behind: position behind the pairs at compact ones.
        prefix: tokens of it that were read.
        waiting: chunks of the block that was read last, by their places in `missing`.
        made_at: position at which that block's keys were made, its first token's.
        observed: of that block, by layer.
        made: pairs of each block, by layer.
        counts: of each new chunk how many pairs each layer keeps; None in one that keeps nothing old.
        ends: tokens of the row that each new chunk's pairs depend on.
    """

    rows: Sequence[_Row]
    layers: list[_Pieces]
    compact: bool
    behind: int
    prefix: int = 0
    waiting: tuple[int, ...] = ()
    made_at: int = 0
    observed: dict[int, Any] = field(default_factory=dict)
    made: list[list[_Made]] = field(default_factory=list)
    counts: list[tuple[int | None, ...]] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)

    def span(self, place: int) -> tuple[int, int]:
        """Tokens of a new chunk."""
        chunk = self.rows[0].row.chunks[self.rows[0].missing[place]]
        return chunk.start, chunk.end

    def entries(self, place: int) -> int:
        """Positions that a new chunk's pairs take in a compact row."""
        return len(Entries(pairs=self.counts[place]))


@torch.no_grad()
def pairs_by_reading(
    host: Any, policy: ContextPolicy, cache: CompressedCache, rows: Sequence[Row], tokens: Sequence[torch.Tensor]
) -> list[Row]:
    """The rows with entries for every chunk; the cache gets the pairs of new ones and no longer holds any slots.

    Pairs of rows that have become compact are moved.

    Args:
        host: the plain host.
        policy: its rule; its compressor has a `block`.
        cache: that holds the pairs of earlier chunks.
        rows: with every chunk that their tokens call for, routed.
        tokens: each row's decided tokens without padding, `[T]`.

    Raises:
        CapacityError: reads that do not fit the host's positions.
        InputError: a host whose attention hides its queries or whose keys cannot be moved; pairs that are not finite.
    """
    wanted: dict[Any, _Row] = {}
    for number, (row, ids) in enumerate(zip(rows, tokens, strict=True)):
        missing = tuple(n for n, chunk in enumerate(row.chunks) if chunk.entries is None)
        if not missing:
            continue
        end = policy.compressed_at(row.chunks[-1], ids)
        made = tuple(id(chunk.entries) for chunk in row.chunks[: missing[0]])  # with them, all of the row before
        states = row.compact, cache.rows[number].compact
        key = (made, states, row.prefix, tuple(row.chunks[n].end for n in missing), ids_key(ids[:end].cpu()))
        wanted.setdefault(key, _Row([], row, ids, missing, end)).numbers.append(number)
    groups: dict[Any, list[_Row]] = {}
    for some in wanted.values():
        groups.setdefault(_shape(some, cache), []).append(some)
    count = host.config.get_text_config(decoder=True).num_hidden_layers
    all_made, found = MadePairs.none(count), list(rows)
    for group in groups.values():
        block = _block(host, policy, group[0])
        some = max(1, min(ROWS, TOKENS // max(1, block)))
        for first in range(0, len(group), some):
            reading = _read_all(host, policy, cache, group[first : first + some], block)
            _hand_over(reading, all_made, found)
    compact = {number: row for number, row in enumerate(rows) if row.compact}
    if compact:
        cache.move_pairs(KeyRotation.of(host), compact)
    cache.add_pairs(all_made)
    return found


def _shape(some: _Row, cache: CompressedCache) -> tuple:
    """Equal for rows that are read in the same pieces, at the same positions, over equally many pairs."""
    places, number = cache.places, some.numbers[0]
    kept = tuple(places.count(number, layer) for layer in range(places.layers)) if places is not None else ()
    return (
        kept,
        some.row.pairs_end,
        some.row.compact,
        cache.rows[number].compact,
        some.row.prefix,
        tuple((some.row.chunks[n].start, some.row.chunks[n].end) for n in some.missing),
        some.end,
    )


def block_tokens(host: Any, compressor: PairCompressor, tokens: int) -> int:
    """Most tokens of a block where so many leave; more for more of them only where no mask of them has to be made."""
    grows = masked_by_kernel(host, input_device(host)) and not any(sliding_layers(host))
    return compressor.block(tokens if grows else 0)


def _block(host: Any, policy: ContextPolicy, some: _Row) -> int:
    tokens = sum(some.row.chunks[n].end - some.row.chunks[n].start for n in some.missing)
    return read_block(policy, some.row, block_tokens(host, cast(PairCompressor, policy.compressor), tokens))


def _blocks(row: Row, missing: Sequence[int], most: int) -> list[tuple[int, ...]]:
    """Places of the missing chunks in runs of at most `most` tokens, one chunk at least."""
    blocks: list[tuple[int, ...]] = []
    for place, number in enumerate(missing):
        if blocks and row.chunks[number].end - row.chunks[missing[blocks[-1][0]]].start <= most:
            blocks[-1] = (*blocks[-1], place)
        else:
            blocks.append((place,))
    return blocks


def _read_all(host: Any, policy: ContextPolicy, cache: CompressedCache, rows: Sequence[_Row], most: int) -> _Reading:
    lead = rows[0]
    layers = [_Pieces() for _ in range(host.config.get_text_config(decoder=True).num_hidden_layers)]
    compact = cache.rows[lead.numbers[0]].compact
    reading = _Reading(rows, layers, compact, lead.row.pairs_end, made=[[] for _ in layers])
    if lead.row.prefix:  # which sees no pairs
        _read(host, policy, reading, (0, lead.row.prefix), (), keep=True)
    _hold_known(cache, reading)
    blocks = _blocks(lead.row, lead.missing, most)
    for block in [*blocks, ()]:
        first, end = reading.span(blocks[-1][-1])[1], lead.end
        if block:
            first, end = reading.span(block[0])[0], reading.span(block[-1])[1]
        if not reading.compact and policy.positions is not None and end > policy.positions:
            _turn(host, cache, reading)
        _read(host, policy, reading, (first, end), block, keep=bool(block))
    if lead.row.compact and not reading.compact:
        _turn(host, cache, reading)
    return reading


def _hold_known(cache: CompressedCache, reading: _Reading) -> None:
    """Takes the pairs of earlier chunks as they stand in the cache."""
    for number, layer in enumerate(reading.layers):
        found = [pairs for row in reading.rows if (pairs := cache.pairs_of_row(row.numbers[0], number)) is not None]
        if len(found) > 1:
            found = [(torch.cat([keys for keys, _ in found]), torch.cat([values for _, values in found]))]
        layer.known = found


def _turn(host: Any, cache: CompressedCache, reading: _Reading) -> None:
    """Moves the pairs so far to compact positions: those in the cache, and those made in this reading."""
    rotation = KeyRotation.of(host)
    for layer in reading.layers:
        layer.known = []
    cache.move_pairs(rotation, {number: some.row for some in reading.rows for number in some.numbers})
    _hold_known(cache, reading)
    starts, sizes = _take_positions(reading, range(len(reading.counts)))
    for number, layer in enumerate(reading.layers):
        reading.made[number] = [
            _moved(rotation, reading, some, number, starts, sizes) for some in reading.made[number]
        ]
        layer.pairs = [(some.keys, some.values) for some in reading.made[number]]
    reading.compact = True


def _take_positions(reading: _Reading, places: Iterable[int]) -> tuple[dict[int, int], dict[int, int]]:
    """The next compact positions for new chunks: where each one's start, by its place in `missing`, and how many."""
    sizes = {place: reading.entries(place) for place in places}
    starts = {}
    for place, size in sizes.items():
        starts[place] = reading.behind
        reading.behind += size
    return starts, sizes


def _moved(
    rotation: KeyRotation, reading: _Reading, pairs: _Made, layer: int, starts: Mapping[int, int],
    sizes: Mapping[int, int], at: int = 0,
) -> _Made:  # fmt: skip
    """Pairs moved to where their chunks' compact positions start, so many a chunk.

    Args:
        rotation: of the host.
        reading: that made them.
        pairs: whose keys stand at their tokens, `at` positions on.
        layer: its number.
        starts: first compact position of each chunk, by its place in `missing`.
        sizes: positions that it takes.
        at: see there.
    """
    assert pairs.places is not None
    by = torch.cat([spread(starts[place], sizes[place], count) - reading.span(place)[0] - at
                    for place, count in zip(pairs.chunks, pairs.counts, strict=True)])  # fmt: skip
    keys = rotation.moved(pairs.keys, by.to(pairs.places.device) - pairs.places, layer).to(pairs.keys.dtype)
    return replace(pairs, keys=keys, places=None)


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
        block: chunks that the piece holds, by their places in `missing`; none in the prefix and in what is last.
        keep: whether its keys and values are needed later.
    """
    compressor = cast(PairCompressor, policy.compressor)
    (first, end), lead, device = piece, reading.rows[0], input_device(host)
    slides, waiting, new = sliding_layers(host), reading.waiting, end - first
    spans, own = [reading.span(place) for place in waiting], [reading.span(place) for place in block]
    size = spans[-1][1] - spans[0][0] if spans else 0
    is_prefix = first < (lead.row.prefix or 0)
    at = reading.behind if reading.compact else first - size  # of the block before
    positions = torch.arange(first if is_prefix else at + size, end if is_prefix else at + size + new)
    check_read(host, policy, lead.row.prefix or 0, int(positions[-1]) + 1)
    for number, layer in enumerate(reading.layers):
        layer.turned = _shift(host, number, at - reading.made_at) if waiting and at != reading.made_at else None
    observed: dict[int, Any] = {}
    made: dict[int, Pairs] = {}

    def seen(attention: Attention) -> None:
        layer, slots = attention.layer, attention.keys.shape[2]
        held = reading.layers[layer]

        if (block or waiting) and not slides[layer]:
            read = LayerRead(
                layer, attention.keys, attention.values, attention.queries, attention.scaling, attention.softcap,
                attention.sinks, _standing(spans, slots - new - size), _standing(own, slots - new),
            )  # fmt: skip
            pairs, observed[layer] = compressor.compress(read, reading.observed.pop(layer, None))
            if pairs is not None:
                if held.turned is not None:  # as they were made: what was moved for this read is rounded
                    pairs = _picked(held.raw[-2][0], [a - spans[0][0] for a, _ in spans], pairs)
                made[layer] = pairs
        if waiting:
            del held.raw[-2]
        if not keep:
            held.raw.pop()

    past: Any = DynamicCache()
    past.layers = reading.layers
    ids = torch.stack([some.ids[first:end] for some in reading.rows])
    raw = torch.cat([torch.arange(reading.prefix), torch.arange(at, at + size)])
    masks = PieceMasks(host, raw, positions, device)
    served = torch.stack([row_experts(some.row, torch.arange(first, end)) for some in reading.rows])
    with policy.serving(served), attention_met(host, masks.of, seen):
        host.base_model(
            input_ids=ids.to(device),
            past_key_values=past,
            attention_mask=masks.stand_in,
            position_ids=positions[None].expand(len(ids), -1).to(device),
            use_cache=True,
        )
    if waiting:
        _settle(host, policy, reading, made)
    if is_prefix:
        reading.prefix = end
        for layer in reading.layers:
            layer.prefix, layer.raw = layer.raw, []
    reading.ends += [end] * len(waiting)
    reading.waiting, reading.made_at, reading.observed = block, int(positions[0]), observed


def _standing(spans: Sequence[tuple[int, int]], start: int) -> tuple[tuple[int, int], ...]:
    """Slots of spans of tokens, of which the first begins at slot `start`."""
    return tuple((start + a - spans[0][0], start + b - spans[0][0]) for a, b in spans)


def _shift(host: Any, layer: int, by: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Moves keys of a layer by a number of positions, in their dtype."""
    rotation = KeyRotation.of(host)
    return lambda keys: rotation.moved(keys, torch.tensor(by), layer).to(keys.dtype)


def _picked(keys: torch.Tensor, starts: Sequence[int], pairs: Pairs) -> Pairs:
    """Pairs of chunks that start at these slots with the keys `[B, heads, slots, D]` that stand at their places."""
    first = torch.tensor(starts).repeat_interleave(torch.tensor(pairs.counts)).to(pairs.places.device)
    return pairs._replace(keys=keys.gather(2, (first + pairs.places)[..., None].expand(-1, -1, -1, keys.shape[-1])))


def _settle(host: Any, policy: ContextPolicy, reading: _Reading, made: dict[int, Pairs]) -> None:
    """Puts the pairs that were made of the waiting block in its place.

    Args:
        host: the plain host.
        policy: its rule.
        reading: of the rows.
        made: pairs of the block's chunks by layer, with keys as the host made them; emptied.
    """
    waiting, layers = reading.waiting, range(len(reading.layers))
    for n in range(len(waiting)):
        reading.counts.append(tuple(made[layer].counts[n] if layer in made else None for layer in layers))
    starts, sizes = _take_positions(reading, waiting if reading.compact else ())
    for layer in layers:
        if layer not in made:
            continue
        keys, values, places, counts = made.pop(layer)
        some = _Made(keys, values, places.int() if policy.positions is not None else None, counts, waiting)
        if reading.compact:
            at = reading.made_at - reading.span(waiting[0])[0]
            some = _moved(KeyRotation.of(host), reading, some, layer, starts, sizes, at)
        reading.layers[layer].pairs.append((some.keys, some.values))
        reading.made[layer].append(some)


def _hand_over(reading: _Reading, made: MadePairs, rows: list[Row]) -> None:
    """Gives the rows of a reading their entries, and `made` the pairs."""
    last = [part for blocks in reading.made for some in blocks[-1:] for part in (some.keys, some.values)]
    flags = [part.isfinite().all().cpu() for part in last]
    if flags and not bool(torch.stack(flags).all()):
        raise InputError("entries: expected finite numbers, got others; the host's keys or values are not")
    places = [_places(blocks) for blocks in reading.made]
    for i, some in enumerate(reading.rows):
        missing = {}
        for place, n in enumerate(some.missing):
            own = None
            if any(of_layer for of_layer in places):
                own = tuple(of_layer[place][i] if of_layer else None for of_layer in places)
            entries = Entries(pairs=reading.counts[place], places=own)
            missing[n] = replace(some.row.chunks[n], entries=entries, decided_at=reading.ends[place])
        for number in some.numbers:
            chunks = tuple(missing.get(n, chunk) for n, chunk in enumerate(rows[number].chunks))
            rows[number] = replace(rows[number], chunks=chunks)
            made.counts |= {(number, n): reading.counts[place] for place, n in enumerate(some.missing)}
    for layer, blocks in enumerate(reading.made):
        if not blocks:
            continue
        keys, values = (
            torch.cat([getattr(some, kind) for some in blocks], 2) if len(blocks) > 1 else getattr(blocks[0], kind)
            for kind in ("keys", "values")
        )
        reading.layers[layer].pairs = []  # they are not held twice
        blocks.clear()
        for i, some in enumerate(reading.rows):
            made.made[layer] |= {number: (keys[i], values[i]) for number in some.numbers}


def _places(blocks: Sequence[_Made]) -> tuple[torch.Tensor, ...]:
    """Places of each chunk's pairs, `[B, heads, n]`; none where pairs stay."""
    found = [some.places for some in blocks if some.places is not None]
    counts = [count for some in blocks for count in some.counts]
    return torch.cat(found, 2).split(counts, 2) if found else ()
