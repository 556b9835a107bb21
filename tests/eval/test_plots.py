import json
import xml.etree.ElementTree as ElementTree

import pytest

from eval import plots
from eval.results import FOLDER
from hf_crouter.errors import InputError


def result(without=(), **changes):
    metrics = {f"{panel}.documents": 64.0 for panel in plots.PANELS}
    arms = [arm for way in plots.WAYS for arm in way.arms if not arm.startswith(tuple(without))]
    for n, key in enumerate(f"{panel}.{arm}" for panel in plots.PANELS for arm in arms):
        metrics[f"{key}.slots"] = 516.0 if key.endswith((".window", ".copy", ".copy_fitted")) else 600.0 + 40 * n
        for figure in plots.FIGURES:
            metrics |= {
                f"{key}.{figure}": n / 80,
                f"{key}.{figure}.lo": n / 80 - 0.1,
                f"{key}.{figure}.hi": n / 80 + 0.1,
            }
    return {"device": "a device", "date": "2026-01-02", "metrics": metrics | changes}


def picture(made):
    with plots.drawing("test"):
        return plots.draw(plots.drawn(made["metrics"]), made)


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
    assert plots.main([*words, "--png", str(tmp_path / "x")]) == 0 and (tmp_path / "x" / "hgr.png").stat().st_size
    first = (tmp_path / plots.FIGURE).read_bytes()
    ElementTree.fromstring(first)
    assert plots.main(words) == 0 and (tmp_path / plots.FIGURE).read_bytes() == first
    assert plots.main([*words, "--check"]) == 0
    (tmp_path / plots.RESULT).write_text(json.dumps(result(**{"young.n8.retrieve2.lines": 0.5})))
    assert plots.main([*words, "--check"]) == 1


def test_points_are_those_of_the_result():
    made = result(
        **{"young.n8.compact32.slots": 772.0, "young.n8.compact32.hgr": 0.3, "young.n8.compact32.lines": 0.2}
    )
    points = plots.drawn(made["metrics"])
    by_slots = {row[0]: row for row in points["young.n8.Compact"]}
    assert by_slots[256.0][1] == 0.3 and by_slots[256.0][4] == 0.2  # slots of the raw window are not counted
    assert [row[0] for row in points["young.n8.Copy"]] == [0.0]
    for key in ("young.n8.window", "repo.n40.full"):
        short = {name: value for name, value in made["metrics"].items() if not name.startswith(f"{key}.hgr")}
        with pytest.raises(InputError, match=f"expected {key}.hgr"):
            plots.drawn(short)


def test_equal_arms_stand_once_and_points_in_order_of_their_slots():
    same = {f"young.n8.longer_same_slots_at128.{end}": value for end, value in
            (("slots", 1540.0), ("hgr", 0.5), ("hgr.lo", 0.4), ("hgr.hi", 0.6),
             ("lines", 0.3), ("lines.lo", 0.2), ("lines.hi", 0.4))}  # fmt: skip
    twice = {key.replace("at128", "retrieve2"): value for key, value in same.items()}
    rows = plots.drawn(result(**same, **twice)["metrics"])["young.n8.a raw window, longer by as much"]
    assert sum(row[0] == 1024.0 for row in rows) == 1 and rows == sorted(rows) and len(rows) == 5


def test_what_was_not_measured_is_left_out():
    pytest.importorskip("matplotlib")
    for without, ways in (((), 9), (("compact",), 7), (("compact", "kvzip", "snapkv", "retrieve8"), 5)):
        figure = picture(result(without))
        names = [text.get_text() for text in figure.legends[0].get_texts()]
        assert len(names) == ways and ("Compact" in names) == (not without) and names[-1] == "full history"
        assert ("by Compact, KVzip and SnapKV;" in figure.texts[-1].get_text()) == (not without)


def test_lines_join_no_gap_and_full_history_is_level():
    pytest.importorskip("matplotlib")
    axes = picture(result()).axes[2]
    drawn = {container.get_label(): container.lines[0] for container in axes.containers}
    assert len(drawn["Compact"].get_xdata()) == 5 and drawn["Compact"].get_linestyle() == "-"
    assert drawn["Compact and Retrieve(2)"].get_linestyle() == "None"
    nothing = [float(tick) for tick in axes.get_xticks()][0]
    copying, longer = drawn["Copy"].get_xdata(), drawn["a raw window, longer by as much"].get_xdata()
    assert abs(copying[0] / nothing - 1) < 0.2 and min(longer) > 2 * nothing * 0.8  # the window itself stands apart
    (full,) = (line for line in axes.lines if line.get_label() == "full history")
    assert len(set(full.get_ydata())) == 1 and [text.get_text() for text in axes.get_xticklabels()][0] == "0"


def test_a_point_far_below_stands_at_the_edge_with_its_value():
    pytest.importorskip("matplotlib")
    figure = picture(result(**{"repo.n40.kvzip.at8.hgr": -1.64}))
    assert [text.get_text() for axes in figure.axes for text in axes.texts] == ["−164%"]


def test_bad_input_is_one_line(tmp_path, capsys):
    assert plots.main(["--results", str(tmp_path)]) == 2 and capsys.readouterr().err.count("\n") == 1
