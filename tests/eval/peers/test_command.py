import importlib.util
import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from eval.peers import command
from eval.peers.arms import ARMS
from eval.peers.measure import AnswerResults, DocumentResults, measure_documents, measure_questions
from eval.peers.rows import chosen, read_questions
from tests.eval.peers.tiny_peers import (
    VOCAB,
    loss_of,
    make_host,
    make_model,
    make_rows,
    plain,
    write_questions,
    write_set,
)  # fmt: skip

INSTALLED = importlib.util.find_spec("kvpress") is not None
FULL = [ARMS["full_peers"]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Data, questions and a host on disk; without a tokenizer."""
    root = tmp_path_factory.mktemp("peers")
    for name in ("data", "questions"):
        (root / name).mkdir()
    write_set(root / "data", make_rows())
    write_questions(root / "questions")
    make_model().save_pretrained(root / "host")
    return root


def arguments(root, save, *more):
    paths = {"--data": root / "data", "--questions": root / "questions", "--host": root / "host", "--save": save}
    return [*(str(part) for pair in paths.items() for part in pair), "--dtype", "float32", *more]


def test_the_command_measures_writes_and_goes_on(folders, tmp_path, capsys):
    args = arguments(folders, tmp_path, "--arms", "full_peers", "--chunks", "2", "4", "--block", "2")
    for shard in ("0/2", "1/2"):
        assert command.main([*args, "--shard", shard]) == 0
    assert "young full_peers: 2/2" in capsys.readouterr().out
    files = [load_file(tmp_path / f"young.peers.{i}of2.safetensors") for i in (0, 1)]
    assert sorted(np.concatenate([file["documents"] for file in files])) == [0, 1, 2]
    rows, host = make_rows(), make_model("qwen2", "sdpa")
    for count in (2, 4):
        expected = loss_of(plain(host, rows, count), rows)
        for file in files:
            key = f"n{count}.full_peers"
            assert file[f"{key}.loss"] == pytest.approx(expected[file["documents"]], abs=1e-4)
            assert [file[f"{key}.{f}"].dtype for f in ("loss", "right", "lines", "slots")] == [
                np.float32, np.int16, np.int16, np.float32,
            ]  # fmt: skip
            assert set(file[f"{key}.slots"]) == {100 + 32 * count}
    answers = [json.loads((tmp_path / f"questions.young.200.peers.{i}of2.json").read_text()) for i in (0, 1)]
    results = [result for part in answers for result in part["results"]]
    assert sorted(r["question"] for r in results) == [0, 1, 2] and {r["arm"] for r in results} == {"full_peers"}
    assert all(r["slots"] == 200 + r["question"] and len(r["ids"]) <= 5 for r in results)
    assert answers[0]["about"]["bytes_a_token"]["full"] == 3 * 2 * 2 * 64 * 4
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(before) == 4  # no temporary files
    assert command.main([*args, "--shard", "0/2"]) == 0
    assert "young full_peers: done before" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_was_interrupted_is_gone_on_with(tmp_path, monkeypatch):
    host, rows, index = make_host(), make_rows(5), chosen(5, None, (0, 1))
    path, calls = tmp_path / "young.peers.0of1.safetensors", []
    shorten = host.shorten

    def counted(context, wanted):
        calls.append(len(context))
        if sum(calls) == 5:
            raise KeyboardInterrupt
        return shorten(context, wanted)

    monkeypatch.setattr(host, "shorten", counted)
    with pytest.raises(KeyboardInterrupt):
        measure_documents(host, "young", rows, index, [2], FULL, DocumentResults(path, {}), 2)
    assert load_file(path)["documents"].tolist() == index[:4].tolist()
    monkeypatch.setattr(host, "shorten", shorten)
    host.forwarded = 0
    measure_documents(host, "young", rows, index, [2], FULL, DocumentResults(path, {}), 2)
    assert host.forwarded == 164  # one document
    expected = loss_of(plain(make_model("qwen2", "sdpa"), rows, 2), rows)
    assert load_file(path)["n2.full_peers.loss"] == pytest.approx(expected[index], abs=1e-4)


def test_questions_are_answered_from_the_whole_prompt(folders, tmp_path):
    host, questions = make_host(), read_questions(folders / "questions" / "young.200.json")
    results = AnswerResults(tmp_path / "q.json", {})
    measure_questions(host, "young.200", questions, np.arange(3), FULL, results, 2)
    model = make_model("qwen2", "sdpa")
    for i, question in enumerate(questions.questions):
        ids = list(question.ids)
        with torch.no_grad():
            while len(ids) < len(question.ids) + 5:
                best = int(model(torch.tensor([ids])).logits[0, -1].argmax())
                if best in questions.stop:
                    break
                ids.append(best)
        assert results.found[i, "full_peers"]["ids"] == ids[len(question.ids) :]


@pytest.mark.parametrize(
    "more, message",
    [
        (["--arms", "none"], "--arms: expected some of"),
        (["--chunks", "9"], "--chunks: expected a count from 1 to 4, what young has, got [9]"),
        (["--sets", "old"], "old.json: expected a file, found none"),
        (["--host", "nowhere"], "nowhere: expected the folder of a model, found no config.json"),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(folders, tmp_path, capsys, more, message):
    assert command.main(arguments(folders, tmp_path, "--arms", "full_peers", *more)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_bad_input_of_one_kind_only(folders, tmp_path, capsys):
    assert command.main(["--host", str(folders / "host"), "--save", str(tmp_path)]) == 2
    assert "--data, --questions: expected at least one of them, got none" in capsys.readouterr().err
    rows = make_rows()
    rows.ids[0, 5] = VOCAB
    (tmp_path / "data").mkdir()
    write_set(tmp_path / "data", rows)
    args = ["--data", str(tmp_path / "data"), "--host", str(folders / "host"), "--save", str(tmp_path)]
    assert command.main([*args, "--arms", "full_peers"]) == 2
    assert f"young: expected ids below {VOCAB}, the host's vocabulary, got {VOCAB}" in capsys.readouterr().err


@pytest.mark.skipif(INSTALLED, reason="kvpress is installed")
def test_what_is_not_installed_is_said_at_once(folders, tmp_path, capsys):
    assert command.main(arguments(folders, tmp_path)) == 2
    assert "kvpress: expected version 0.5.5 to be installed, found none" in capsys.readouterr().err
