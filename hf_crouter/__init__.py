"""Long contexts in little memory for Hugging Face language models, and how far to trust what was compressed."""

from transformers import AutoConfig, AutoModel

from .crouter import CRouterConfig, CRouterModel
from .crouter.loading import load_crouter
from .errors import CapacityError, InputError, MismatchError
from .generation.streaming import SourceStreamer
from .history import CompressedHistory, attach
from .hosts.loading import load_host
from .modes import Compact, Copy, Experts, Retrieve, SoftPrompts

__version__ = "0.2.0"

AutoConfig.register("crouter", CRouterConfig, exist_ok=True)
AutoModel.register(CRouterConfig, CRouterModel, exist_ok=True)
CRouterConfig.register_for_auto_class()
CRouterModel.register_for_auto_class("AutoModel")

__all__ = [
    "CRouterConfig",
    "CRouterModel",
    "CapacityError",
    "Compact",
    "CompressedHistory",
    "Copy",
    "Experts",
    "InputError",
    "MismatchError",
    "Retrieve",
    "SoftPrompts",
    "SourceStreamer",
    "attach",
    "load_crouter",
    "load_host",
]
