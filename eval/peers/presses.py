"""Which positions the presses of kvpress keep.

kvpress ranks and selects; what is kept is then taken out of the cache by `attention.shortened`, which leaves exactly
what a press that prunes leaves, and what one that masks (KVzip and its kin) means to leave. Those spread their budget
over layers and heads as they see fit: only the total is the same.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers import AutoTokenizer, DynamicCache

from eval.peers.arms import Arm
from eval.peers.attention import decoder, slides
from eval.peers.rows import BadInput

Kept = list[torch.Tensor | None]  # by layer `[B, G, L]`, or None where nothing is left out


@dataclass(frozen=True)
class Wanted:
    """An arm, and what it shall keep of a context.

    Attributes:
        arm: which.
        kept: positions of every layer and KV head, on average.
        prefix: positions at the start that always stay, where the press knows such.
    """

    arm: Arm
    kept: int
    prefix: int


def kvpress_module(name: str) -> ModuleType:
    """A module of kvpress, without the package's `__init__`: that imports every press, and datasets, fire and more.

    Raises:
        BadInput: kvpress is not installed.
    """
    if "kvpress" not in sys.modules:
        spec = importlib.util.find_spec("kvpress")
        if spec is None:
            raise BadInput("kvpress: expected version 0.5.5 to be installed, found none")
        sys.modules["kvpress"] = importlib.util.module_from_spec(spec)  # not executed
        logging.getLogger("kvpress").setLevel(logging.ERROR)  # says with every press that it takes time
    return importlib.import_module(f"kvpress.{name}")


def press_class(arm: Arm) -> Any:
    """The press of an arm, as kvpress has it."""
    return getattr(kvpress_module(f"presses.{arm.how.module}"), arm.how.press)


def options(wanted: Wanted) -> dict[str, Any]:
    """What a press is made with, beside its ratio."""
    sinks = {"n_sink": max(4, wanted.prefix)} if wanted.arm.how.sinks else {}
    return {**wanted.arm.how.options, **sinks}


def ratio(total: int, kept: int, dropped: bool = False) -> float:
    """The compression ratio of which `int(total · (1 - ratio))` is what to keep, as presses that prune have it.

    Args:
        total: positions.
        kept: of these.
        dropped: that of which `int(total · ratio)` is what to drop, as presses that mask have it.
    """
    half = -0.5 if dropped else 0.5  # a position away from where rounding could tip it
    return 0.0 if kept >= total else 1 - (kept + half) / total


def _full(keys: torch.Tensor) -> torch.Tensor:
    return torch.ones(keys.shape[:3], dtype=torch.bool, device=keys.device)


@torch.no_grad()
def prefill(model: Any, context: torch.Tensor, wanted: Sequence[Wanted]) -> tuple[DynamicCache, dict[str, Kept]]:
    """Reads contexts once; every press that ranks positions as they are cached says which ones it keeps.

    Args:
        model: a host with `MaskedAttention`.
        context: `[B, L]`, token ids.
        wanted: of kind `score`.

    Returns:
        The whole cache, and by arm what is kept.
    """
    part, cache = decoder(model), DynamicCache()
    presses = {w.arm.name: press_class(w.arm)(ratio(context.shape[1], w.kept), **options(w)) for w in wanted}
    kept: dict[str, Kept] = {name: [None] * len(part.layers) for name in presses}

    def hook(attention: Any, _args: Any, kwargs: dict[str, Any], output: Any) -> None:
        layer = kwargs["past_key_values"].layers[attention.layer_idx]
        for w in wanted:
            if w.kept >= layer.keys.shape[2]:
                continue
            press = presses[w.arm.name]
            scores = press.score(attention, kwargs["hidden_states"], layer.keys, layer.values, output[1], kwargs)
            best = scores.topk(w.kept, dim=-1).indices  # as ScorerPress.compress
            keep = torch.zeros_like(scores, dtype=torch.bool).scatter_(2, best, True)
            kept[w.arm.name][attention.layer_idx] = keep

    handles, told = [], []
    try:
        for layer in part.layers:
            if presses and not slides(layer):
                told.append(layer.self_attn)  # ExpectedAttention looks for it there
                layer.self_attn.__dict__["rotary_emb"] = _rotary(part, layer)
                handles.append(layer.self_attn.register_forward_hook(hook, with_kwargs=True))
        part(input_ids=context, past_key_values=cache, use_cache=True)
    finally:
        for handle in handles:
            handle.remove()
        for attention in told:
            del attention.__dict__["rotary_emb"]
    return cache, kept


def _rotary(part: Any, layer: Any) -> Any:
    """Rotary embeddings of a layer: `(x, positions)` to cosine and sine; Gemma 3 has two kinds."""
    kind = getattr(layer.self_attn, "layer_type", None)
    two = isinstance(getattr(part.config, "rope_parameters", None), dict) and kind in part.config.rope_parameters
    return functools.partial(part.rotary_emb, layer_type=kind) if two else part.rotary_emb


@dataclass(frozen=True, eq=False)
class Words:
    """What KVzip says to a host, as `KVzipPress.__call__` makes it.

    Attributes:
        tokenizer: the host's, with `encode`.
        before: ids of the chat template before what a user says.
        after: `[1, S]`, ids behind that, up to where the answer begins.
    """

    tokenizer: Any
    before: tuple[int, ...]
    after: torch.Tensor

    @classmethod
    def of(cls, tokenizer: Any) -> Words:
        """Those of a tokenizer."""
        text, mark = ("", "\n"), "dummy context"
        if getattr(tokenizer, "chat_template", None) is not None:
            separator = "\n" + "#" * len(mark)
            said = [{"role": "user", "content": mark + separator}]
            both = tokenizer.apply_chat_template(
                said, add_generation_prompt=True, tokenize=False, enable_thinking=False
            )
            context, after = both.split(separator)
            text = (context.split(mark)[0], after)
        before, after = (tokenizer.encode(t, return_tensors="pt", add_special_tokens=False).long() for t in text)
        return cls(tokenizer, tuple(before[0].tolist()), after)

    @classmethod
    def load(cls, host: Path) -> Words:
        """Those of a host.

        Raises:
            BadInput: it has no tokenizer.
        """
        try:
            return cls.of(AutoTokenizer.from_pretrained(host))
        except (OSError, ValueError) as error:
            why = str(error).splitlines()[0]
            raise BadInput(f"{host}: expected a tokenizer, which KVzip needs to ask for the context: {why}") from None


def repeated(model: Any, words: Words, context: torch.Tensor, cache: Any, wanted: Sequence[Wanted]) -> dict[str, Kept]:
    """What arms of one method of kind `repeat` keep of a row: kvpress has the host repeat it, and ranks by that.

    Args:
        model: a host of which no layer slides.
        words: of its tokenizer.
        context: `[1, L]`, token ids.
        cache: the whole one; it grows and is cut again.
        wanted: budgets of one method.
    """
    layers, length = decoder(model).layers, context.shape[1]
    base, heads = press_class(wanted[0].arm), cache.layers[0].keys.shape[1]
    total, out = len(layers) * heads * length, {}

    class Several(base):  # one ranking, several selections
        def compress_post(self, model: Any) -> None:
            for w in wanted:
                out[w.arm.name] = keep = [_full(layer.keys[:, :, :length]) for layer in cache.layers]
                self.compression_ratio = ratio(total, len(layers) * heads * w.kept, dropped=True)
                super().compress_post(model)
                for layer in layers if self.compression_ratio else ():
                    keep[layer.self_attn.layer_idx][layer.self_attn.masked_key_indices] = False
                    del layer.self_attn.masked_key_indices

    press = Several(0.5, **options(wanted[0]))
    press._context_ids, press._cache, press._suffix_ids = context, cache, words.after
    starts = tuple(context[0, : len(words.before)].tolist()) == words.before
    press.prefix_length = len(words.before) if starts else 0  # a document is not within the template
    with torch.no_grad():
        press._perform_kvzip_compression(model, words.tokenizer)
    return out


def row_of(cache: Any, row: int) -> DynamicCache:
    """The cache of one row, sharing its memory."""
    out = DynamicCache()
    for index, layer in enumerate(cache.layers):
        out.update(layer.keys[row : row + 1], layer.values[row : row + 1], index)
    return out
