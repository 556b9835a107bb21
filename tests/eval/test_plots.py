import json
import xml.etree.ElementTree as ElementTree

import pytest

from eval import plots
from eval.results import FOLDER
from hf_crouter.errors import InputError


def result(**changes):
    metrics = {"young.n8.documents": 375.0, "young.n8.knorm.at8.hgr": -1.2, "young.n8.knorm.at8_retrieve2.hgr": -0.5}
    for arm, n in ((way.arm, n) for way in plots.WAYS for n in plots.CHUNKS):
        metrics |= {f"young.n{n}.{arm}.slots": 500.0 + n, f"young.n{n}.{arm}.hgr": n / 10}
        metrics |= {f"young.n{n}.{arm}.hgr.lo": n / 10 - 0.1, f"young.n{n}.{arm}.hgr.hi": n / 10 + 0.1}
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
    (tmp_path / plots.RESULT).write_text(json.dumps(result(**{"young.n8.soft.hgr": 0.5})))
    assert plots.main([*words, "--check"]) == 1


def test_points_are_those_of_the_result():
    metrics = result()["metrics"]
    assert plots.drawn(metrics)["soft"][2] == pytest.approx([8, 508, 0.8, 0.7, 0.9])
    short = {key: value for key, value in metrics.items() if ".soft." not in key}
    with pytest.raises(InputError, match="expected young.n8.soft.hgr"):
        plots.drawn(short)


def test_bad_input_is_one_line(tmp_path, capsys):
    assert plots.main(["--results", str(tmp_path)]) == 2 and capsys.readouterr().err.count("\n") == 1
