import warnings

import numpy as np
import pytest
from safetensors.numpy import save_file

from eval.hgr import report
from eval.hgr.report import Bootstrap, measured, metrics, table
from eval.rows import Record, Rows, Shape
from eval.statistics import clustered_interval
from hf_crouter.errors import InputError

SHAPE = Shape(prefix=1, chunk=4, chunks=2, window=4, target=10)


def rows_of(domains, clusters, lines):
    """Rows of whole lines of two tokens, so many each."""
    numbers = np.full((len(lines), SHAPE.target), -1, np.int16)
    for row, count in zip(numbers, lines, strict=True):
        row[: 2 * count] = np.repeat(np.arange(count), 2)
    records = [Record(f"{c}/{n}", c, d, 0.0) for n, (d, c) in enumerate(zip(domains, clusters, strict=True))]
    return Rows(np.zeros((len(lines), SHAPE.length), np.uint32), numbers, records, SHAPE, "", {})


def arm(loss, right=None, lines=None, slots=9.0):
    columns = {"loss": loss, "right": right, "lines": lines, "slots": [slots] * len(loss)}
    return {key: np.array(values or [0] * len(loss), np.float32) for key, values in columns.items()}


def joined(**arms):
    return {f"n2.{name}.{key}": value for name, figures in arms.items() for key, value in figures.items()}


CODE = rows_of(["code"] * 4, ["a", "a", "b", "c"], [1, 2, 3, 4])
FIGURES = joined(
    window=arm([3.0, 3.0, 4.0, 5.0], [1, 1, 1, 1], [0, 1, 1, 2], 5),
    full=arm([2.0, 2.5, 3.0, 3.0], [9, 9, 9, 9], [1, 2, 3, 3], 13),
    copy=arm([2.5, 3.5, 3.0, 4.0], [2, 3, 4, 6], [1, 1, 2, 3], 5),
)


def by_hand(statistic, clusters, draws, seed):
    """Whole clusters drawn with replacement."""
    return clustered_interval(statistic, clusters, seed=seed, draws=draws)


def test_the_bootstrap_is_that_of_clustered_interval():
    values, groups = np.random.default_rng(0).normal(size=30), [f"g{i % 7}" for i in range(30)]
    bootstrap = Bootstrap(groups, seed=4, draws=100)
    drawn = bootstrap.sums(values) / bootstrap.sums(np.ones(30))
    mine = report.interval("x", drawn)
    expected = clustered_interval(lambda rows: values[rows].mean(), groups, seed=4, draws=100)
    assert list(mine.values()) == pytest.approx(expected)


def test_gain_lines_slots_and_their_intervals():
    found = metrics(FIGURES, CODE, seed=5, draws=40)
    window, full, copy = ({k: FIGURES[f"n2.{a}.{k}"] for k in ("loss", "lines")} for a in ("window", "full", "copy"))
    lines, clusters = np.array([1, 2, 3, 4]), ["a", "a", "b", "c"]
    assert found["n2.copy.hgr"] == pytest.approx((0.5 - 0.5 + 1 + 1) / (1 + 0.5 + 1 + 2))  # a ratio of means
    assert found["n2.window.hgr"] == 0 and found["n2.full.hgr"] == 1
    assert found["n2.copy.lines"] == pytest.approx(7 / 10) and found["n2.window.lines"] == pytest.approx(4 / 10)
    assert found["n2.copy.greedy"] == pytest.approx(15 / 40) and found["n2.copy.slots"] == 5
    assert found["n2.copy.loss"] == pytest.approx(13 / 4) and found["n2.full.slots"] == 13
    assert found["n2.copy.worst_document"] == pytest.approx(-0.5)
    assert (found["n2.documents"], found["n2.clusters"], found["n2.lines"]) == (4, 3, 10)
    assert found["n2.loss.window"] == pytest.approx(3.75) and found["n2.loss.full"] == pytest.approx(2.625)

    def gain(rows):
        return (window["loss"] - copy["loss"])[rows].sum() / (window["loss"] - full["loss"])[rows].sum()

    expected = {"hgr": by_hand(gain, clusters, 40, 5),
                "lines": by_hand(lambda r: copy["lines"][r].sum() / lines[r].sum(), clusters, 40, 5)}  # fmt: skip
    for key, values in expected.items():
        assert [found[f"n2.copy.{key}{end}"] for end in ("", ".lo", ".hi")] == pytest.approx(values), key
        assert values[1] < values[0] < values[2]
    assert "n2.copy.documents" not in found and "n2.domains" not in found and "n2.copy.ratio" not in found
    assert "lines  70.0" in table(found) and "nan" not in table(found)


def test_differences_are_paired():
    found = metrics(FIGURES, CODE, seed=5, draws=40)
    copy, window = (FIGURES[f"n2.{name}.lines"] for name in ("copy", "window"))
    lines, clusters = np.array([1, 2, 3, 4]), ["a", "a", "b", "c"]
    expected = by_hand(lambda r: (copy - window)[r].sum() / lines[r].sum(), clusters, 40, 5)
    ends = ("mean", "lo", "hi")
    assert [found[f"n2.linesdiff.copy.window.{end}"] for end in ends] == pytest.approx(expected)
    assert [found[f"n2.diff.copy.window.{end}"] for end in ends] == pytest.approx(
        [found[f"n2.copy.hgr{end}"] for end in ("", ".lo", ".hi")]
    )
    # what is better by the same on every document is better for sure, however much documents differ
    better = {**FIGURES, **joined(full_copy=arm([1.9, 2.45, 2.9, 2.8], lines=[1, 2, 3, 3]))}
    pair = metrics(better, CODE, seed=5, draws=40)
    assert pair["n2.diff.full_copy.full.lo"] == pytest.approx(0.1) == pytest.approx(pair["n2.diff.full_copy.full.hi"])
    assert pair["n2.linesdiff.full_copy.full.lo"] == pair["n2.linesdiff.full_copy.full.hi"] == 0
    assert not any("diff.soft_retrieve2_copy" in key for key in pair)


def test_an_arm_read_on_fewer_documents_says_so_and_is_compared_on_these():
    part = arm([np.nan, 2.5, np.nan, 4.0], [np.nan, 5, np.nan, 7], [np.nan, 2, np.nan, 4], 7)
    part["slots"][[0, 2]] = np.nan
    found = metrics({**FIGURES, **joined(soft_retrieve2_copy=part)}, CODE, seed=0, draws=40)
    assert found["n2.soft_retrieve2_copy.documents"] == 2 and found["n2.documents"] == 4
    assert found["n2.soft_retrieve2_copy.hgr"] == pytest.approx((0.5 + 1) / (0.5 + 2))
    assert found["n2.soft_retrieve2_copy.slots"] == 7
    assert found["n2.soft_retrieve2_copy.lines"] == pytest.approx(6 / 6)
    assert found["n2.soft_retrieve2_copy.greedy"] == pytest.approx(12 / 20)
    assert found["n2.diff.soft_retrieve2_copy.full.mean"] == pytest.approx(((2.5 - 2.5) + (3 - 4)) / (0.5 + 2))
    assert found["n2.linesdiff.soft_retrieve2_copy.full.mean"] == pytest.approx(6 / 6 - 5 / 6)
    nowhere = arm([np.nan] * 4)
    assert not any("copy_half" in key for key in metrics({**FIGURES, **joined(copy_half=nowhere)}, CODE, 0, 9))


def test_prose_is_the_mean_of_its_domains():
    domains = ["x"] * 3 + ["y"] * 2 + ["flat"] * 2
    prose = rows_of(domains, [f"r{n}" for n in range(7)], [1] * 7)
    window, full = [3.0] * 7, [2.0, 2.0, 2.0, 2.5, 2.5, 3.0, 3.0]
    copy = [2.5, 2.5, 2.5, 3.0, 2.5, 2.0, 2.0]
    arrays = joined(window=arm(window), full=arm(full), copy=arm(copy, lines=[1, 0, 1, 0, 1, 0, 0]))
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(report, "FEWEST", 2)
        found = metrics(arrays, prose, seed=0, draws=30)
        patch.setattr(report, "FEWEST", 3)
        assert metrics(arrays, prose, seed=0, draws=30)["n2.domains"] == 1  # of y two documents are too few
    assert found["n2.domains"] == 2  # full history is worth nothing in the flat one
    assert found["n2.copy.hgr"] == pytest.approx((1.5 / 3 + 0.5 / 1) / 2)
    assert found["n2.copy.ratio"] == pytest.approx((1.5 + 0.5 + 2) / 4)
    assert found["n2.copy.lines"] == pytest.approx(3 / 7)  # lines over all of them
    assert found["x.n2.copy.hgr"] == pytest.approx(0.5) and found["y.n2.copy.hgr"] == pytest.approx(0.5)
    assert found["x.n2.documents"] == 3 and found["y.n2.copy.loss"] == pytest.approx(2.75)


def test_a_domains_documents_are_those_of_full_history():
    prose = rows_of(["x"] * 4, [f"r{n}" for n in range(4)], [1] * 4)
    few = arm([2.0, 2.0, np.nan, np.nan])
    arrays = joined(window=arm([3.0] * 4), full=arm([2.0] * 4), copy=few)
    assert metrics(arrays, prose, seed=0, draws=9)["x.n2.documents"] == 4


def test_neither_window_nor_full_is_refused():
    for name in ("window", "full"):
        with pytest.raises(InputError, match="n2: expected the arms window and full"):
            metrics({k: v for k, v in FIGURES.items() if f".{name}." not in k}, CODE, 0, 9)


def test_figures_of_several_files_are_joined(tmp_path):
    def write(name, documents, **arrays):
        save_file({"documents": np.array(documents), **{k: np.array(v, np.float32) for k, v in arrays.items()}},
                  tmp_path / name)  # fmt: skip
        return tmp_path / name

    even = write("even", [0, 2], a=[1, 3], b=[5, np.nan])
    odd = write("odd", [3, 1], a=[4, 2])
    other = write("other", [2], b=[7])
    found = measured([even, odd, other], 4)
    assert found["a"].tolist() == [1, 2, 3, 4]
    assert found["b"][[0, 2]].tolist() == [5, 7] and np.isnan(found["b"][[1, 3]]).all()
    assert measured([odd], 2, np.array([1, 3]))["a"].tolist() == [2, 4]
    with pytest.raises(InputError, match="a was measured twice"):
        measured([even, odd, write("again", [1], a=[9])], 4)
    with pytest.raises(InputError, match="expected documents of 0 to 2, got 3"):
        measured([odd], 3)
