import json
import os
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from hf_crouter.errors import InputError
from hf_crouter.hosts.fetch import MANIFEST, cached_host, fetch_host, list_hosts, resolve_host
from hf_crouter.hosts.known_hosts import KNOWN_HOSTS, Terms

from .fetching import cut, flip, know, leftovers, sha256


def test_a_fetched_host_is_an_ordinary_folder(pip, capfd):
    assert list_hosts() == ("tiny",) and cached_host("tiny") is None
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    folder = fetch_host("tiny")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (verbosity, bars)
    printed = capfd.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 2  # two steps, nothing of transformers
    assert folder == pip["folder"] == cached_host("tiny", thorough=True)
    assert not leftovers(pip) and not pip["store"].parent.exists()

    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16 and model.config.model_type == "llama"
    assert model.config.tie_word_embeddings and model.generation_config.eos_token_id == 2
    assert not hasattr(model.config, "quantization_config")
    config = json.loads((folder / "config.json").read_text())
    assert config["_name_or_path"] == "Tiny-Instruct" and config["rms_norm_eps"] == 1e-5 and "Odd" not in str(config)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)


def test_the_table_is_complete():
    assert list(KNOWN_HOSTS) == ["smollm2-135m", "gemma-3-270m", "qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b"]
    parts = [part for host in KNOWN_HOSTS.values() for part in host.parts]
    assert [len(host.parts) for host in KNOWN_HOSTS.values()] == [1, 4, 6, 22]
    for field in ("requirement", "wheel_sha256", "member"):
        assert len({getattr(part, field) for part in parts}) == len(parts)
    sums = [part.wheel_sha256 for part in parts] + [host.gguf_sha256 for host in KNOWN_HOSTS.values()]
    assert all(len(text) == 64 and int(text, 16) for text in sums)
    assert all("==" in part.requirement and "{" not in part.member for part in parts)
    assert [host.name for host in KNOWN_HOSTS.values() if host.terms] == ["gemma-3-270m"]


def test_a_second_fetch_needs_no_pip_and_force_does(pip):
    first = fetch_host("tiny", progress=False)
    sums = {path.name: sha256(path) for path in first.iterdir()}
    pip["status"] = 1
    assert fetch_host("tiny", progress=False) == first and len(pip["asked"]) == 3
    with pytest.raises(InputError):
        fetch_host("tiny", progress=False, force=True)
    assert cached_host("tiny") == first  # a failed refetch harms nothing
    pip["status"] = 0
    fetch_host("tiny", progress=False, force=True)
    assert {path.name: sha256(path) for path in first.iterdir()} == sums
    assert not leftovers(pip)


@pytest.mark.parametrize(
    ("name", "harm", "words"),
    [
        ("model.safetensors", cut, "model.safetensors has"),
        ("model.safetensors", flip, "model.safetensors does not fit"),
        ("tokenizer.json", flip, "tokenizer.json does not fit"),
        ("config.json", os.unlink, "config.json is missing"),
        (MANIFEST, os.unlink, f"no {MANIFEST}"),
        (MANIFEST, cut, f"{MANIFEST} is unreadable"),
    ],
)
def test_a_damaged_host_is_refused_with_the_way_out(pip, name, harm, words):
    folder = fetch_host("tiny", progress=False)
    harm(folder / name)
    for use in (cached_host, fetch_host, resolve_host):
        with pytest.raises(InputError, match=words) as error:
            use("tiny")
        assert "hf-crouter host get tiny --force" in str(error.value) and "\n" not in str(error.value)
    fetch_host("tiny", progress=False, force=True)
    assert cached_host("tiny", thorough=True) == folder


@pytest.mark.parametrize(
    ("status", "output", "words"),
    [
        (1, "/usr/bin/python: No module named pip", "no pip"),
        (1, "WARNING: Retrying ... NewConnectionError: Failed to establish a new connection", "cannot be reached"),
        (1, "ERROR: No matching distribution found for tiny-host==1.0", "no such distribution"),
        (1, "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "disk is full"),
    ],
)
def test_pip_failures_are_one_clear_line_and_leave_nothing(pip, status, output, words):
    pip.update(status=status, output=output)
    with pytest.raises(InputError, match=words) as error:
        fetch_host("tiny", progress=False)
    assert "\n" not in str(error.value)
    assert not pip["folder"].exists() and not leftovers(pip)


def test_too_little_disk_is_said_before_the_download(pip, wheels, monkeypatch):
    know(monkeypatch, replace(wheels[1], folder_bytes=10**18))
    with pytest.raises(InputError, match="^disk below .*: expected [0-9,]+ MB free for Tiny-Instruct, got"):
        fetch_host("tiny", progress=False)
    assert pip["asked"] == [] and not leftovers(pip)


def test_terms_are_accepted_before_anything_is_downloaded(pip, wheels, monkeypatch):
    know(monkeypatch, replace(wheels[1], terms=Terms("the Tiny Terms", "https://example.org/terms")))
    for use in (fetch_host, resolve_host):
        with pytest.raises(InputError, match="tiny: expected the Tiny Terms to be accepted, got no") as error:
            use("tiny", progress=False)
        assert "https://example.org/terms" in str(error.value) and "\n" not in str(error.value)
        assert "hf-crouter host get tiny --accept-terms" in str(error.value)
    assert pip["asked"] == [] and not pip["folder"].parent.exists()
    folder = fetch_host("tiny", progress=False, accept_terms=True)
    terms = json.loads((folder / MANIFEST).read_text())["terms"]
    assert terms["name"] == "the Tiny Terms" and terms["accepted"].startswith("20")
    assert resolve_host("tiny") == str(fetch_host("tiny")) == str(folder)  # accepted once
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match="host get tiny --accept-terms --force"):
        cached_host("tiny")


def test_a_folder_of_an_earlier_version_is_accepted(pip):
    folder = fetch_host("tiny", progress=False)
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["sources"]
    manifest |= {"source": "tiny-host==1.0", "wheel_sha256": "0" * 64}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert cached_host("tiny", thorough=True) == folder


def test_names_folders_and_hub_names_resolve(pip, tmp_path):
    assert resolve_host("tiny", progress=False) == str(pip["folder"])
    assert resolve_host(tmp_path) == str(tmp_path)
    assert resolve_host("someone/some-model") == "someone/some-model"
    for use in (fetch_host, cached_host):
        with pytest.raises(InputError, match="no host is called 'nobody'; there are tiny"):
            use("nobody")


def test_a_cache_folder_may_be_given(pip, tmp_path):
    assert fetch_host("tiny", tmp_path / "mine", progress=False) == tmp_path / "mine" / "tiny"
    assert cached_host("tiny", tmp_path / "mine") and cached_host("tiny") is None


@pytest.mark.host
@pytest.mark.slow
def test_the_real_host_answers(real_host):
    tokenizer = AutoTokenizer.from_pretrained(real_host)
    model = AutoModelForCausalLM.from_pretrained(real_host)
    assert model.dtype == torch.bfloat16 and model.config.max_position_embeddings == 8192
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    new = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert "Paris" in tokenizer.decode(new[0, ids.shape[1] :])
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert prompt["input_ids"][0, 0] == tokenizer.bos_token_id
    reply = model.generate(**prompt, max_new_tokens=20, do_sample=False)
    assert "Paris" in tokenizer.decode(reply[0, prompt["input_ids"].shape[1] :])


@pytest.mark.host
def test_the_real_hosts_ids_are_those_that_the_shipped_crouter_was_trained_on(real_host):
    tokenizer = AutoTokenizer.from_pretrained(real_host)
    assert tokenizer.convert_ids_to_tokens(tokenizer("x =  10\n    7").input_ids) == [
        "x", "Ġ=", "Ġ", "Ġ", "1", "0", "ĊĠĠĠ", "Ġ", "7",
    ]  # fmt: skip
    assert len(tokenizer) == 49_152
