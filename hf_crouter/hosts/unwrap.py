"""The plain host inside a wrapper: a wrapper that is not seen through would silently skip compression."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..errors import InputError


def unwrap(host: Any) -> PreTrainedModel:
    """The `PreTrainedModel` inside a pipeline, `torch.compile`, DDP or `PeftModel`; itself otherwise.

    Raises:
        InputError: no decoder that can `generate` was found, or the wrapper adds virtual tokens of its own.
    """
    inner = host
    while not isinstance(inner, PreTrainedModel):
        if hasattr(inner, "peft_config") and hasattr(inner, "get_base_model"):
            if any(getattr(config, "is_prompt_learning", False) for config in inner.peft_config.values()):
                raise InputError("host: expected an adapter of weights (LoRA, ...), got prompt learning")
            inner = inner.get_base_model()
            continue
        inner = next((getattr(inner, name) for name in ("_orig_mod", "module", "model") if hasattr(inner, name)), None)
        if inner is None:
            raise InputError(f"host: expected a Hugging Face decoder, got {type(host).__name__}")
    if inner.config.is_encoder_decoder or not inner.can_generate():
        raise InputError(f"host: expected a decoder with `generate`, got {type(inner).__name__}")
    return inner


def display_name(host: Any) -> str:
    """Last part of the host's folder or hub name, or its model type."""
    return Path(str(host.config._name_or_path or "")).name or host.config.model_type
