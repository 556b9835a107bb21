"""The start of a `generate` call: read compressed, left to the host as it is, or refused with the reason.

All is known before any work: how long the rows can become, and so whether something will be compressed. A call out of
the ordinary (no cache, embeddings for ids, a mask with holes, ...) is the plain host's as long as nothing is, and is
refused otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig, StaticCache
from transformers.generation.configuration_utils import GenerationMode

from ..cache.capacity import check_length
from ..cache.kv_cache import CompressedCache
from ..cache.memory import check_budget
from ..cache.policy import ContextPolicy
from ..errors import InputError
from ..hosts.pair_probe import check_pairs
from ..hosts.probe import check_reading
from ..utils.batching import left_pads
from .call import Call

MODES = {
    GenerationMode.GREEDY_SEARCH,
    GenerationMode.SAMPLE,
    GenerationMode.BEAM_SEARCH,
    GenerationMode.BEAM_SAMPLE,
    GenerationMode.ASSISTED_GENERATION,
}
MEDIA = ("pixel_values", "image", "video", "audio", "input_features", "input_values", "mm_encoder_outputs", "speech")


def decide(host: Any, call: Call, config: GenerationConfig, inputs: dict[str, Any], mode: Any) -> None:
    """Settles how a call is read; see `Call.plain`, `Call.compresses` and `Call.columns`.

    Args:
        host: the plain host.
        call: that begins.
        config: of the call, with its final lengths.
        inputs: of the host's forward as `generate` prepared them; the cache among them, where one was given.
        mode: a `GenerationMode`.

    Raises:
        InputError: something will be compressed, and this way to call does not allow it.
        CapacityError: the call's length needs more slots than the host's positions.
    """
    policy = call.processor.policy
    # without ids `generate` begins with one column of its own
    columns = call.ids.shape[1] if call.ids is not None else 1
    new = max(0, (config.max_length or 0) - columns)
    call.columns = columns + new - 1
    cache = inputs.get("past_key_values")
    rows = list(_rows(call, inputs))
    private = isinstance(cache, CompressedCache) and cache.has_private_state
    call.compresses = private or any(_compresses(policy, row, new) for row in rows)
    serves = call.compresses or policy.router is not None
    obstacle = next(_obstacles(host, call, config, inputs, new), None)
    if obstacle is not None and serves:
        raise InputError(obstacle)
    call.plain = obstacle is not None
    alone = mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
    call.grows = alone and call.options.get("custom_generate") is None  # which may do to its rows what it likes
    sequences = len(rows) * (config.num_return_sequences or 1)
    call.ends_apart = not call.plain and alone and sequences > 1
    if serves:
        check_reading(host)
    if policy.budget is not None and not call.plain:
        most, batch = max(length + new for length, _ in rows), sequences * (config.num_beams or 1)
        prefix = max(_prefix(policy, length, ids) for length, ids in rows)
        check_budget(host, policy, prefix, most, batch, copies=call.processor.changes_scores)
    if call.compresses:
        if policy.true_positions:
            check_pairs(host)
        for length, ids in rows:
            check_length(host, policy, _prefix(policy, length, ids), length, new - 1)


def refuse_early(host: Any, call: Call, config: GenerationConfig, mode: Any) -> None:
    """Refuses what would be work, or a download, before `decide` is reached: pictures, and other ways to generate.

    Args:
        host: the plain host.
        call: that begins.
        config: of the call.
        mode: a `GenerationMode`.

    Raises:
        InputError: something will be compressed, and this way to call does not allow it.
    """
    obstacle = next(_media(host, call), None)
    if mode not in MODES:
        way = str(getattr(mode, "value", mode)).replace("_", " ")
        obstacle = f"generate: expected greedy, sampling, beams or assisted decoding, got {way}"
    if obstacle is None:
        return
    columns = call.ids.shape[1] if call.ids is not None else 1
    new = config.max_new_tokens or max(0, (config.max_length or 20) - columns)
    policy = call.processor.policy
    if policy.router is not None or any(_compresses(policy, row, new) for row in _rows(call, dict(call.options))):
        raise InputError(obstacle)


def _compresses(policy: ContextPolicy, row: tuple[int, torch.Tensor | None], new: int) -> bool:
    """Whether a row can come to hold a compressed chunk; the last new token is never read."""
    most = row[0] + new - 1
    return most >= policy.fewest and most - _prefix(policy, *row) >= policy.fewest


def _prefix(policy: ContextPolicy, length: int, ids: torch.Tensor | None) -> int:
    return policy.raw_prefix(ids, length) if ids is not None else 0


def _rows(call: Call, inputs: dict[str, Any]) -> Iterator[tuple[int, torch.Tensor | None]]:
    """Tokens of each row when the call begins, and which, where they are known."""
    for number, length in enumerate(_lengths(call, inputs)):
        known = call.ids is not None and call.ids.shape[1] >= length
        yield length, call.ids[number, call.ids.shape[1] - length :] if known else None  # pyright: ignore


def _lengths(call: Call, inputs: dict[str, Any]) -> list[int]:
    mask = inputs.get("attention_mask")
    given = call.options.get("attention_mask")
    if isinstance(given, torch.Tensor) and given.ndim == 2:
        return given.long().sum(1).tolist()
    if call.ids is not None and isinstance(mask, torch.Tensor) and mask.ndim == 2:
        return mask[:: max(1, len(mask) // call.rows)].long().sum(1).tolist()
    embeddings = inputs.get("inputs_embeds")
    if isinstance(embeddings, torch.Tensor):
        return [embeddings.shape[1]] * len(embeddings)
    return [call.ids.shape[1] if call.ids is not None else 1] * call.rows


def _obstacles(host: Any, call: Call, config: GenerationConfig, inputs: dict[str, Any], new: int) -> Iterator[str]:
    """Why a compressed past could not be read in this call, the truest reason first."""
    options = call.options
    if isinstance(options.get("inputs_embeds"), torch.Tensor):
        yield "inputs_embeds: expected input_ids, got embeddings; a compressed past is made of ids"
    if config.use_cache is False:
        yield "use_cache: expected True, got False; a compressed past lives in the cache"
    if config.prefill_chunk_size:
        yield "prefill_chunk_size: expected none, got one; a compressed past is prefilled in chunks of its own"
    second = options.get("negative_prompt_ids")
    second = new + (second.shape[1] if isinstance(second, torch.Tensor) else 1)
    if config.guidance_scale not in (None, 1) and second >= call.processor.policy.fewest:
        yield f"guidance_scale: expected none, got one; its second context of {second} tokens would be read whole"
    if config.token_healing:
        yield "token_healing: expected False, got True"
    if getattr(config, "assistant_early_exit", None):
        yield "assistant_early_exit: expected none, got one; its drafts would read the history whole"
    yield from _media(host, call)
    positions, kinds = options.get("position_ids"), options.get("token_type_ids")
    if isinstance(positions, torch.Tensor) and _odd_positions(call, positions):
        yield "position_ids: expected none, got some; a compressed past has positions of its own"
    if isinstance(kinds, torch.Tensor) and bool(kinds.any()):
        yield "token_type_ids: expected none, got some; slots of a compressed past have no types"
    yield from _cache(host, config, inputs.get("past_key_values"))
    yield from _mask(call, inputs.get("attention_mask"))


def _odd_positions(call: Call, given: torch.Tensor) -> bool:
    """Whether position ids are other than those that `generate` itself would make of the mask."""
    mask = call.options.get("attention_mask")
    if mask is None and call.ids is not None:
        mask = torch.ones_like(call.ids)
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2 or given.shape[-1] > mask.shape[1]:
        return True
    own = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -given.shape[-1] :].to(given.device)
    return not bool(((given == own) | (mask[:, -given.shape[-1] :].to(given.device) == 0)).all())


def _media(host: Any, call: Call) -> Iterator[str]:
    for name, value in call.options.items():
        if name.startswith(MEDIA) and value is not None:
            yield f"{name}: expected text alone, got images or sounds; they are not compressed"
    if call.ids is None:
        return
    config = host.config
    for name in vars(config):
        if name.startswith(("image", "video", "audio")) and name.endswith(("_token_id", "_token_index")):
            number = getattr(config, name)
            if isinstance(number, int) and bool((call.ids == number).any()):
                yield f"input_ids: expected text alone, got {name} {number}; images and sounds are not compressed"


def _cache(host: Any, config: GenerationConfig, cache: Any) -> Iterator[str]:
    if isinstance(cache, CompressedCache):
        return
    if cache is None:
        if config.cache_implementation == "quantized":
            yield "cache_implementation: expected a dynamic or static one, got 'quantized'"
        if not host._supports_default_dynamic_cache():
            yield f"host: expected one whose cache is transformers' own, got {type(host).__name__}"
    elif type(cache) not in (DynamicCache, StaticCache):
        yield (
            f"past_key_values: expected a DynamicCache or a StaticCache, got {type(cache).__name__}, "
            "which cannot hold a compressed past"
        )
    elif not cache.layers and any(DynamicCache(config=host.config).is_linear):
        yield (
            "past_key_values: expected DynamicCache(config=host.config) for a host with recurrent layers, "
            "got one without a configuration"
        )
    elif cache.layers and int(cache.get_seq_length()):
        yield "past_key_values: expected an empty or a compressed cache, got one with uncompressed history"


def _mask(call: Call, mask: torch.Tensor | None) -> Iterator[str]:
    """What is wrong with the mask, given or guessed by `generate` from pad tokens in the prompt."""
    given = call.options.get("attention_mask")
    if call.ids is None:
        return
    if given is not None and given.shape != call.ids.shape:
        yield (
            f"input_ids: expected the whole conversation, as long as its mask {list(given.shape)}, "
            f"got {list(call.ids.shape)}"
        )
    try:
        left_pads(mask[:: max(1, len(mask) // call.rows)] if mask is not None else None, call.ids)
    except InputError as error:
        guessed = "" if given is not None else "; it was guessed: the prompt holds the pad token, pass attention_mask"
        yield f"{error}{guessed}"
