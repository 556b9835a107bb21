import json

import numpy as np

from eval import run
from eval.cost import retrieval_choice
from eval.cost.retrieval_choice import cut


def test_a_text_is_repeated_with_other_borders():
    text = np.arange(1000)
    chunks = cut(text, 25, 100)
    assert len(chunks) == 25 and all(len(chunk) == 100 for chunk in chunks)
    assert [int(chunk[0]) for chunk in chunks[:2]] == [0, 100] and [int(chunk[0]) for chunk in chunks[10:12]] == [
        37,
        137,
    ]


def test_choices_and_appends_are_timed(tmp_path, monkeypatch):
    monkeypatch.setenv("CROUTER_RESULTS", str(tmp_path))
    monkeypatch.setattr(retrieval_choice, "library_tokens", lambda tokenizer: np.arange(30_000) % 997)
    assert run.main(["retrieval-choice", "--chunks", "20", "40", "--choices", "3", "--turns", "1"]) == 0
    metrics = json.loads((tmp_path / "retrieval-choice.json").read_text())["metrics"]
    assert metrics["text.tokens"] == 30_000
    for key in ("choose.ms", "bm25.p99.ms", "append.us", "append.longest.us", "bytes_per_chunk", "build.seconds"):
        assert metrics[f"20.{key}"] > 0 and metrics[f"40.{key}"] > 0
