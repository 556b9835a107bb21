"""A host that nobody tried: a short text read as histories are read, against the same text read at once."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from transformers import DynamicCache

from ..errors import InputError
from .devices import input_device
from .families import is_tested, looks_ids_up

LENGTH, FIRST = 24, 15  # tokens of the text, and of its first piece
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}  # of the logits' spread; coarser dtypes have OTHER
OTHER = 0.1

_READ: weakref.WeakSet[Any] = weakref.WeakSet()  # hosts that read alike


@torch.no_grad()
def check_reading(host: Any) -> None:
    """Refuses a host of an unknown family that does not read a text in two pieces as it reads it in one.

    The first piece goes in with positions, as embeddings where it can, and fills a cache, the second as ids: which is
    how prefill and decoding read a compressed past. Asked once a host.

    Raises:
        InputError: what differs.
    """
    if is_tested(host) or host in _READ:
        return
    config = host.config.get_text_config(decoder=True)
    device = input_device(host)
    ids = (7 + 31 * torch.arange(LENGTH, device=device))[None] % config.vocab_size
    positions = torch.arange(LENGTH, device=device)[None]
    cache = DynamicCache(config=config)
    name = type(host).__name__
    whole = host(input_ids=ids, use_cache=False).logits[0, FIRST:].float()
    try:
        first = {"input_ids": ids[:, :FIRST]}
        if not looks_ids_up(host):
            first = {"inputs_embeds": host.get_input_embeddings()(ids[:, :FIRST])}
        host.base_model(**first, past_key_values=cache, position_ids=positions[:, :FIRST], use_cache=True)
        filled = int(cache.get_seq_length())
        parts = host(input_ids=ids[:, FIRST:], past_key_values=cache, position_ids=positions[:, FIRST:],
                     use_cache=True).logits[0].float()  # fmt: skip
    except Exception as error:  # whatever a host that cannot do it raises
        said = f"{type(error).__name__}: {error}"
        raise InputError(
            f"host: expected a decoder that reads embeddings into a cache, got {name} ({said})"
        ) from error
    if filled != FIRST:
        raise InputError(
            f"host: expected a decoder that fills the cache it is given, got {name}, which filled {filled} of {FIRST} "
            "slots"
        )
    spread = (whole - whole.mean(-1, keepdim=True)).norm()
    apart = float((parts - whole).norm() / spread.clamp(min=1e-9))
    if not apart <= TOLERANCE.get(host.dtype, OTHER):
        raise InputError(
            f"host: expected one that reads a text in two pieces as in one, got {name}, whose logits differ by "
            f"{apart:.1%} of their spread"
        )
    _READ.add(host)
