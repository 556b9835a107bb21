"""How many positions a host was trained on."""

from __future__ import annotations

from typing import Any


def max_positions(host_or_config: Any) -> int | None:
    """Positions that a host's configuration names; None where it names none (no limit, such as ALiBi's).

    Args:
        host_or_config: a decoder of transformers or its configuration, also one that nests the text model's.
    """
    config = getattr(host_or_config, "config", host_or_config)
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None) or None
