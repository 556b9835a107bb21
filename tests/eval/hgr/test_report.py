import numpy as np
import pytest
from safetensors.numpy import save_file

from eval.arrays import joined_arrays
from eval.hgr import report
from eval.hgr.arms import ARMS
from eval.hgr.report import Bootstrap, Losses
from eval.statistics import clustered_interval

from ...tiny import CHUNK, LATENTS
from .tiny_rows import COUNTS, LAYOUT, make_records, write_set


def test_the_bootstrap_is_that_of_clustered_interval():
    values, groups = np.random.default_rng(0).normal(size=30), [f"g{i % 7}" for i in range(30)]
    bootstrap = Bootstrap(groups, seed=4, draws=100)
    drawn = bootstrap.sums(values) / bootstrap.sums(np.ones(30))
    mine = report.interval("x", drawn)
    expected = clustered_interval(lambda rows: values[rows].mean(), groups, seed=4, draws=100)
    assert list(mine.values()) == pytest.approx(expected)


@pytest.mark.parametrize("domain", ["code", "novels"])
def test_metrics_have_the_promised_keys(measured, domain):
    arrays = measured[2]
    arrays = {**arrays, "n4.full": arrays["n4.window"] - 0.1, "n2.full": arrays["n2.window"] - 0.1}
    found = report.metrics({"set": Losses(arrays, make_records(domain=domain))}, COUNTS, 0, draws=50, slots=LAYOUT)
    arms = set(ARMS) | {key for arm in ARMS.values() for key, _, _ in arm.readings}
    for arm in arms | {"retrieve2_oracle", "retrieve2_oracle_copy_fitted"}:
        for end in ("hgr", "hgr.lo", "hgr.hi", "slots", "loss"):
            assert f"set.n4.{arm}.{end}" in found, (arm, end)
    everything, longer = "soft_retrieve2_copy", "longer_same_slots_retrieve2_copy_fitted"
    for key in ("n4.diff.copy.longer_same_slots_copy_fitted.lo", f"n4.diff.{everything}.{longer}.hi",
                f"n4.diff.{everything}.soft_retrieve2_bm25_copy.mean", "n4.diff.soft.shuffled.mean",
                "n2.diff.soft.longer_same_slots_copy_fitted.mean", "n4.loss.window", "n4.loss.full", "n4.documents",
                "n4.tra", "n4.copy.third1.hgr", f"n4.{everything}.third3.hgr", "n4.copy.worst_document",
                "n4.retrieve2_bm25_is_last", "n4.copy.accuracy"):  # fmt: skip
        assert f"set.{key}" in found, key
    assert found["set.n4.window.hgr"] == 0 and found["set.n4.full.hgr"] == pytest.approx(1)
    assert (
        found["set.n4.copy.slots"] == 4 + CHUNK and found[f"set.n4.{everything}.slots"] == 4 + 4 * LATENTS + 3 * CHUNK
    )
    assert found["set.n4.longer_same_slots_retrieve2.slots"] == found[f"set.n4.{everything}.slots"]
    assert found["set.n4.retrieve2_oracle.documents"] == 2
    assert ("set.novels.n4.copy.hgr" in found) == (domain == "novels")
    assert "nan" not in report.table(found).split()


def test_kvpress_losses_stand_beside_ours(tmp_path, measured, monkeypatch):
    write_set(tmp_path, "young", monkeypatch)
    arrays = measured[2]
    kept = {k: v for k, v in arrays.items() if k.count(".") == 1 and k != "n4.soft_retrieve2_copy"}
    (tmp_path / "losses").mkdir()
    save_file({**kept, "documents": np.array([3, 1, 0, 2, 4])}, tmp_path / "losses" / "young.0of1.safetensors")
    theirs = {"documents": np.array([4, 0]), "n4.snapkv.at8": np.array([2.0, 1.0], np.float32)}
    save_file(theirs, tmp_path / "losses" / "young.kvpress.0of1.safetensors")
    losses = report.losses_of(tmp_path, "young", tmp_path)
    assert (
        losses.arrays["n4.snapkv.at8"][[0, 4]].tolist() == [1, 2]
        and np.isnan(losses.arrays["n4.snapkv.at8"][1:4]).all()
    )
    assert losses.arrays["n4.window"].tolist() == arrays["n4.window"][[2, 1, 3, 0, 4]].tolist()
    more = {"documents": np.array([2, 1]), "n4.soft_retrieve2_copy": np.array([0.5, 0.25], np.float32),
            "n4.soft_retrieve2.chunks": np.array([[0, 1], [1, 2]], np.int16)}  # fmt: skip
    save_file(more, tmp_path / "losses" / "young.soft_retrieve2.0of1.safetensors")
    losses = report.losses_of(tmp_path, "young", tmp_path)
    assert losses.arrays["n4.soft_retrieve2_copy"][[1, 2]].tolist() == [0.25, 0.5]
    assert losses.arrays["n4.soft_retrieve2.chunks"].tolist() == [[-1, -1], [1, 2], [0, 1], [-1, -1], [-1, -1]]
    found = report.metrics({"young": losses}, COUNTS, 0, draws=20, slots=LAYOUT)
    assert found["young.n4.snapkv.at8.documents"] == 2 == found["young.n4.soft_retrieve2_copy.documents"]
    both = losses.take(np.array([1, 2])).arrays
    gain = both["n4.soft_retrieve2_bm25_copy"] - both["n4.soft_retrieve2_copy"]
    worth = both["n4.window"] - both["n4.full"]
    assert found["young.n4.diff.soft_retrieve2_copy.soft_retrieve2_bm25_copy.mean"] == pytest.approx(
        gain.sum() / worth.sum(), rel=1e-5
    )
    assert found["young.n4.snapkv.at8.slots"] == found["young.n4.longer_same_slots.slots"]


def test_parts_that_lack_a_figure_say_so():
    joined = joined_arrays([{"documents": np.arange(2), "x": np.ones(2)}, {"documents": np.arange(3)}])
    assert (
        np.isnan(joined["x"][2:]).all() and len(joined["x"]) == 5 and joined["documents"].tolist() == [0, 1, 0, 1, 2]
    )
