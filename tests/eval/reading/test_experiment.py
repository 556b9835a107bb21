import argparse
import json

import pytest

from eval.reading import experiment as reading
from eval.reading import next_lines

from .conftest import SHAPE


def arguments(folder, **changes):
    parser = argparse.ArgumentParser()
    reading.configure(parser)
    args = parser.parse_args(["--data", str(folder)])
    vars(args).update(
        {"lengths": [1024], "samples": 2, "documents": 4, "each": 1, "scored": 4, "free": 2, "tokens": 8, **changes}
    )
    return args


@pytest.mark.parametrize("part", ["nextline", "identifiers", "residual"])
def test_parts_run(bench, tmp_path, monkeypatch, part):
    monkeypatch.setattr(next_lines, "MADE", 40)
    metrics = reading.parts(bench, arguments(tmp_path, parts=[part], documents=2), SHAPE)[part]()
    assert all(key.startswith(part) for key in metrics)
    if part == "nextline":
        assert {
            "nextline.soft_retrieve2_copy.exact",
            "nextline.full.edit",
            "nextline.soft_retrieve2_copy_minus_window.lo",
        } <= metrics.keys()
    if part == "identifiers":
        assert {
            f"identifiers.{arm}.accuracy" for arm in ("full", "window", "soft", "copy", "soft_retrieve2_copy")
        } <= metrics.keys()


def test_parts_are_merged_within_a_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("CROUTER_RESULTS", str(tmp_path))
    monkeypatch.setenv("CROUTER_COMMIT", "one")
    args = arguments(tmp_path)
    reading.write_part(args, "kv", {"kv.a": 1.0, "kv.b": 1.0})
    reading.write_part(args, "nextline", {"nextline.a": 1.0})
    result = json.loads(reading.write_part(args, "kv", {"kv.a": 2.0}).read_text())
    assert result["metrics"] == {"nextline.a": 1.0, "kv.a": 2.0}
    assert set(result["config"]["parts"]) == {"kv", "nextline"}
    monkeypatch.setenv("CROUTER_COMMIT", "two")
    result = json.loads(reading.write_part(args, "kv", {"kv.a": 3.0}).read_text())
    assert result["metrics"] == {"kv.a": 3.0}
