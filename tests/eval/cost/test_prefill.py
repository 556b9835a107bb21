import math

import pytest
import torch

from eval.cost.prefill import crossover, measure

from ...tiny import tiny_crouter, tiny_host


def test_where_the_lines_cross():
    lengths = [100, 200, 400]
    line = [2.0 * n for n in lengths]
    assert crossover(lengths, line, [n + 0.01 * n * n for n in lengths]) == pytest.approx(100)
    assert crossover(lengths, line, [3.0 * n for n in lengths]) == 0
    assert crossover(lengths, line, [n**0.9 for n in lengths]) == math.inf


def test_the_arms_take_turns():
    crouter, host = tiny_crouter(), tiny_host(positions=1024)
    times = measure(host, crouter, torch.randint(5, 60, (2 * crouter.config.chunk_length + 3,)), 2)
    assert list(times) == ["encode", "reconstruction_nll", "prefill"] and {len(some) for some in times.values()} == {2}
