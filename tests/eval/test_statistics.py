import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from eval.statistics import auroc, clustered_interval, mean_with_interval, ratio_with_interval


def test_a_known_case_has_the_known_interval():
    values = np.random.default_rng(0).normal(5.0, 2.0, 400)
    groups = [f"g{n}" for n in range(400)]  # clusters of one: the ordinary bootstrap of a mean
    value, low, high = clustered_interval(lambda rows: values[rows].mean(), groups, seed=1)
    half = 1.96 * values.std() / 20
    assert value == pytest.approx(values.mean())
    assert low == pytest.approx(value - half, abs=0.03) and high == pytest.approx(value + half, abs=0.03)


def test_repeated_documents_of_one_group_do_not_narrow_the_interval():
    centres = np.random.default_rng(0).normal(size=20)
    few = clustered_interval(lambda rows: centres[rows].mean(), [f"g{n}" for n in range(20)], seed=1)
    values, groups = np.repeat(centres, 50), np.repeat([f"g{n:02d}" for n in range(20)], 50).tolist()
    many = clustered_interval(lambda rows: values[rows].mean(), groups, seed=1)
    assert many[0] == pytest.approx(few[0])
    assert many[2] - many[1] == pytest.approx(few[2] - few[1], rel=0.1)
    alone = clustered_interval(lambda rows: values[rows].mean(), [str(n) for n in range(1000)], seed=1, draws=300)
    assert alone[2] - alone[1] < 0.3 * (many[2] - many[1])


def test_the_same_seed_gives_the_same_interval_and_draws_whole_groups():
    groups, seen = ["a", "b", "b", "c", "c", "c"], set()

    def statistic(rows):
        counts = np.bincount(rows, minlength=6)
        seen.add(tuple(counts))
        return float(rows.mean())

    first = clustered_interval(statistic, groups, seed=3, draws=100)
    assert first == clustered_interval(statistic, groups, seed=3, draws=100)
    assert all(c[1] == c[2] and c[3] == c[4] == c[5] and c[0] + c[1] + c[3] == 3 for c in seen)


def test_one_group_has_no_width():
    value, low, high = clustered_interval(lambda rows: float(rows.sum()), ["a"] * 4, seed=0, draws=10)
    assert value == low == high == 6


def test_means_and_shares_of_sums():
    metrics = ratio_with_interval("a", [1, 3], [2, 10], ["x", "y"], 0)
    assert metrics["a"] == pytest.approx(4 / 12) and metrics["a.lo"] == pytest.approx(0.3)
    assert ratio_with_interval("a", [0], [0], ["x"], 0) == mean_with_interval("a", [], [], 0) == {}
    assert mean_with_interval("a", [1.0, 2.0], ["x", "x"], 0) == {"a": 1.5, "a.lo": 1.5, "a.hi": 1.5}


def test_auroc():
    values, labels = np.array([0.1, 0.2, 0.3, 0.4]), np.array([0, 0, 1, 1])
    assert auroc(values, labels) == 1
    assert auroc(values, 1 - labels) == 0
    assert auroc(np.ones(4), labels) == 0.5
    assert np.isnan(auroc(values, np.ones(4)))
    generator = np.random.default_rng(0)
    for digits in (1, 8):  # many ties, and none
        values, labels = generator.normal(size=300).round(digits), generator.integers(0, 2, 300)
        assert auroc(values, labels) == pytest.approx(roc_auc_score(labels, values), abs=1e-12)
