import json
import shutil

import pytest
import torch

from hf_crouter.cli.main import main
from hf_crouter.routing.experts import ExpertSet
from hf_crouter.training.experts import load_models, train_expert

from ..training.test_experts import KINDS, world


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Far faster than many threads on matrices this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def experts(tmp_path):
    """A set of the test's own."""
    return shutil.copytree(world().experts, tmp_path / "experts")


def add(name, *more):
    words = ["expert", "add", name, "--crouter", str(world().crouter), "--host", str(world().host)]
    return [*words, "--window", "64", "--calibration-chunks", "8", *more]


STEPS = ["--compressor-steps", "2", "--host-steps", "2", "--compressor-batch-size", "4", "--host-batch-size", "2"]


def refused(words, capsys, *texts):
    assert main([str(word) for word in words]) == 2
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if line.startswith("hf-crouter: error: ")]
    assert out == "" and len(errors) == 1 and err.rstrip().splitlines()[-1] == errors[0], err
    assert all(text in errors[0] for text in texts), errors[0]


def output(words, capsys):
    assert main([str(word) for word in words]) == 0
    return capsys.readouterr().out


def test_from_texts_to_an_expert_that_is_listed_tested_and_removed(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    corpus = ["--corpus", f"text-files:{world().root / 'texts/prose'}"]
    out = output(add("docs", *corpus, *STEPS), capsys)
    assert out.startswith("experts/docs: on ") and out.count("\n") == 1 and "host loss" in out
    record = json.loads(output(add("code", "--data", world().data("code"), *STEPS, "--json"), capsys))
    assert record["name"] == "code" and record["path"] == "experts/code" and record["host"]["steps"] == 2
    assert [found["name"] for found in json.loads(output(["expert", "list", "--json"], capsys))] == ["docs", "code"]
    # what `add --corpus` prepared is found again
    found = json.loads(output(["expert", "test", "--crouter", world().crouter, "--json"], capsys))
    assert list(found) == ["docs"] and sum(found["docs"]["routes"].values()) == found["docs"]["pieces"]
    assert output(["expert", "remove", "docs"], capsys) == "docs removed; experts holds code\n"
    assert json.loads(output(["expert", "remove", "code", "--json"], capsys)) == {"removed": "code", "experts": []}
    assert json.loads(output(["expert", "list", "--json"], capsys)) == []


def test_list_shows_what_was_measured(experts, capsys):
    lines = output(["expert", "list", "--experts", experts], capsys).splitlines()
    assert (
        len(lines) == 3
        and "reconstruction NLL 50%" in lines[0]
        and [line.split()[0] for line in lines[1:]] == list(KINDS)
    )
    records = json.loads(output(["expert", "list", "--experts", experts, "--json"], capsys))
    for record, expert in zip(records, ExpertSet.load(experts), strict=True):
        folder = experts / expert.name
        assert record["host"] == "tiny-host" and record["tokens"]["compressor"] > 100_000
        assert record["bytes"] == sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        usual = record["reconstruction_nll"]
        assert usual["0.5"] == expert.calibration.reconstruction_nll(64, 0.5) < usual["0.99"]
        assert record["host_loss"]["adapter"] < record["host_loss"]["base"]


def test_test_shows_where_held_out_texts_went(experts, tmp_path, capsys):
    data = [f"{kind}={world().data(kind)}" for kind in KINDS]
    (tmp_path / "new.txt").write_text("0123456789 " * 200)
    words = ["expert", "test", "--experts", experts, "--crouter", world().crouter, "--limit", "30"]
    words += ["--device", "cpu", "--data", *data, f"digits={tmp_path / 'new.txt'}"]
    lines = output([*words, "--host", world().host], capsys).splitlines()
    assert len(lines) == 4 and all(name in lines[0] for name in ("to code", "to prose", "to none", "loss routed"))
    found = json.loads(output([*words, "--host", world().host, "--json"], capsys))
    for kind in KINDS:
        assert found[kind]["accuracy"] > 0.7 and found[kind]["loss"]["own"] < found[kind]["loss"]["base"]
    assert found["digits"]["accuracy"] == found["digits"]["routes"].get("", 0) / found["digits"]["pieces"]
    assert set(found["digits"]["loss"]) == {"base", "routed", "oracle"}
    assert json.loads(output([*words, "--json"], capsys))["code"]["loss"] == {}


def test_compare_measures_what_is_missing(experts, tmp_path, capsys):
    shutil.copytree(experts, tmp_path / "set")
    before = (tmp_path / "set" / "evidence.safetensors").read_bytes()
    (tmp_path / "set" / "evidence.safetensors").unlink()
    (tmp_path / "set" / "prose" / "texts.safetensors").unlink()
    words = ["expert", "compare", "--experts", tmp_path / "set", "--crouter", world().crouter, "--device", "cpu"]
    refused(words, capsys, "texts.safetensors: cannot be read")
    shutil.rmtree(tmp_path / "set")
    shutil.copytree(experts, tmp_path / "set")
    (tmp_path / "set" / "evidence.safetensors").unlink()
    lines = output(words, capsys).splitlines()
    assert lines == [f"{name}: told by the pattern of its texts" for name in KINDS]
    assert (tmp_path / "set" / "evidence.safetensors").read_bytes() == before
    assert json.loads(output([*words, "--json"], capsys)) == dict.fromkeys(KINDS, True)


def test_prepared_data_without_tests_gives_its_calibration_part(experts, tmp_path, capsys):
    for name in ("train", "calibration"):
        shutil.copy(world().data("code") / f"{name}.safetensors", tmp_path)
    words = ["expert", "test", "--experts", experts, "--crouter", world().crouter, "--limit", "3", "--json"]
    assert main([str(word) for word in [*words, "--data", f"code={tmp_path}"]]) == 0
    assert "holds no tests; its calibration documents are taken" in capsys.readouterr().err
    (tmp_path / "calibration.safetensors").unlink()
    refused([*words, "--data", f"code={tmp_path}"], capsys, "kept out of training, got none")


def test_bad_input_of_add(experts, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place = ["--experts", experts]
    data = ["--data", world().data("code"), *STEPS]
    refused(add("third", *STEPS), capsys, "--data: expected a folder of prepared data")
    refused(add("third", "--data", tmp_path / "none", *place, *STEPS), capsys, "no such token file")
    refused(add("code", *data, *place), capsys, "an expert of this name already")
    refused(add("../code", *data, *place), capsys, "expected a name of letters")
    refused(add("third", *data, *place, "--host-seconds", "3"), capsys, "--host-steps, --host-seconds")
    refused(add("third", *data, *place, "--host", tmp_path / "none"), capsys, "no such host folder")
    refused(add("third", *data, *place, "--host-targets", "nonsense"), capsys, "expected linear layers nonsense")
    refused(["expert", "add", "third", *data, *place], capsys, "--host: expected")
    models = load_models(world().arguments())
    with torch.no_grad():
        models.crouter.slots.add_(1.0)
    models.crouter.save_pretrained(tmp_path / "other")
    models.crouter_tokenizer.save_pretrained(tmp_path / "other")
    refused(add("third", *data, *place, "--crouter", tmp_path / "other"), capsys, "expert code: expected the crouter")
    assert ExpertSet.load(experts).names == KINDS and not (tmp_path / "runs").exists()


def test_bad_input_of_the_others(experts, tmp_path, capsys):
    refused(["expert"], capsys, "ACTION")
    refused(["expert", "list", "--experts", tmp_path / "none"], capsys, "no set of experts")
    refused(["expert", "remove", "third", "--experts", experts], capsys, "expected one of the experts code, prose")
    test = ["expert", "test", "--experts", experts, "--crouter", world().crouter]
    refused(test, capsys, "--data: expected NAME=PATH for code, prose")
    refused([*test, "--data", "code"], capsys, "expected NAME=PATH, got 'code'")
    refused([*test, "--data", "code=a", "code=b"], capsys, "got code twice")
    refused([*test, "--data", f"code={tmp_path / 'none'}"], capsys, "no such file or folder")
    (tmp_path / "short.txt").write_text("one")
    refused([*test, "--data", f"code={tmp_path / 'short.txt'}"], capsys, "at least 8 tokens")
    (experts / "code/host/adapter_model.safetensors").unlink()
    refused(["expert", "list", "--experts", experts], capsys, "adapter_model.safetensors")


def test_a_training_that_fails_leaves_the_set_alone(experts, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in experts.rglob("*")}
    monkeypatch.setattr("hf_crouter.training.experts.train.measured_expert", lambda *rest: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train_expert("third", world().arguments(experts=str(experts), compressor_steps=1, host_steps=1))
    assert {path: path.stat().st_mtime_ns for path in experts.rglob("*")} == before


def test_generate_reads_under_the_experts(experts, capsys):
    text = next((world().root / "texts/prose").rglob("*.*")).read_text(encoding="utf-8")[:1500]
    words = ["generate", "--host", world().host, "--crouter", world().crouter, "--window", "32",
             "--experts", experts, "--max-new-tokens", "2", "--prompt", text]  # fmt: skip
    record = json.loads(output([*words, "--json"], capsys))
    names = {None, *ExpertSet.load(experts).names}
    assert record["chunks"] and {chunk["expert"] for chunk in record["chunks"]} <= names
    assert record["routes"][0]["length"] == record["prompt_tokens"] and record["routes"][0]["route_status"]
    assert main([str(word) for word in words]) == 0
    shown = capsys.readouterr().err
    assert "window from token" in shown and "expert" in shown
    refused([*words[:8], "nowhere", *words[9:]], capsys, "nowhere", "no set of experts")
