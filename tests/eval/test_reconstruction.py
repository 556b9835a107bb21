import json
import shutil

import numpy as np
import pytest
import torch

from eval import run
from eval.reconstruction import pick
from hf_crouter.crouter.loading import load_crouter
from hf_crouter.data.tokens import TokenArray
from hf_crouter.training.evaluate import reconstruction_score

from ..trained_crouter import LENGTH, TEXT, trained_crouter
from ..training.prepared import prepared


@pytest.fixture
def crouter(tmp_path):
    """A crouter's folder of the test's own, with the record of two runs."""
    folder = shutil.copytree(trained_crouter(), tmp_path / "crouter-tiny")
    records = [{"seconds": 4.5, "tokens": 100, "mfu": 0.1}, {"seconds": 0.5, "tokens": 10, "mfu": 0.2}]
    (folder / "training.json").write_text(json.dumps(records))
    return folder


def test_every_set_is_measured(crouter, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CROUTER_RESULTS", str(tmp_path / "results"))
    text, data = tmp_path / "own.txt", prepared()[0]
    text.write_text(TEXT * 2)
    words = ["tra-mini", "--crouter", str(crouter), "--data", str(data), "--text", f"own={text}", "--chunks", "40"]
    monkeypatch.setattr("sys.argv", ["run.py", *words])
    assert run.main(words) == 0
    result = json.loads((tmp_path / "results/tra-mini.json").read_text())
    metrics, out = result["metrics"], capsys.readouterr().out
    assert result["command"] == (
        "python -m eval.run tra-mini --crouter crouter-tiny --data data --text own=own.txt --chunks 40"
    )
    assert str(tmp_path) not in json.dumps(result) and result["config"] == {"chunks": 40, "chunk_length": LENGTH}
    model = load_crouter(crouter)[0]
    assert metrics["params"] == model.num_parameters()
    assert (metrics["train.seconds"], metrics["train.tokens"], metrics["train.mfu"]) == (5.0, 110.0, 0.2)
    assert metrics["own.tra"] > 0.45 > 0.1 > metrics["random.tra"]  # it was trained on the first of the two copies
    assert metrics["random.chunks"] == metrics["code.files.chunks"] == 40
    assert "code.packages" in out and "no chunk: left out" in out and "code.packages.tra" not in metrics
    ids, mask = pick(*TokenArray.load(data / "files.safetensors").chunks(LENGTH), 40, 0)
    score = reconstruction_score(model, ids, mask)
    assert metrics["code.files.tra"] == pytest.approx(score.accuracy, abs=1e-5)
    assert metrics["code.files.nll"] == pytest.approx(score.reconstruction_nll, abs=1e-3)


def test_few_chunks_are_all_taken_and_many_at_random_in_order():
    ids, mask = np.arange(12).reshape(6, 2), np.ones((6, 2), dtype=bool)
    assert torch.equal(pick(ids, mask, 6, 0)[0], torch.from_numpy(ids))
    some, kept = pick(ids, mask, 3, 0)
    assert some.dtype == kept.dtype == torch.int64 and len(some) == 3 and (some[1:, 0] > some[:-1, 0]).all()
    assert torch.equal(some, pick(ids, mask, 3, 0)[0])
    assert len({tuple(pick(ids, mask, 3, seed)[0][:, 0].tolist()) for seed in range(9)}) > 1


def test_bad_input_is_one_line(crouter, tmp_path, capsys):
    assert run.main(["tra-mini", "--crouter", str(crouter), "--data", str(tmp_path)]) == 2
    assert "no such token file" in capsys.readouterr().err
    words = ["tra-mini", "--crouter", str(crouter), "--data", str(prepared()[0]), "--text", f"a={tmp_path}/none"]
    assert run.main(words) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("eval.run tra-mini: error: ")
