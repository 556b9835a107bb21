"""What is generated here is what `CompressedHistory.score` says of the same text, by every arm that can write."""

import numpy as np
import pytest
import torch

from eval.arms import ARMS, GENERATING
from eval.reading import manners

from .conftest import SHAPE

STEPS = 96  # tokens: some of them are compressed before the last ones come


def losses_of(bench, arm, ids, last):
    """Losses `[B, last]` that the arm's history gives, or the plain host."""
    tokens = torch.from_numpy(ids)
    history = bench.reader.history(arm)
    if history is None:
        with torch.no_grad():
            logp = bench.host(tokens[:, :-1], logits_to_keep=last).logits.log_softmax(-1)
        return -logp.gather(2, tokens[:, -last:, None])[..., 0].numpy()
    try:
        return -history.score(tokens, last=last).numpy()
    finally:
        history.detach()


def test_arms_that_write_are_all_but_those_that_no_history_makes():
    assert set(ARMS) - set(GENERATING) == {
        "longer_same_slots", "longer_same_slots_at32", "longer_same_slots_at128", "longer_same_slots_retrieve2",
        "longer_same_slots_retrieve4", "longer_same_slots_retrieve2_copy", "shuffled", "mean_pool",
        "retrieve2_oracle", "full_copy"
    }  # fmt: skip


@pytest.mark.parametrize("arm", GENERATING)
def test_a_given_text_has_the_losses_of_score(bench, arm):
    ids = bench.sets["young"].ids[:2, : SHAPE.split + STEPS].astype(np.int64)
    forced = manners.Forced(ids[:, SHAPE.split :], SHAPE.split)
    made = bench.generate(arm, ids[:, : SHAPE.split], STEPS, [forced])
    assert (made == ids[:, SHAPE.split :]).all()
    np.testing.assert_allclose(forced.losses[0], losses_of(bench, arm, ids, STEPS), atol=1e-4)


@pytest.mark.parametrize("arm", GENERATING)
def test_greedy_tokens_are_those_that_greedy_scoring_expects(bench, arm):
    ids = bench.sets["young"].ids[:2, : SHAPE.split].astype(np.int64)
    made = bench.generate(arm, ids, STEPS)
    assert made.shape == (2, STEPS) and (made >= 0).all()
    assert bench.greedy(arm, np.concatenate([ids, made], axis=1), STEPS).all()
    assert (bench.report is None) == (arm == "full")


def test_arms_differ(bench):
    ids = bench.sets["young"].ids[:2, : SHAPE.split + STEPS].astype(np.int64)
    losses = {arm: losses_of(bench, arm, ids, STEPS) for arm in GENERATING}
    # 32 pairs and more are whole chunks here, which no choice, budget or retrieval changes
    whole = {arm for arm in GENERATING if arm.startswith("compact") and not arm.startswith("compact8")}
    copying = {arm for arm in whole if "copy" in arm and "fitted" not in arm}
    beside = {arm for arm in copying if "retrieve" in arm}  # a gate knows what stands raw
    same = [{"copy", "copy_general"}, {"compact8", "compact8_equal"}, copying - beside, beside,
            {"full", *(arm for arm in whole if "copy" not in arm)}]  # fmt: skip
    for arm, values in losses.items():
        for other, others in losses.items():
            equal = arm == other or any({arm, other} <= some for some in same)
            assert equal == np.allclose(values, others, atol=1e-4), (arm, other)


def test_without_a_crouter_chunks_are_those_of_the_package(bench):
    assert bench.chunk == SHAPE.chunk and bench.compressed_end(SHAPE.split) == SHAPE.old
    reader = type(bench.reader)(bench.host, bench.tokenizer)
    assert type(bench)(reader, bench.sets).chunk == 512
