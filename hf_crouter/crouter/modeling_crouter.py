"""Chunk autoencoder: `x [B,T] -> encoder -> z [B,M,latent_size] -> decoder([z, m]) -> logits [B,T,V]`.

The decoder sees the latents and a learned, content-free input `m`, never the tokens: one parallel pass, no teacher
forcing. Axes: `B` chunks, `T` tokens a chunk, `M` latents, `H` hidden size, `V` vocabulary.

What rebuilding a chunk costs, its reconstruction NLL in nats/token, is what the paper calls its residual.

Source of the scheme: "Compression is Routing", arXiv 2512.16963; layers, read-out and training are ours.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils.generic import ModelOutput, can_return_tuple

from .configuration_crouter import CRouterConfig


@dataclass
class CRouterOutput(ModelOutput):
    """Result of a full pass over a batch of chunks.

    Attributes:
        loss: mean over real tokens of the reconstruction's negative log-likelihood, scalar, nats/token.
        latents: `[B, M, latent_size]`, root-mean-square 1 over the last axis.
        logits: `[B, T, V]`, prediction of the token at each position.
        reconstruction_nll: `[B]`, nats/token: the chunk's mean reconstruction loss.
        token_reconstruction_nll: `[B, T]`, nats; 0 at padding.
        reconstruction_accuracy: `[B]`, share of tokens rebuilt exactly at their position (TRA), 0 to 1.
    """

    loss: torch.Tensor | None = None
    latents: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    reconstruction_nll: torch.Tensor | None = None
    token_reconstruction_nll: torch.Tensor | None = None
    reconstruction_accuracy: torch.Tensor | None = None


@dataclass
class Reconstruction(ModelOutput):
    """What the latents alone rebuild.

    Attributes:
        input_ids: `[B, T]`, int64: the most probable token at each position.
        confidence: `[B, T]`, its probability, 0 to 1.
    """

    input_ids: torch.Tensor | None = None
    confidence: torch.Tensor | None = None


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out; `[B, heads, T, head_dim]` in, `[B, T, heads, head_dim]` out."""
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the halves of the last axis; `x [B, heads, T, head_dim]`, `cos` and `sin` `[T, head_dim/2]`."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


class CRouterRotaryEmbedding(nn.Module):
    """Angles for `[slots | tokens]`: slot i stands in the middle of the i-th part of the chunk."""

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, config: CRouterConfig):
        super().__init__()
        self.config = config
        cos, sin = self.compute(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    @staticmethod
    def compute(config: CRouterConfig) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines, each `[M + T, head_dim/2]`, float32."""
        step = config.chunk_length / config.num_latents
        slots = (torch.arange(config.num_latents, dtype=torch.float32) + 0.5) * step - 0.5
        positions = torch.cat([slots, torch.arange(config.chunk_length, dtype=torch.float32)])
        head_dim = config.hidden_size // config.num_attention_heads
        inverse = config.rope_theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        angles = positions[:, None] * inverse
        return angles.cos(), angles.sin()

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The cached cosines and sines."""
        return self.cos, self.sin


class CRouterAttention(nn.Module):
    """Bidirectional self-attention with normalised queries and keys."""

    def __init__(self, config: CRouterConfig):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, **kwargs) -> torch.Tensor:
        """`[B, M + T, H]` to the same shape."""
        shape = hidden_states.shape[:-1]
        query, key, value = self.qkv_proj(hidden_states).view(*shape, 3, self.num_heads, self.head_dim).unbind(2)
        query = apply_rotary(self.q_norm(query).transpose(1, 2), cos, sin).to(value.dtype)
        key = apply_rotary(self.k_norm(key).transpose(1, 2), cos, sin).to(value.dtype)
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation or "eager", eager_attention_forward
        )
        output, _ = attention_interface(
            self, query, key, value.transpose(1, 2), None, dropout=0.0, scaling=self.scaling, **kwargs
        )
        return self.o_proj(output.reshape(*shape, -1))


class CRouterMLP(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: CRouterConfig):
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[B, T, H]` to the same shape."""
        gate, up = self.gate_up_proj(hidden_states).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class CRouterLayer(GradientCheckpointingLayer):
    """Pre-norm attention and MLP."""

    def __init__(self, config: CRouterConfig):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attention = CRouterAttention(config)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = CRouterMLP(config)

    def forward(self, hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, **kwargs) -> torch.Tensor:
        """`[B, M + T, H]` to the same shape."""
        hidden_states = hidden_states + self.attention(self.attention_norm(hidden_states), cos, sin, **kwargs)
        return hidden_states + self.mlp(self.mlp_norm(hidden_states))


class CRouterPreTrainedModel(PreTrainedModel):
    """Loading, saving, initialisation and the attention back ends of transformers."""

    config: CRouterConfig
    base_model_prefix = "crouter"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["CRouterLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, CRouterModel):
            init.normal_(module.slots, std=std)
            init.normal_(module.decoder_input, std=std)
            init.normal_(module.pad_embedding, std=std)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=std)
        elif isinstance(module, nn.RMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, nn.Linear) and module.out_features != self.config.vocab_size:
            init.normal_(module.weight, std=module.in_features**-0.5)
        elif isinstance(module, nn.Linear):
            init.normal_(module.weight, std=std)
        elif isinstance(module, CRouterRotaryEmbedding):
            cos, sin = CRouterRotaryEmbedding.compute(self.config)
            init.copy_(module.cos, cos)
            init.copy_(module.sin, sin)
        if isinstance(module, CRouterLayer):  # a layer starts as the identity: deep and looped stacks train evenly
            init.zeros_(module.attention.o_proj.weight)
            init.zeros_(module.mlp.down_proj.weight)


class CRouterModel(CRouterPreTrainedModel):
    """Compresses a chunk of at most `chunk_length` tokens into `num_latents` vectors and rebuilds it from them.

    Ragged chunks and padding: positions outside the mask enter the encoder as one learned "no token" vector, so what
    stands in `input_ids` there cannot matter and every pass has one shape. They count in no loss, TRA or
    reconstruction NLL.

    Example:
        >>> model = CRouterModel(CRouterConfig(vocab_size=100, hidden_size=64, num_attention_heads=2))
        >>> model.encode(torch.randint(100, (1, 512))).shape
        torch.Size([1, 8, 512])
    """

    _tied_weights_keys = {"lm_head.weight": "embed_tokens.weight"}

    def __init__(self, config: CRouterConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.embedding_size)
        self.embed_norm = nn.RMSNorm(config.embedding_size, eps=config.rms_norm_eps)
        self.embed_proj = nn.Linear(config.embedding_size, config.hidden_size, bias=False)
        self.pad_embedding = nn.Parameter(torch.empty(config.hidden_size))
        self.slots = nn.Parameter(torch.empty(config.num_latents, config.hidden_size))
        self.encoder = nn.ModuleList(CRouterLayer(config) for _ in range(config.num_encoder_layers))
        self.latent_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.to_latent = nn.Linear(config.hidden_size, config.latent_size, bias=False)
        self.from_latent = nn.Linear(config.latent_size, config.hidden_size, bias=False)
        self.decoder_input = nn.Parameter(torch.empty(config.chunk_length, config.hidden_size))
        self.decoder = nn.ModuleList(CRouterLayer(config) for _ in range(config.num_decoder_layers))
        self.output_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.output_proj = nn.Linear(config.hidden_size, config.embedding_size, bias=False)
        self.lm_head = nn.Linear(config.embedding_size, config.vocab_size, bias=False)
        self.rotary = CRouterRotaryEmbedding(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The factorised token embedding `[V, embedding_size]`."""
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replaces the token embedding."""
        self.embed_tokens = value

    def get_output_embeddings(self) -> nn.Linear:
        """The output head `[V, embedding_size]`, tied to the token embedding by default."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replaces the output head."""
        self.lm_head = new_embeddings

    def _run(self, layers: nn.ModuleList, loops: int, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        cos, sin = self.rotary()
        for _ in range(loops):
            for layer in layers:
                hidden_states = layer(hidden_states, cos, sin, **kwargs)
        return hidden_states

    def encode(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs) -> torch.Tensor:
        """Latents of a batch of chunks.

        Args:
            input_ids: `[B, T]`, int64, T at most `chunk_length`; a shorter T is a ragged chunk.
            attention_mask: `[B, T]`; true or 1 where a token stands. All by default.
            **kwargs: handed to the attention function.

        Returns:
            `[B, M, latent_size]`, root-mean-square 1 over the last axis.

        Raises:
            ValueError: a chunk longer than `chunk_length`.
        """
        batch, length = input_ids.shape
        if length > self.config.chunk_length:
            raise ValueError(f"expected at most {self.config.chunk_length} tokens a chunk, got {length}")
        tokens = self.embed_proj(self.embed_norm(self.embed_tokens(input_ids)))
        pad = self.pad_embedding.to(tokens.dtype)
        if attention_mask is not None:
            tokens = torch.where(attention_mask.bool()[..., None], tokens, pad)
        if length < self.config.chunk_length:
            tokens = torch.cat([tokens, pad.expand(batch, self.config.chunk_length - length, -1)], dim=1)
        hidden_states = torch.cat([self.slots.to(tokens.dtype).expand(batch, -1, -1), tokens], dim=1)
        hidden_states = self._run(self.encoder, self.config.num_encoder_loops, hidden_states, **kwargs)
        latents = self.to_latent(self.latent_norm(hidden_states[:, : self.config.num_latents]))
        return F.rms_norm(latents, (self.config.latent_size,), eps=self.config.rms_norm_eps)

    def decode(self, latents: torch.Tensor, length: int | None = None, **kwargs) -> torch.Tensor:
        """Logits of the chunk that the latents stand for.

        Args:
            latents: `[B, M, latent_size]`.
            length: positions wanted, the first ones; `chunk_length` by default.
            **kwargs: handed to the attention function.

        Returns:
            `[B, length, V]`.
        """
        latents = self.from_latent(latents)
        m = self.decoder_input.to(latents.dtype).expand(latents.shape[0], -1, -1)
        hidden_states = torch.cat([latents, m], dim=1)
        hidden_states = self._run(self.decoder, self.config.num_decoder_loops, hidden_states, **kwargs)
        hidden_states = hidden_states[:, self.config.num_latents :][:, :length]
        return self.lm_head(self.output_proj(self.output_norm(hidden_states)))

    @torch.no_grad()
    def reconstruct(self, latents: torch.Tensor) -> Reconstruction:
        """Tokens and their confidence from latents `[B, M, latent_size]` alone; all `chunk_length` positions."""
        confidence, input_ids = self.decode(latents).float().softmax(-1).max(-1)
        return Reconstruction(input_ids=input_ids, confidence=confidence)

    @can_return_tuple
    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs) -> CRouterOutput:
        """Compresses, rebuilds and measures a batch of chunks.

        Args:
            input_ids: `[B, T]`, int64, T at most `chunk_length`.
            attention_mask: `[B, T]`; true or 1 where a token stands. All by default.
            **kwargs: handed to the attention function.

        Returns:
            `CRouterOutput`; its `logits` have the T positions of `input_ids`.
        """
        latents = self.encode(input_ids, attention_mask, **kwargs)
        logits = self.decode(latents, length=input_ids.shape[1], **kwargs)
        token_reconstruction_nll = F.cross_entropy(logits.float().flatten(0, 1), input_ids.flatten(), reduction="none")
        token_reconstruction_nll = token_reconstruction_nll.view(input_ids.shape)
        hit = (logits.detach().argmax(-1) == input_ids).to(token_reconstruction_nll.dtype)
        mask = (
            torch.ones_like(token_reconstruction_nll)
            if attention_mask is None
            else attention_mask.to(token_reconstruction_nll.dtype)
        )
        token_reconstruction_nll, hit, count = token_reconstruction_nll * mask, hit * mask, mask.sum(-1).clamp(min=1)
        return CRouterOutput(
            loss=token_reconstruction_nll.sum() / mask.sum().clamp(min=1),
            latents=latents,
            logits=logits,
            reconstruction_nll=token_reconstruction_nll.sum(-1) / count,
            token_reconstruction_nll=token_reconstruction_nll,
            reconstruction_accuracy=hit.sum(-1) / count,
        )


__all__ = ["CRouterModel", "CRouterOutput", "CRouterPreTrainedModel", "Reconstruction"]
