"""A host's tokenizer: found without a network, and which of its ids are special."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

from transformers import AutoTokenizer


def special_ids(tokenizer: Any, host: Any) -> frozenset[int]:
    """Ids that are never copied: the tokenizer's special ones, else what the host's configuration names.

    Added tokens that are not special count only if they look like marks, such as `<think>`: some tokenizers add runs
    of spaces.
    """
    if tokenizer is not None:
        added = {int(number) for number, token in tokenizer.added_tokens_decoder.items()
                 if token.special or re.fullmatch(r"<\S+>|\[[A-Z_/]+\]", token.content)}  # fmt: skip
        return frozenset({*map(int, tokenizer.all_special_ids), *added})
    found: set[int] = set()
    for config in (host.config.get_text_config(decoder=True), getattr(host, "generation_config", None)):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(config, name, None)
            found |= {int(v) for v in (value if isinstance(value, list | tuple) else [value]) if v is not None}
    return frozenset(found)


def character_spans(tokenizer: Any, ids: Sequence[int], spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Where spans of tokens stand in their text, in characters.

    Exact where the tokenizer gives these ids again for their text, as it does for a prompt that it made; elsewhere by
    the length of what stands before, which a character that is split between tokens may make one longer.

    Args:
        tokenizer: of the host.
        ids: of the text.
        spans: `(first, end)` of tokens.

    Returns:
        `(first, end)` of characters in the decoded text, without clean-up of blanks and without the special tokens at
        its very start (a chat template's first mark too).
    """
    special = set(tokenizer.all_special_ids)
    skip = next((n for n, token in enumerate(ids) if token not in special), len(ids))
    rest, needed = list(ids[skip:]), max((end for _, end in spans), default=0) - skip
    offsets = None
    if getattr(tokenizer, "is_fast", False) and needed > 0:
        some = rest[: needed + 8]  # so that the last one's character is whole
        text = tokenizer.decode(some, clean_up_tokenization_spaces=False)
        again = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        offsets = again["offset_mapping"] if again["input_ids"][:needed] == some[:needed] else None

    @functools.cache
    def place(token: int) -> int:
        return len(tokenizer.decode(rest[: max(0, token - skip)], clean_up_tokenization_spaces=False))

    def found(first: int, end: int) -> tuple[int, int]:
        if offsets is None or first < skip or end <= first:
            return place(first), place(end)
        return offsets[first - skip][0], offsets[end - 1 - skip][1]

    return [found(*span) for span in spans]


def local_tokenizer(name_or_path: str | None) -> Any:
    """The tokenizer in a folder or in the hub's local cache, without any network; None where there is none."""
    if not name_or_path:
        return None
    try:
        return AutoTokenizer.from_pretrained(name_or_path, local_files_only=True)
    except (OSError, ValueError, ImportError):
        return None
