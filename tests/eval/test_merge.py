import json

import pytest

from eval import merge


def part(metrics, **others):
    return {"name": "x", "command": "c", "commit": "1", "date": "2026-01-02", "device": "d", "versions": {}, "seed": 0,
            "config": {}, "metrics": metrics, "notes": "n", **others}  # fmt: skip


def test_later_figures_count_and_everything_is_named():
    first = part({"a.new": 0.1, "b.new": 0.2}, config={"updates": [1, 3], "length": 5}, device="d, e")
    second = part({"b.new": 0.4}, command="c2", commit="2", date="2026-01-01", config={"updates": [3, 10]})
    found = merge.merged("y", [first, second])
    assert found["metrics"] == {"a.new": 0.1, "b.new": 0.4} and found["config"] == {"updates": [1, 3, 10], "length": 5}
    assert (found["name"], found["command"], found["commit"]) == ("y", "c; c2", "1, 2")
    assert (found["device"], found["date"]) == ("d, e", "2026-01-02")  # d is one of those
    assert merge.merged("y", [first, part({}, device="f, 2 cores")])["device"] == "d, e; f, 2 cores"


def test_what_only_begins_alike_is_named_too_and_the_first_notes_stay():
    first, second = part({}, command="run --arms window copy", commit="1+"), part({}, command="run --arms window")
    found = merge.merged("y", [{**first, "notes": "first", "versions": {"torch": "2"}}, second])
    assert found["command"] == "run --arms window copy; run --arms window" and found["commit"] == "1+, 1"
    assert (found["notes"], found["versions"]) == ("first", {"torch": "2"})


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(merge, "FOLDER", tmp_path)
    (tmp_path / "y.json").write_text(json.dumps(part({"a.new": 0.1, "old.new": 0.2}, name="y")))
    (tmp_path / "p.json").write_text(json.dumps(part({"a.new": 0.3})))
    assert merge.main(["y", str(tmp_path / "p.json"), "--drop", "old."]) == 0
    assert json.loads((tmp_path / "y.json").read_text())["metrics"] == {"a.new": 0.3}
    before = (tmp_path / "y.json").read_text()
    (tmp_path / "q.json").write_text(json.dumps(part({"a.new": 0.3}, seed=1)))
    for bad in ("q.json", "missing.json"):
        assert merge.main(["y", str(tmp_path / bad)]) == 2
        assert "eval.merge: error: " in capsys.readouterr().err and (tmp_path / "y.json").read_text() == before


def test_parts_of_two_seeds_are_refused():
    with pytest.raises(merge.InputError, match=r"expected parts of one seed, got \[0, 1\]"):
        merge.merged("y", [part({}), part({}, seed=1)])
