import json
import sys

import pytest

from eval import results
from eval.results import host_key, plain_command, read_result, write_result


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run.py", "tra-mini", "--crouter", "/machine/runs/a/crouter", "--seed", "3"])
    return tmp_path / "results"


def test_the_format(folder):
    path = write_result(
        "tra-mini", {"a.tra": 1 / 3, "a.chunks": 7}, seed=3, config={"chunks": 5}, notes="n", folder=folder
    )
    assert path == folder / "tra-mini.json" and path.read_text(encoding="utf-8").endswith("}\n")
    result = json.loads(path.read_text(encoding="utf-8"))
    assert list(result) == ["name", "command", "commit", "date", "device", "versions", "seed", "config", "metrics",
                            "notes"]  # fmt: skip
    assert result["name"] == "tra-mini" and result["seed"] == 3 and result["config"] == {"chunks": 5}
    assert result["command"] == "python -m eval.run tra-mini --crouter crouter --seed 3"
    assert result["metrics"] == {"a.tra": 0.333333, "a.chunks": 7.0} and result["notes"] == "n"
    assert {"python", "torch", "transformers"} <= set(result["versions"]) and result["device"]


def test_the_folder_can_be_elsewhere(folder, monkeypatch):
    monkeypatch.setenv("CROUTER_RESULTS", str(folder))
    assert write_result("x", {}, seed=0, config={}) == folder / "x.json"
    monkeypatch.setattr(results, "FOLDER", folder)
    assert read_result("x")["name"] == "x"


def test_what_is_not_finite_is_left_out(folder):
    path = write_result("x", {"a": float("inf"), "b": float("nan"), "c": 1.0}, seed=0, config={}, folder=folder)
    assert json.loads(path.read_text())["metrics"] == {"c": 1.0}


def test_a_failing_write_leaves_the_old_result(folder):
    path = write_result("x", {"a": 1.0}, seed=0, config={}, folder=folder)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_result("x", {"a": 2.0}, seed=0, config={"odd": object()}, folder=folder)
    assert path.read_bytes() == before and [p.name for p in folder.iterdir()] == ["x.json"]


def test_a_command_holds_no_folder_of_a_machine(tmp_path, monkeypatch):
    (tmp_path / "runs/data").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    words = ["tra-mini", "--host", "Qwen/Qwen2.5-Coder-1.5B", "--crouter", "/a/b/crouter-code-mini"]
    words += ["--data=/a/data/", "--text", "wikitext2=.carry/text/w.txt", "prose=~/p q.txt", "--parts", "files"]
    words += ["runs/data", "-x", "../y/z", "one/two/three", "0.5", "."]
    assert plain_command(words) == (
        "python -m eval.run tra-mini --host Qwen/Qwen2.5-Coder-1.5B --crouter crouter-code-mini --data=data "
        "--text wikitext2=w.txt 'prose=p q.txt' --parts files data -x z three 0.5 ."
    )


def test_the_commit_without_git(monkeypatch):
    def missing(*_, **__):
        raise OSError("no git")

    monkeypatch.setattr(results.subprocess, "run", missing)
    monkeypatch.setenv("CROUTER_COMMIT", "abc")
    assert results.commit() == "abc"
    monkeypatch.delenv("CROUTER_COMMIT")
    assert results.commit() == "unknown"


def test_figures_tell_where_they_were_collected(folder):
    made = {"device": "one GPU", "commit": "abc", "versions": {"torch": "1"}, "shard": [0, 1]}
    path = write_result("x", {}, seed=0, config={}, folder=folder, made=made)
    result = json.loads(path.read_text())
    assert (result["device"], result["commit"], result["versions"]) == ("one GPU", "abc", {"torch": "1"})
    result = json.loads(write_result("x", {}, seed=0, config={}, folder=folder, made={}).read_text())
    assert result["device"] == results.device_name() and result["versions"] == results.versions()
    path = write_result("x", {}, seed=0, config={}, folder=folder, made=made, device="two")
    assert json.loads(path.read_text())["device"] == "two"  # what is said by hand comes first


def test_hosts_have_a_key_and_a_note():
    assert host_key("smollm2-135m") == host_key("/a/b/SmolLM2-135M-Instruct") == "smollm2-135m"
    assert host_key("Qwen/Qwen2.5-Coder-1.5B-Instruct") == host_key("qwen2.5-coder-1.5b") == "qwen1.5b"
    assert results.host_note("/a/tiny-host") == "Host: tiny-host."
    known = results.host_note("/runs/hosts/smollm2-135m")
    assert known.startswith("Host: SmolLM2-135M") and ", weights " in known


@pytest.mark.parametrize("name", [path.stem for path in sorted(results.FOLDER.glob("*.json"))])
def test_a_result_in_the_repository_has_the_format(name):
    result = read_result(name)
    assert result["name"] == name and result["metrics"] and result["device"]
    assert all(isinstance(value, int | float) for value in result["metrics"].values())
