"""A host's tokenizer: found without a network, and which of its ids are special."""

from __future__ import annotations

import re
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


def local_tokenizer(name_or_path: str | None) -> Any:
    """The tokenizer in a folder or in the hub's local cache, without any network; None where there is none."""
    if not name_or_path:
        return None
    try:
        return AutoTokenizer.from_pretrained(name_or_path, local_files_only=True)
    except (OSError, ValueError, ImportError):
        return None
