import json
from itertools import takewhile

import numpy as np

from eval import run
from eval.cost import suffix_index
from eval.cost.suffix_index import HELD_OUT, source_files


def test_the_walk_is_not_in_the_archive():
    names = [path.name for path in takewhile(lambda path: path.name != "zipapp.py", source_files())]
    assert "ast.py" in names and HELD_OUT not in names


def test_queries_and_appends_are_timed(tmp_path, monkeypatch):
    monkeypatch.setenv("CROUTER_RESULTS", str(tmp_path))
    monkeypatch.setattr(suffix_index, "tokens", lambda tokenizer, count: np.arange(count) % 997)
    assert run.main(["suffix-index", "--lengths", "2000", "--queries", "50", "--turns", "2"]) == 0
    metrics = json.loads((tmp_path / "suffix-index.json").read_text())["metrics"]
    for key in (
        "query.us",
        "query.p99.us",
        "append.us",
        "build.seconds",
        "ids.bytes_per_token",
        "index.bytes_per_token",
    ):
        assert metrics[f"2k.{key}"] > 0
