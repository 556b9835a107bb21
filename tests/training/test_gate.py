import math

import numpy as np
import pytest
import torch

from hf_crouter.errors import InputError
from hf_crouter.ngram.gate import FEATURES, SOURCES, Gate, GateConfig
from hf_crouter.training.gate import fit_gate, mixture_log_likelihood

K = SOURCES


def examples(useful, count=4000, seed=0):
    """Positions whose first feature says whether order 0 is right; without `useful` it says nothing."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.rand(count, FEATURES, generator=generator)
    available = torch.rand(count, K, generator=generator) > 0.3
    right = features[:, 0] > 0.5 if useful else torch.zeros(count, dtype=torch.bool)
    copied = torch.where(right[:, None] & available, 0.9, 0.0)
    host = torch.log(0.05 + 0.5 * torch.rand(count, generator=generator))
    return (features.half(), available, copied, host), np.arange(count) // 100


def test_a_useful_archive_is_used():
    data, groups = examples(useful=True)
    gate, record = fit_gate(*data, groups, steps=150, config=GateConfig(host_name="tiny"))
    assert record["held_out_gain"] > 0.3 and record["train_gain"] > 0.3 and record["copies"]
    fresh, _ = examples(useful=True, seed=1)
    with torch.no_grad():
        gain = mixture_log_likelihood(gate, *fresh) - fresh[3]
    assert gain.mean() > 0.3
    assert gate.config.host_name == "tiny" and gate.config.training["groups"] == 40


def test_noise_is_never_copied():
    data, groups = examples(useful=False)
    gate, record = fit_gate(*data, groups, steps=100)
    assert record["held_out_gain"] >= -1e-6 and record["train_gain"] >= -1e-6
    with torch.no_grad():
        assert (mixture_log_likelihood(gate, *data) - data[3]).min() > -0.01


def test_the_same_seed_gives_the_same_gate_and_a_saved_one_is_equal(tmp_path):
    data, groups = examples(useful=True, count=1000)
    first, second = (fit_gate(*data, groups, steps=20, seed=3)[0] for _ in range(2))
    first.save(tmp_path)
    for other in (second, Gate.load(tmp_path)):
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


def test_without_candidates_the_host_stays_as_it_is():
    data, groups = examples(useful=True, count=1000)
    gate, _ = fit_gate(*data, groups, steps=20)
    alone = (data[0], torch.zeros_like(data[1]), torch.zeros_like(data[2]), data[3])
    with torch.no_grad():
        assert torch.allclose(mixture_log_likelihood(gate, *alone), data[3], atol=1e-6)


def test_one_group_cannot_be_held_out():
    data, _ = examples(useful=True, count=100)
    with pytest.raises(InputError, match="two groups"):
        fit_gate(*data, np.zeros(100, np.int64))


def test_the_mixture_by_hand():
    def gate(features, available):
        return torch.tensor([[0.75, 0.25]]).log()

    value = mixture_log_likelihood(
        gate, torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool), torch.tensor([[0.8]]), torch.tensor([0.1]).log()
    )
    assert value.item() == pytest.approx(math.log(0.75 * 0.1 + 0.25 * 0.8))
