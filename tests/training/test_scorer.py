import numpy as np
import pytest
import torch

from hf_crouter.errors import InputError
from hf_crouter.ngram.scorers import FEATURES, LearnedScorer
from hf_crouter.training.scorer import fit, top_share


def made(seed=0, groups=60, chunks=8):
    """Gains that follow from two features and noise, with a level of each group's own."""
    rng = np.random.default_rng(seed)
    of = np.repeat(np.arange(groups), chunks)
    features = rng.random((groups * chunks, len(FEATURES))).astype(np.float32)
    gains = 2 * features[:, 0] + features[:, 6] ** 2 + 0.1 * rng.normal(size=len(of)) + 5 * rng.normal(size=groups)[of]
    return features, gains, of


def test_it_finds_what_gains(tmp_path):
    features, gains, groups = made()
    scorer = fit(features, gains, groups, steps=200, training={"host": "tiny"})
    record = scorer.config.training
    assert record["host"] == "tiny" and record["groups"] == 60
    new, gain, of = made(1)
    gain = gain - np.repeat([gain[of == g].min() for g in range(60)], 8)
    with torch.no_grad():
        learned = top_share(scorer(torch.from_numpy(new)).numpy(), gain, of, 2)
    assert learned > 0.95 > top_share(np.random.default_rng(0).random(len(of)), gain, of, 2) + 0.2
    scorer.save(tmp_path)
    assert LearnedScorer.load(tmp_path).config == scorer.config


def test_the_seed_decides():
    one, other, third = (fit(*made(), steps=20, seed=seed).up.weight for seed in (0, 0, 1))
    assert (one == other).all() and (one != third).any()


def test_whole_sources_are_kept_out_or_none():
    features, gains, groups = made()
    assert "share.held_out" in fit(features, gains, groups, sources=groups // 10, steps=20).config.training
    assert "share.held_out" not in fit(features, gains, groups, held_out=0, steps=20).config.training


def test_top_share():
    gains, groups = np.array([3.0, 1, 2, 5, 0, 1]), np.array([0, 0, 0, 1, 1, 1])
    assert top_share(gains, gains, groups, 1) == 1
    assert top_share(-gains, gains, groups, 1) == pytest.approx(1 / 8)
    assert top_share(gains, gains, groups, 3) == 0  # nothing to choose


def test_bad_input():
    features, gains, groups = made()
    for arguments, word in (
        ((features[:, 1:], gains, groups), "features: expected"),
        ((features, gains[1:], groups), "one length"),
        ((features, gains * np.nan, groups), "finite"),
        ((features, gains, np.arange(len(gains))), "two chunks"),
    ):
        with pytest.raises(InputError, match=word):
            fit(*arguments)
