"""How much history fits a host's positions."""

from __future__ import annotations

from typing import Any

from ..errors import CapacityError
from .policy import ContextPolicy


def capacity(host: Any, reader: ContextPolicy, prefix: int) -> int | None:
    """Most tokens a row whose slots fit the positions that the host was trained on; None where any number does.

    Args:
        host: the plain host.
        reader: its rule; where host and crouter do not share their tokens the answer is an estimate.
        prefix: raw tokens kept at the start of the row.
    """
    positions = getattr(host.config.get_text_config(decoder=True), "max_position_embeddings", None)
    chunk = reader.chunker.chunk_length
    latents, raw = reader.num_latents, prefix + reader.window + chunk - 1
    if not positions or (raw + reader.retrieve * chunk <= positions and not latents):
        return None
    room = max(0, positions - raw)
    retrieved = min(reader.retrieve, room // (latents + chunk))
    if retrieved < reader.retrieve:  # each chunk takes more slots than it frees
        left = room - retrieved * (latents + chunk)
        return min(positions, raw) + retrieved * chunk + max(0, left - latents)
    chunks = retrieved + (room - retrieved * (latents + chunk)) // latents if latents else 0
    return min(positions, raw) + chunks * chunk


def check_capacity(host: Any, reader: ContextPolicy, prefix: int, slots: int) -> None:
    """Refuses more slots than the positions that the host was trained on.

    Raises:
        CapacityError: names the capacity in host tokens.
    """
    positions = getattr(host.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if not positions or slots <= positions:
        return
    about = "" if reader.chunker.same_tokenizer else "about "
    retrieved = f", {reader.retrieve} recalled chunks" if reader.retrieve else ""
    raise CapacityError(
        f"history: expected at most {about}{capacity(host, reader, prefix) or positions} tokens a row (the host's "
        f"{positions} positions, {prefix} of them raw prefix, window {reader.window}{retrieved}), "
        f"got a history of {slots} slots"
    )
