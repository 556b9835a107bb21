"""How much memory a call takes beyond the host's weights, by shapes: what a budget is held to before work starts.

Three moments can be the highest: a block of leaving chunks is read to make their pairs; the window, and what is
retrieved, is read; a step is decoded. Each is bounded from above by what stands in the cache then and by what a
forward holds besides: its activations, its masks and its scores. `MARGIN` is for what allocators round up.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from typing import Any, cast

from ..errors import CapacityError, InputError
from ..hosts.attention import sliding_layers
from ..hosts.shapes import head_size, layer_kv_bytes
from ..types import PairCompressor
from .policy import ContextPolicy
from .prefill import READ_TOKENS
from .reads import ROWS, TOKENS, block_tokens

MARGIN = 1.1
UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_SCORES = 4  # float32 copies of a step's scores `[B, V]` that `generate` and its processors hold at once
_COPYING = 4  # and copying besides
_ARCHIVED = 192  # bytes of a device for an archived token: its tables, and what a search makes of them


def bytes_of(size: int | str) -> int:
    """A number of bytes, or words such as "2GiB" or "500 MB".

    Raises:
        InputError: anything else.
    """
    if isinstance(size, str):
        number = size.strip().rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ")
        unit = UNITS.get(size.strip()[len(number) :].strip().lower())
        try:
            found = int(float(number) * unit) if unit else 0
        except ValueError:
            found = 0
    else:
        found = size if isinstance(size, int) and not isinstance(size, bool) else 0
    if found <= 0:
        raise InputError(f"budget: expected bytes, or words such as '2GiB', got {size!r}")
    return found


@dataclass(frozen=True)
class Memory:
    """Bytes that a call takes at most beyond the weights.

    Attributes:
        reading: while pairs of leaving chunks are made; 0 where none are.
        window: while the window and retrieved chunks are read.
        decoding: while a token is decoded behind the longest row.
    """

    reading: int
    window: int
    decoding: int

    @property
    def peak(self) -> int:
        """The most of them, with a margin."""
        return int(MARGIN * max(self.reading, self.window, self.decoding))


@dataclass(frozen=True)
class _Shapes:
    """Bytes by a host's configuration.

    Attributes:
        slot: keys and values of a slot, all layers that keep every token.
        sliding: of the layers that keep a sliding window, for as many slots as that has.
        layer: of one layer.
        wide: of one layer, repeated for every query head.
        token: activations of a token in a forward.
        heads: of queries.
        vocab: ids.
        size: of a number.
    """

    slot: int
    sliding: int
    layer: int
    wide: int
    token: int
    heads: int
    vocab: int
    size: int

    @classmethod
    def of(cls, host: Any) -> _Shapes:
        config = host.config.get_text_config(decoder=True)
        size, heads, head = host.dtype.itemsize, config.num_attention_heads, head_size(config)
        layer = layer_kv_bytes(config, host.dtype)
        hidden = config.hidden_size
        inner = getattr(config, "intermediate_size", None) or 4 * hidden
        slides = sliding_layers(host)
        window = getattr(config, "sliding_window", None) or 0
        return cls(
            slot=layer * slides.count(False),
            sliding=layer * slides.count(True) * window,
            layer=layer,
            wide=2 * heads * head * size,
            token=size * (4 * hidden + 3 * inner + 3 * heads * head) + 8 * hidden,
            heads=heads,
            vocab=config.vocab_size,
            size=size,
        )


def memory(host: Any, policy: ContextPolicy, prefix: int, longest: int, rows: int, *, copies: bool) -> Memory:
    """What a call takes at most beyond the host's weights.

    Args:
        host: the plain host.
        policy: its rule.
        prefix: raw tokens kept at the start of a row.
        longest: tokens of the longest row, those to come counted.
        rows: of the batch, beams and several sequences counted.
        copies: whether a mode changes the scores.
    """
    shapes, chunk = _Shapes.of(host), policy.chunker.chunk_length
    chunks = max(0, (longest - prefix - policy.window) // chunk)
    retrieved = min(chunks, policy.retriever.chunks) * chunk if policy.retriever is not None else 0
    raw = min(longest, prefix + policy.window + chunk) + retrieved
    pairs = chunks * policy.most_entries if policy.true_positions else 0
    slots = raw + (0 if policy.true_positions else chunks * policy.most_entries) + pairs
    standing = rows * (slots * shapes.slot + shapes.sliding)
    columns = raw - prefix if chunks else longest
    at_once = min(rows, max(1, READ_TOKENS // columns)) if chunks else rows
    masked = chunks > 0 or rows > 1  # a forward over slots that stand there already is masked
    window = (
        standing
        + rows * raw * shapes.layer
        + at_once
        * (
            pairs * shapes.slot
            + columns * shapes.token
            + slots * (shapes.layer + shapes.wide)
            + masked * columns * slots * (1 + shapes.size)
        )
    )
    scores = (_SCORES + copies * _COPYING) * rows * shapes.vocab * 4
    archived = rows * longest * _ARCHIVED if copies and chunks else 0
    decoding = standing + rows * slots * (shapes.layer + shapes.wide) + rows * shapes.token + scores + archived
    reading = 0
    if policy.true_positions and chunks:
        block = block_tokens(host, cast(PairCompressor, policy.compressor), chunks * chunk)
        some = min(rows, max(1, min(ROWS, TOKENS // max(1, block))))
        seen, length = pairs + 2 * block, max(block, policy.window)
        asked = min(length, getattr(policy.compressor, "queries", length))
        products = min(getattr(policy.compressor, "tile", 0), some * shapes.heads * asked * seen) * 4
        reading = (
            rows * pairs * shapes.slot
            + some * (2 * block * shapes.slot + seen * (2 * shapes.layer + shapes.wide) + length * shapes.token)
            + 2 * products
        )
    return Memory(reading, window + scores, decoding)


def check_budget(host: Any, policy: ContextPolicy, prefix: int, longest: int, rows: int, *, copies: bool) -> None:
    """Refuses a call that takes more than the policy's budget; arguments as of `memory`.

    Raises:
        CapacityError: says how much it takes, and how many tokens a row fit.
    """
    budget = policy.budget
    if budget is not None and memory(host, policy, prefix, longest, rows, copies=copies).peak > budget:
        raise over_budget(host, policy, budget, prefix, longest, rows, copies=copies)


def over_budget(
    host: Any, policy: ContextPolicy, budget: int, prefix: int, longest: int, rows: int, *, copies: bool
) -> CapacityError:
    """What is to be raised of a call that takes more than a number of bytes."""

    def peak(tokens: int) -> int:
        return memory(host, policy, prefix, tokens, rows, copies=copies).peak

    chunk = policy.chunker.chunk_length  # between two chunks more tokens take more memory
    least = next((tokens for tokens in range(longest - chunk, 0, -chunk) if peak(tokens) <= budget), 0)
    fits = least + bisect.bisect_right(range(least + 1, least + chunk), budget, key=peak)
    instead = f"{fits:,} tokens" if fits else "no call of so many rows"
    a_row = f"{longest:,} tokens" if rows == 1 else f"{rows} rows of {longest:,} tokens"
    return CapacityError(
        f"budget: expected at least {_words(peak(longest))} for {a_row}, got {_words(budget)}, "
        f"which is enough for {instead}"
    )


def _words(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
