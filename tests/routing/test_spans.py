"""Borders against brute force, and over whole documents."""

import itertools

import pytest
import torch

from hf_crouter.errors import InputError
from hf_crouter.routing.spans import Span, find_spans


def total(spans, costs, switch):
    return sum(float(costs[s.number, s.start : s.end].sum()) for s in spans) + switch * (len(spans) - 1)


def runs(numbers):
    """Expert numbers, one a token, as spans."""
    borders = [0, *(t for t in range(1, len(numbers)) if numbers[t] != numbers[t - 1]), len(numbers)]
    return [Span(start, end, numbers[start]) for start, end in itertools.pairwise(borders)]


def brute_force(costs, switch, smooth):
    """The least total of all ways to give each token an expert."""
    tokens = costs.shape[1]
    ways = (runs(numbers) for numbers in itertools.product(range(len(costs)), repeat=tokens))
    allowed = (spans for spans in ways if min(len(span) for span in spans) >= min(smooth, tokens))
    return min(total(spans, costs, switch) for spans in allowed)


@pytest.mark.parametrize("seed", range(24))
def test_no_way_is_cheaper(seed):
    generator = torch.Generator().manual_seed(seed)
    n, tokens, smooth = 2 + seed % 2, 1 + seed % 7, 1 + seed % 4
    switch = (0.0, 0.3, 1.0)[seed % 3]
    costs = torch.randn(n, tokens, generator=generator).double()
    spans = find_spans(costs, switch=switch, smooth=smooth)
    assert [span.start for span in spans] == [0, *(span.end for span in spans[:-1])] and spans[-1].end == tokens
    assert all(len(span) >= min(smooth, tokens) for span in spans)
    assert all(one.number != two.number for one, two in itertools.pairwise(spans))
    assert total(spans, costs, switch) == pytest.approx(brute_force(costs, switch, smooth), abs=1e-9)


def test_a_border_needs_evidence():
    costs = torch.zeros(2, 60)
    costs[1, :20], costs[0, 20:] = 1.0, 1.0
    costs[0, 5:8], costs[1, 5:8] = 1.0, 0.0  # three odd tokens
    assert find_spans(costs, switch=2.0) == [Span(0, 20, 0), Span(20, 60, 1)]
    assert find_spans(costs, switch=0.0, smooth=8) == [Span(0, 20, 0), Span(20, 60, 1)]
    assert find_spans(costs, switch=1000.0) == [Span(0, 60, 1)]
    assert len(find_spans(costs, switch=0.5)) == 4


def test_equals_change_nothing():
    assert find_spans(torch.full((3, 50), 0.1), switch=0.0) == [Span(0, 50, 0)]


def test_an_expert_that_was_not_scored_is_not_chosen():
    costs = torch.tensor([[float("nan")] * 4, [1.0, 1.0, 5.0, 5.0], [2.0, 2.0, 2.0, 2.0]])
    assert find_spans(costs, switch=0.1) == [Span(0, 2, 1), Span(2, 4, 2)]


def test_short_texts():
    assert find_spans(torch.zeros(2, 0), switch=1.0) == []
    assert find_spans(torch.tensor([[1.0, 1.0], [0.0, 0.5]]), switch=0.0, smooth=9) == [Span(0, 2, 1)]
    assert find_spans(torch.zeros(1, 5), switch=0.0) == [Span(0, 5, 0)]


@pytest.mark.parametrize(
    ("costs", "options"),
    [(torch.zeros(2, 3), {"switch": -1.0}), (torch.zeros(2, 3), {"switch": float("nan")}),
     (torch.zeros(2, 3), {"switch": 1.0, "smooth": 0}),
     (torch.zeros(0, 3), {"switch": 1.0}), (torch.zeros(3), {"switch": 1.0}),
     (torch.full((2, 3), float("nan")), {"switch": 1.0})],
)  # fmt: skip
def test_refused(costs, options):
    with pytest.raises(InputError, match="spans: expected"):
        find_spans(costs, **options)
