"""Configuration of the chunk autoencoder."""

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig


@strict
class CRouterConfig(PreTrainedConfig):
    """Everything that shapes a `CRouterModel`.

    Args:
        vocab_size: entries of the crouter's own tokenizer.
        chunk_length: tokens a chunk, T.
        num_latents: latent vectors a chunk, M; `chunk_length / num_latents` is the compression (64 by default).
        latent_size: width of a latent vector.
        embedding_size: width of the factorised token embedding, shared with the output head.
        hidden_size: width of encoder and decoder.
        intermediate_size: width of the SwiGLU hidden layer.
        num_attention_heads: attention heads; must divide `hidden_size`.
        num_encoder_layers: distinct encoder layers.
        num_decoder_layers: distinct decoder layers.
        num_encoder_loops: how often the stack of encoder layers is applied, weights shared (Universal Transformer,
            arXiv 1807.03819): depth that costs time but no bytes.
        num_decoder_loops: the same for the decoder.
        rope_theta: base of the rotary embedding.
        rms_norm_eps: epsilon of every RMSNorm.
        initializer_range: standard deviation of embeddings, slots and the decoder's content-free input.
        tie_word_embeddings: use one matrix for token embedding and output head.
    """

    model_type = "crouter"

    vocab_size: int = 49152
    chunk_length: int = 512
    num_latents: int = 8
    latent_size: int = 512
    embedding_size: int = 128
    hidden_size: int = 384
    intermediate_size: int = 1024
    num_attention_heads: int = 6
    num_encoder_layers: int = 2
    num_decoder_layers: int = 3
    num_encoder_loops: int = 1
    num_decoder_loops: int = 1
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True

    def validate_architecture(self):
        """Part of `@strict` validation: refuses shapes that cannot be built."""
        for name in ("vocab_size", "chunk_length", "num_latents", "latent_size", "embedding_size", "hidden_size",
                     "intermediate_size", "num_attention_heads", "num_encoder_layers", "num_decoder_layers",
                     "num_encoder_loops", "num_decoder_loops"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.hidden_size % self.num_attention_heads or (self.hidden_size // self.num_attention_heads) % 2:
            raise ValueError(
                "hidden_size: expected an even multiple of num_attention_heads "
                f"({self.num_attention_heads}), got {self.hidden_size}"
            )
        if self.num_latents > self.chunk_length:
            raise ValueError(
                f"num_latents: expected at most chunk_length ({self.chunk_length}), got {self.num_latents}"
            )


__all__ = ["CRouterConfig"]
