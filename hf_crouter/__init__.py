"""64x compressed history for Hugging Face language models, with the error of every compressed chunk."""

from transformers import AutoConfig, AutoModel

from .crouter import CRouterConfig, CRouterModel
from .errors import CapacityError, InputError, MismatchError
from .history import CompressedHistory, attach

__version__ = "0.1.0"

AutoConfig.register("crouter", CRouterConfig, exist_ok=True)
AutoModel.register(CRouterConfig, CRouterModel, exist_ok=True)
CRouterConfig.register_for_auto_class()
CRouterModel.register_for_auto_class("AutoModel")

__all__ = [
    "CRouterConfig",
    "CRouterModel",
    "CapacityError",
    "CompressedHistory",
    "InputError",
    "MismatchError",
    "attach",
]
