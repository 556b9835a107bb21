import importlib
import inspect
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_crouter.chunking import tokenizer_fingerprint
from hf_crouter.cli import demo
from hf_crouter.cli.main import main
from hf_crouter.compressors.projector import Projector
from hf_crouter.crouter.fingerprint import crouter_fingerprint
from hf_crouter.crouter.loading import load_crouter
from hf_crouter.fitting import HostInUse
from hf_crouter.hosts.fingerprint import host_architecture
from hf_crouter.hosts.loading import load_host
from hf_crouter.ngram.gate import Gate, GateConfig
from hf_crouter.routing.calibration import Calibration

from .. import tiny
from ..hosts.tiny_families import tiny_family
from ..routing.trained_experts import trained_set
from ..trained_crouter import TEXT, make_tokenizer
from ..twins import TOKENIZER


def words(command, pair, *more):
    return [command, "--crouter", str(pair[0]), "--host", str(pair[1]), *map(str, more)]


def fails(capsys, argv):
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("hf-crouter: error: ")
    return err


def test_generate_streams_text_and_tells_the_chunks(pair, capsys):
    argv = words("generate", pair, "--prompt", TEXT, "--max-new-tokens", 20, "--window", 16, "--soft-prompts")
    assert main(argv) == 0
    streamed, err = capsys.readouterr()
    assert "host tokens" in err and "at the peak" in err and "20 new tokens" in err
    assert main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert streamed.strip() == found["text"].strip() and found["new_tokens"] == 20
    assert found["kv_bytes"] < found["kv_bytes_full"]
    assert found["chunks"][0]["start"] == 4 and found["chunks"][0]["reconstruction_grade"] == "uncalibrated"


def test_generate_equals_the_plain_host_when_nothing_is_compressed(pair, capsys):
    argv = words("generate", pair, "--prompt", TEXT[:40], "--max-new-tokens", 8)
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert "nothing was compressed" in err
    host, tokenizer = load_host(pair[1])
    ids = torch.tensor([tokenizer(TEXT[:40])["input_ids"]])
    expected = host.generate(ids, max_new_tokens=8, do_sample=False)
    assert out.strip() == tokenizer.decode(expected[0, ids.shape[1] :]).strip()


def test_generate_from_a_file_as_chat_and_sampled(pair, tmp_path, capsys):
    (tmp_path / "prompt").write_text(TEXT)
    argv = words("generate", pair, "--prompt-file", tmp_path / "prompt", "--max-new-tokens", 6, "--json", "--chat",
                 "--temperature", 1.0, "--top-k", 5, "--window", 16)  # fmt: skip
    found = []
    for seed in (1, 1, 2):
        assert main([*argv, "--seed", str(seed)]) == 0
        found.append(json.loads(capsys.readouterr().out)["text"])
    assert found[0] == found[1] != found[2]


def test_generate_without_soft_prompts_needs_no_projector(crouter, tiny_host, capsys):
    argv = words("generate", (crouter, tiny_host), "--prompt", TEXT, "--max-new-tokens", 2, "--window", 16)
    assert "hf-crouter align" in fails(capsys, [*argv, "--soft-prompts"])
    assert main([*argv, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["modes"] == ["compact", "retrieve"]


def test_generate_reads_in_the_ways_that_are_asked_for(pair, capsys):
    argv = words("generate", pair, "--prompt", TEXT, "--max-new-tokens", 4, "--window", 16, "--json")
    found = {}
    for name, more in {"ids": ["--soft-prompts", "--copy"], "off": ["--soft-prompts"],
                       "rebuilt": ["--soft-prompts", "--copy", "rebuilt"],
                       "retrieve": ["--soft-prompts", "--copy", "--retrieve", "1"]}.items():  # fmt: skip
        assert main([*argv, *more]) == 0
        found[name] = json.loads(capsys.readouterr().out)
    assert found["off"]["archive_bytes"] == found["off"]["copied"] == 0 < found["ids"]["archive_bytes"]
    assert found["rebuilt"]["archive_bytes"] > found["ids"]["archive_bytes"]  # each token's confidence as well
    assert found["retrieve"]["peak_slots"] > found["ids"]["peak_slots"] == found["off"]["peak_slots"]
    assert main([*argv[:-1], "--copy"]) == 0
    assert "copied: " in capsys.readouterr().err


def changed(weights, name):
    """A file of weights, one of them changed."""
    tensors = load_file(weights)
    tensors[name] = tensors[name] + 1
    save_file(tensors, weights, {"format": "pt"})


def test_generate_and_doctor_take_what_was_fitted_to_a_twin(pair, tmp_path, capsys):
    twin = Path(shutil.copytree(pair[1], tmp_path / "twin"))
    changed(twin / "model.safetensors", "model.norm.weight")
    argv = words("generate", (pair[0], twin), "--prompt", TEXT, "--soft-prompts", "--max-new-tokens", 2, "--json")
    assert main(argv) == 0 and json.loads(capsys.readouterr().out)["modes"] == ["soft_prompts"]
    found = checks(capsys, words("doctor", (pair[0], twin)), 0)
    line = "fitted to a twin (tiny-host, other weights of the same architecture and tokenizer)"
    assert (found["projector"]["status"], found["projector"]["detail"]) == ("ok", line)
    config = Projector.load(pair[0] / "projectors" / "tiny-host").config
    names = ("host_name", "host_fingerprint", "host_architecture", "host_tokenizer")
    Gate(GateConfig(**{name: getattr(config, name) for name in names})).save(pair[0] / "gates" / "tiny-host")
    assert checks(capsys, words("doctor", (pair[0], twin)), 0)["gate"]["detail"] == line
    found = checks(capsys, words("doctor", pair), 0)
    assert found["gate"]["detail"] == "fitted to this very copy of tiny-host"
    assert not any(name.startswith("expert") for name in found), "the shipped ones are of another crouter and host"


def test_doctor_tells_of_the_shipped_experts(monkeypatch, tmp_path):
    module = importlib.import_module("hf_crouter.cli.doctor")
    host, model = tiny.tiny_host(), tiny.tiny_crouter()
    folder = Path(shutil.copytree(trained_set(), tmp_path / "experts"))
    for path in folder.glob("*/expert.json"):
        named = {"host_architecture": host_architecture(host), "host_tokenizer": tokenizer_fingerprint(TOKENIZER)}
        path.write_text(json.dumps({**json.loads(path.read_text()), **named}))
    monkeypatch.setattr(module, "expert_folder", lambda: folder)
    for seed, origin in ((0, "this very copy of tiny"), (5, "a twin (tiny, other weights of the same architecture")):
        found = list(module.expert_checks(model, HostInUse(tiny.tiny_host(seed=seed), TOKENIZER)))
        assert [check.name for check in found] == ["expert low", "expert high"]
        assert all(check.status == "ok" and f"fitted to {origin}" in check.detail for check in found)
    assert list(module.expert_checks(model, HostInUse(tiny.tiny_host(vocab_size=98), TOKENIZER))) == []
    (folder / "experts.json").write_text("{")
    assert [check.status for check in module.expert_checks(model, HostInUse(host))] == ["warn"]


def test_generate_refuses_a_projector_of_another_host_or_crouter(pair, tmp_path, capsys):
    argv = words("generate", pair, "--prompt", TEXT, "--soft-prompts")
    weights = pair[0] / "model.safetensors"
    before = weights.read_bytes()
    changed(weights, "slots")
    assert "projector: expected one for" in fails(capsys, argv)
    weights.write_bytes(before)
    other = Path(shutil.copytree(pair[1], tmp_path / "other"))
    host, tokenizer = load_host(pair[1])
    host.resize_token_embeddings(len(tokenizer) + 1, mean_resizing=False)
    host.save_pretrained(other)
    capsys.readouterr()  # of the loading here
    line = fails(capsys, words("generate", (pair[0], other), "--prompt", TEXT, "--soft-prompts"))
    assert "projector: expected one for" in line and f"got {len(tokenizer) + 1}x32" in line
    weights = pair[0] / "projectors" / "tiny-host" / "projector.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    assert "truncated or altered" in fails(capsys, argv)


def test_generate_refuses_a_damaged_host(pair, tmp_path, capsys):
    host = Path(shutil.copytree(pair[1], tmp_path / "host"))
    argv = words("generate", (pair[0], host), "--prompt", TEXT)
    weights = host / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    assert "cannot be read as a host" in fails(capsys, argv)
    tensors = load_file(pair[1] / "model.safetensors")
    save_file(dict(list(tensors.items())[:-2]), weights, {"format": "pt"})
    assert "damaged" in fails(capsys, argv)
    weights.unlink()
    assert "cannot be read as a host" in fails(capsys, argv)
    weights.write_bytes(data)
    make_tokenizer(500, inspect.getsource(inspect)).save_pretrained(host)
    assert "500 entries" in fails(capsys, argv)
    assert "no such host" in fails(capsys, words("generate", (pair[0], tmp_path / "absent"), "--prompt", TEXT))


@pytest.mark.parametrize(
    "more", [[], ["--prompt", ""], ["--prompt", "a", "-"], ["--prompt", "a", "--temperature", "-1"],
             ["--prompt", "\udcff"], ["--prompt-file", "absent"]]
)  # fmt: skip
def test_generate_refuses(pair, capsys, more):
    fails(capsys, words("generate", pair, *more))


def checks(capsys, argv, status):
    assert main([*argv, "--json"]) == status
    return {check["name"]: check for check in json.loads(capsys.readouterr().out)}


def test_doctor_finds_that_all_fits(pair, capsys):
    fingerprint = crouter_fingerprint(load_crouter(pair[0])[0], decoder=True)
    Calibration.fit([99.0] * 100, 3, fingerprint).save(pair[0])
    found = checks(capsys, words("doctor", pair), 0)
    assert {"python", "torch", "transformers", "device", "crouter", "calibration", "host", "tokenizers",
            "family", "compact", "projector", "gate"} <= set(found)  # fmt: skip
    assert "passes 9 of 9 checks" in found["family"]["detail"]
    assert "pairs can be compacted" in found["compact"]["detail"]
    assert "general" in found["gate"]["detail"]
    assert all(check["status"] == "ok" for check in found.values()), found
    assert main(words("doctor", pair)) == 0
    assert "what to do" in capsys.readouterr().out


def test_doctor_names_what_does_not_fit(pair, tmp_path, capsys):
    Calibration.fit([99.0] * 100, 3, "of another crouter").save(pair[0])
    shutil.rmtree(pair[0] / "projectors")
    found = checks(capsys, words("doctor", pair), 1)
    assert found["calibration"]["status"] == found["projector"]["status"] == "fail"
    assert found["projector"]["advice"].startswith("hf-crouter align --host")
    found = checks(capsys, words("doctor", (tmp_path / "absent", tmp_path / "absent")), 1)
    assert found["crouter"]["status"] == found["host"]["status"] == "fail" and "projector" not in found


def test_doctor_tells_which_hosts_are_not_compacted(pair, capsys, monkeypatch):
    module = importlib.import_module("hf_crouter.cli.doctor")
    host = tiny_family("gptj")
    monkeypatch.setattr(module, "load_host", lambda name, **options: (host, load_host(pair[1])[1]))
    found = checks(capsys, words("doctor", pair), 1)  # the projector is of another host
    assert found["family"]["status"] == "ok" and found["compact"]["status"] == "warn"
    assert "got GPTJForCausalLM, which hides its queries" in found["compact"]["detail"]
    assert "--retrieve 2" in found["compact"]["advice"]


def test_doctor_checks_versions_and_warns_of_a_missing_host(crouter, capsys, monkeypatch):
    module = importlib.import_module("hf_crouter.cli.doctor")
    monkeypatch.setattr(module, "cached_host", lambda name, **options: None)
    version = module.importlib.metadata.version
    monkeypatch.setattr(
        module.importlib.metadata, "version", lambda name: "4.0" if name == "transformers" else version(name)
    )
    found = checks(capsys, ["doctor", "--crouter", str(crouter)], 1)
    assert found["host"]["status"] == found["calibration"]["status"] == "warn"
    assert found["transformers"]["status"] == "fail" and "pip install" in found["transformers"]["advice"]


@pytest.fixture
def long_text(tmp_path):
    path = tmp_path / "long.py"
    path.write_text(inspect.getsource(json.decoder))
    return path


def test_demo_tells_what_it_measured(pair, long_text, capsys):
    argv = words("demo", pair, "--file", long_text, "--window", 32)
    assert main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [arm["key"] for arm in found["arms"]] == ["window", "soft", "copy", "compact", "all", "more_raw", "full"]
    assert found["routes"] == [], "the shipped experts are not of this host"
    window, soft, copy, compact, everything, wider, full = found["arms"]
    assert found["tokens"] == full["kv_slots"] == 1024
    assert window["kv_slots"] == copy["kv_slots"] < soft["kv_slots"] <= everything["kv_slots"] < full["kv_slots"]
    assert soft["kv_bytes"] * full["kv_slots"] == full["kv_bytes"] * soft["kv_slots"]
    assert f"+ {2 * len(found['chunks'])} more raw" in wider["history"] and "copying" in everything["history"]
    assert copy["loss"] != window["loss"] != soft["loss"] != everything["loss"]

    host, tokenizer = load_host(pair[1], dtype=getattr(torch, found["dtype"]))
    ids = torch.tensor([tokenizer(long_text.read_text())["input_ids"]])
    with torch.no_grad():
        scores = host(ids[:, :1024]).logits[0, -513:-1].float().log_softmax(-1)
    loss = -scores[torch.arange(512), ids[0, 512:1024]].mean().item()
    assert full["loss"] == pytest.approx(loss, abs=1e-3)
    assert found["truth"] == tokenizer.decode(ids[0, 1024:1072])
    assert found["worth"]["full_history"] == pytest.approx(window["loss"] - full["loss"])

    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "what the host sees" in out and found["summary"] in out and found["continuation"][:10] in out


def test_who_serves_in_one_line():
    routes = [{"expert": name} for name in ("python", None, "python")]
    assert demo.served_by(routes) == "python 2, the plain host 1 of 3 chunks"


def test_demo_reads_by_what_works_on_a_host_without_a_projector(pair, long_text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo.Compact, "ready", lambda setting: demo.Compact(4))  # chunks here are of 16 tokens
    crouter = tmp_path / "without"
    shutil.copytree(pair[0], crouter, ignore=shutil.ignore_patterns("projectors"))
    argv = words("demo", (crouter, pair[1]), "--file", long_text, "--window", 32)
    assert main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [arm["key"] for arm in found["arms"]] == ["window", "copy", "compact", "all", "more_raw", "full"]
    window, copy, compact, everything, wider, full = found["arms"]
    assert window["kv_slots"] == copy["kv_slots"] < compact["kv_slots"] < everything["kv_slots"] < full["kv_slots"]
    assert "key-value pairs a head" in everything["history"]
    assert "retrieved tokens" in everything["history"] and wider["kv_slots"] >= everything["kv_slots"]
    assert all(chunk["accuracy"] is not None for chunk in found["chunks"])
    assert set(found["worth"]) == {"full_history", "copy", "compact", "all", "more_raw"}
    assert "gains nothing" in found["summary"] or "the defaults" in found["summary"]


def test_demo_refuses_a_short_text(pair, tmp_path, capsys):
    (tmp_path / "short").write_text(TEXT)
    argv = words("demo", pair, "--file", tmp_path / "short", "--json")
    assert main(argv) == 2
    assert "at least" in capsys.readouterr().err


def test_demo_sentence_comes_from_the_figures():
    losses = {"window": 3.0, "soft": 2.9, "copy": 2.5, "all": 2.2, "more_raw": 3.05, "full": 2.0}
    found = demo.worth(losses)
    assert found == pytest.approx({"full_history": 1.0, "soft": 0.1, "copy": 0.5, "all": 0.8, "more_raw": -0.05})
    text = demo.sentence(found)
    assert "soft prompts 10%, copying 50%, soft prompts and copying 80%; as many more raw tokens -5%" in text
    assert "gains nothing" in demo.sentence(demo.worth({**losses, "full": 3.5}))
    del losses["soft"]  # a host without a projector
    text = demo.sentence(demo.worth(losses))
    assert "soft prompts" not in text and "copying 50%, the defaults 80%; as many more raw tokens -5%" in text


def test_demo_reads_the_standard_library():
    assert demo.standard_file() == demo.standard_file()
    assert demo.standard_file().is_file()
