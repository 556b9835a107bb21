"""The autoencoder: 512 tokens to 8 latents and back. Self-contained, so that `save_pretrained` can copy it."""

from .configuration_crouter import CRouterConfig
from .modeling_crouter import CRouterModel, CRouterOutput, Reconstruction

__all__ = ["CRouterConfig", "CRouterModel", "CRouterOutput", "Reconstruction"]
