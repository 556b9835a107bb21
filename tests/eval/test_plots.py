import json
import xml.etree.ElementTree as ElementTree

import pytest

from eval import plots
from eval.results import FOLDER
from hf_crouter.errors import InputError


def result(**changes):
    metrics = {f"{panel}.documents": 64.0 for panel in plots.PANELS}
    for n, key in enumerate(f"{panel}.{arm}" for panel in plots.PANELS for way in plots.WAYS for arm in way.arms):
        metrics[f"{key}.slots"] = 500.0 + n
        for figure in plots.FIGURES:
            metrics |= {
                f"{key}.{figure}": n / 40,
                f"{key}.{figure}.lo": n / 40 - 0.1,
                f"{key}.{figure}.hi": n / 40 + 0.1,
            }
    return {"device": "a device", "date": "2026-01-02", "metrics": metrics | changes}


def test_the_figure_of_the_readme_shows_what_was_measured():
    assert plots.main(["--check"]) == 0
    assert (FOLDER.parent.parent / "README.md").read_text(encoding="utf-8").count(
        f"(eval/results/{plots.FIGURE})"
    ) == 1


def test_the_same_figure_from_the_same_result(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    (tmp_path / plots.RESULT).write_text(json.dumps(result()))
    words = ["--results", str(tmp_path)]
    assert plots.main([*words, "--check"]) == 1 and "run python -m eval.plots" in capsys.readouterr().err
    assert plots.main([*words, "--png", str(tmp_path / "x.png")]) == 0 and (tmp_path / "x.png").stat().st_size
    first = (tmp_path / plots.FIGURE).read_bytes()
    ElementTree.fromstring(first)
    assert plots.main(words) == 0 and (tmp_path / plots.FIGURE).read_bytes() == first
    assert plots.main([*words, "--check"]) == 0
    (tmp_path / plots.RESULT).write_text(json.dumps(result(**{"young.n8.soft.lines": 0.5})))
    assert plots.main([*words, "--check"]) == 1


def test_points_are_those_of_the_result():
    metrics = result(**{"young.n8.soft.slots": 784.0, "young.n8.soft.hgr": 0.3, "young.n8.soft.lines": 0.2})["metrics"]
    (point,) = plots.drawn(metrics)["young.n8.soft prompts, fitted to the host"]
    assert point[:2] == [784.0, 0.3] and point[4] == 0.2
    no_eight = {key: value for key, value in metrics.items() if ".retrieve8." not in key}  # everything, of one file
    assert len(plots.drawn(no_eight)["young.n8.retrieval of 2, 4 and 8"]) == 2
    short = {key: value for key, value in metrics.items() if ".soft." not in key}
    with pytest.raises(InputError, match="expected young.n8.soft.hgr"):
        plots.drawn(short)


def test_a_point_far_below_stands_at_the_edge_with_its_value(tmp_path):
    pytest.importorskip("matplotlib")
    made = result(**{"repo.n40.kvzip.at8.hgr": -1.64})
    with plots.drawing("test"):
        figure = plots.draw(plots.drawn(made["metrics"]), made)
    assert [text.get_text() for axes in figure.axes for text in axes.texts] == ["−164%"]


def test_bad_input_is_one_line(tmp_path, capsys):
    assert plots.main(["--results", str(tmp_path)]) == 2 and capsys.readouterr().err.count("\n") == 1
