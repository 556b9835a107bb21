import json
import xml.etree.ElementTree as ElementTree

import pytest

from eval import plots, speed_plot
from hf_crouter.errors import InputError


def result():
    metrics = {"qwen1.5b.32k.b4.full_ttft_seconds": 9.0, "qwen1.5b.million.1000000.compact_copy_seconds": 40.0}
    for n, way in enumerate(speed_plot.WAYS):
        for length in (8, 32, 128):
            metrics[f"qwen1.5b.{length}k.b1.{way.key}ttft_seconds"] = (n + 1) * length / 100
            metrics[f"qwen1.5b.{length}k.b1.{way.key}peak_gib"] = (n + 1) * length / 50
    notes = "Host: Qwen2.5-Coder-1.5B-Instruct, weights 4-bit. Rows of source."
    return {"device": "a device", "date": "2026-01-02", "metrics": metrics, "notes": notes}


def test_points_are_those_of_one_row():
    points = speed_plot.drawn(result()["metrics"])
    assert len(points) == 2 * len(speed_plot.WAYS)
    assert points["ttft_seconds.full_"] == [[8192.0, 0.08], [32768.0, 0.32], [131072.0, 1.28]]
    with pytest.raises(InputError, match="two lengths"):
        speed_plot.drawn({"qwen1.5b.8k.b1.full_ttft_seconds": 1.0})


def test_the_figure_is_drawn_where_its_result_is(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    picture = plots.PICTURES[1]
    assert plots.write(tmp_path, picture) is None and not plots.stale(tmp_path, picture)
    (tmp_path / speed_plot.RESULT).write_text(json.dumps(result()))
    assert plots.stale(tmp_path, picture)
    first = plots.write(tmp_path, picture, tmp_path / "png").read_bytes()
    ElementTree.fromstring(first)
    assert not plots.stale(tmp_path, picture) and plots.write(tmp_path, picture).read_bytes() == first
    with plots.drawing("test"):
        figure = speed_plot.draw(speed_plot.drawn(result()["metrics"]), result())
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [way.label for way in speed_plot.WAYS]
    assert "Qwen2.5-Coder-1.5B-Instruct. Batch 1. a device" in figure.texts[-1].get_text()
    assert [axes.get_ylabel().split(",")[0] for axes in figure.axes] == ["first token", "peak over the weights"]
