import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_crouter.training.flops import matrix_flops_per_token, measured_matrix_rate

from ..tiny import tiny_crouter


def slots(config):
    """FLOPs of a chunk's forward pass that belong to its latents, which the count per token leaves out."""
    m, t, h = config.num_latents, config.chunk_length, config.hidden_size
    layers = (
        config.num_encoder_layers * config.num_encoder_loops + config.num_decoder_layers * config.num_decoder_loops
    )
    linear = layers * m * (4 * h * h + 3 * h * config.intermediate_size)
    attention = layers * 2 * h * ((m + t) ** 2 - t**2)
    ends = 2 * m * h * config.latent_size  # to_latent, from_latent
    return 2 * (linear + attention + ends)


@pytest.mark.parametrize(
    "changes", [{}, {"num_encoder_loops": 2, "num_decoder_loops": 3, "num_decoder_layers": 2}, {"num_latents": 5}]
)
@pytest.mark.parametrize("backward", [False, True])
def test_it_is_what_torch_counts_but_for_the_slots(changes, backward):
    crouter = tiny_crouter(**changes)
    crouter.set_attn_implementation("eager")  # matrix products that are counted by themselves
    config, chunks = crouter.config, 3
    ids = torch.randint(0, config.vocab_size, (chunks, config.chunk_length))
    with FlopCounterMode(display=False) as counter:
        loss = crouter(ids).loss
        if backward:
            loss.backward()
    factor = 3 if backward else 1
    expected = chunks * config.chunk_length * matrix_flops_per_token(config, backward=backward)
    assert counter.get_total_flops() - expected == factor * chunks * slots(config)


def test_the_rate_is_that_of_the_device():
    assert measured_matrix_rate(torch.device("cpu"), size=64, repeats=2) > 1e6
