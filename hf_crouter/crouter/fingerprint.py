"""Which crouter: a hash of weights that does not change with the dtype they are loaded in."""

from __future__ import annotations

import hashlib
import json

from ..utils.hashing import bfloat16_bytes
from . import CRouterModel

CROUTER_FIELDS = (
    "vocab_size", "chunk_length", "num_latents", "latent_size", "embedding_size", "hidden_size", "intermediate_size",
    "num_attention_heads", "num_encoder_layers", "num_encoder_loops", "rope_theta", "rms_norm_eps",
)  # fmt: skip
ENCODER_PARTS = ("embed_", "slots", "pad_embedding", "encoder.", "latent_norm", "to_latent")


def crouter_fingerprint(crouter: CRouterModel, *, decoder: bool = False) -> str:
    """SHA-256 (first 32 hexadecimal digits) of everything that decides a crouter's latents, weights in bfloat16.

    Args:
        crouter: on any device.
        decoder: also of what the latents are rebuilt with; decoder-only training changes only this one.
    """
    digest = hashlib.sha256(json.dumps([getattr(crouter.config, name) for name in CROUTER_FIELDS]).encode())
    for name, weight in sorted(crouter.state_dict().items()):
        if decoder or name.startswith(ENCODER_PARTS):
            digest.update(name.encode())
            digest.update(bfloat16_bytes(weight))
    return digest.hexdigest()[:32]
