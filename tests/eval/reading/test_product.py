"""What is generated here is what `CompressedHistory.score` says of the same text, by every arm."""

import numpy as np
import pytest
import torch

from eval.reading import manners
from eval.reading.bench import ARMS

from .conftest import SHAPE

STEPS = 96  # tokens: some of them are compressed before the last ones come


def losses_of(bench, arm, ids, last):
    """Losses `[B, last]` that the arm's history gives, or the plain host."""
    tokens = torch.from_numpy(ids)
    history = bench.history(arm)
    if history is None:
        with torch.no_grad():
            logp = bench.host(tokens[:, :-1], logits_to_keep=last).logits.log_softmax(-1)
        return -logp.gather(2, tokens[:, -last:, None])[..., 0].numpy()
    try:
        return -history.score(tokens, last=last).numpy()
    finally:
        history.detach()


@pytest.mark.parametrize("arm", ["full", *ARMS])
def test_a_given_text_has_the_losses_of_score(bench, arm):
    ids = bench.sets["young"].ids[:2, : SHAPE.split + STEPS].astype(np.int64)
    forced = manners.Forced(ids[:, SHAPE.split :], SHAPE.split)
    made = bench.generate(arm, ids[:, : SHAPE.split], STEPS, [forced])
    assert (made == ids[:, SHAPE.split :]).all()
    np.testing.assert_allclose(forced.losses[0], losses_of(bench, arm, ids, STEPS), atol=1e-4)


@pytest.mark.parametrize("arm", ["full", *ARMS])
def test_greedy_tokens_are_those_that_greedy_scoring_expects(bench, arm):
    ids = bench.sets["young"].ids[:2, : SHAPE.split].astype(np.int64)
    made = bench.generate(arm, ids, STEPS)
    assert made.shape == (2, STEPS) and (made >= 0).all()
    assert bench.greedy(arm, np.concatenate([ids, made], axis=1), STEPS).all()


def test_arms_differ(bench):
    ids = bench.sets["young"].ids[:2, : SHAPE.split + STEPS].astype(np.int64)
    losses = {arm: losses_of(bench, arm, ids, STEPS) for arm in ("full", *ARMS)}
    for arm, values in losses.items():
        for other, others in losses.items():
            assert arm == other or not np.allclose(values, others, atol=1e-4), (arm, other)
