"""Model FLOPs utilisation: matrix FLOPs of real tokens over what the device's matrix unit was measured to do."""

from __future__ import annotations

import time

import torch

from ..crouter import CRouterConfig


def matrix_flops_per_token(config: CRouterConfig, backward: bool = True) -> float:
    """Matrix FLOPs that one real token of a full chunk needs, without recomputation.

    Counts the linear layers (each loop of a shared stack counts) and both attention products over the chunk; slots,
    padding, norms and softmax are left out.

    Args:
        config: the crouter's shape.
        backward: training (3x the forward pass) or the forward pass alone.
    """
    hidden = config.hidden_size
    layers = (
        config.num_encoder_layers * config.num_encoder_loops + config.num_decoder_layers * config.num_decoder_loops
    )
    layer = 4 * hidden * hidden + 3 * hidden * config.intermediate_size
    attention = 2 * config.chunk_length * hidden
    ends = 2 * config.embedding_size * hidden + config.embedding_size * config.vocab_size
    return (6.0 if backward else 2.0) * (layers * (layer + attention) + ends)


def measured_matrix_rate(device: torch.device, size: int = 8192, repeats: int = 10) -> float:
    """FLOP/s of a `size`³ bf16 product on random data, the mean of `repeats` after three warm-ups."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for _ in range(3):
        torch.matmul(a, b)
    wait()
    start = time.perf_counter()
    for _ in range(repeats):
        torch.matmul(a, b)
    wait()
    return 2.0 * size**3 * repeats / (time.perf_counter() - start)
