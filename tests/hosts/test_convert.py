import hashlib
import json
import time
import tracemalloc
import weakref

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hf_crouter.chunking import tokenizer_fingerprint
from hf_crouter.errors import InputError
from hf_crouter.hosts import safetensors_writer
from hf_crouter.hosts.convert import convert_gguf
from hf_crouter.hosts.fingerprint import host_fingerprint
from hf_crouter.hosts.gguf_reader import read_gguf
from hf_crouter.hosts.safetensors_writer import Source, write_bfloat16

from .gguf_files import tiny_model, write_gguf

FAMILIES = ("llama", "qwen2", "gemma3")


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.Q8_0, Kind.Q4_1], ids=lambda kind: kind.name)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_folder_gives_the_models_logits(family, kind, tmp_path):
    model = write_gguf(tmp_path / "m.gguf", family, kind=kind)
    convert_gguf(tmp_path / "m.gguf", tmp_path / "m", title="Tiny")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    assert type(read) is type(model)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, read.state_dict()[name]), name
    ids = torch.randint(0, model.config.vocab_size, (2, 40))  # longer than Gemma's window
    with torch.no_grad():
        assert torch.equal(model(ids).logits, read(ids).logits)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "m").dtype == torch.bfloat16


@pytest.mark.parametrize("family", FAMILIES)
def test_the_configuration_is_the_models(family, tmp_path):
    model = write_gguf(tmp_path / "m.gguf", family)
    convert_gguf(tmp_path / "m.gguf", tmp_path / "m", title="Tiny")
    read, ours = AutoConfig.from_pretrained(tmp_path / "m").to_dict(), model.config.to_dict()
    differing = {key for key in ours if read.get(key) != ours[key]}
    # a file states the ids of its own tokens, and how it was made
    tokens = {"bos_token_id", "eos_token_id", "pad_token_id"}
    assert differing <= tokens | {"architectures", "dtype", "_name_or_path", "transformers_version"}
    saved = json.loads((tmp_path / "m/config.json").read_text())
    assert saved["_name_or_path"] == "Tiny" and "Odd" not in str(saved) and saved["dtype"] == "bfloat16"


def test_an_answer_also_ends_where_the_original_repository_ends_it(tmp_path):
    ends = {}
    for family in FAMILIES:
        write_gguf(tmp_path / f"{family}.gguf", family)
        convert_gguf(tmp_path / f"{family}.gguf", tmp_path / family, title="Tiny")
        ends[family] = json.loads((tmp_path / family / "generation_config.json").read_text())["eos_token_id"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "qwen2")
    assert ends["qwen2"] == [tokenizer.eos_token_id, tokenizer.pad_token_id] and tokenizer.eos_token == "<|im_end|>"
    assert ends["llama"] == 2 and ends["gemma3"] == 1  # a base model has no turns


def test_a_head_of_its_own_and_attention_biases(tmp_path):
    model = write_gguf(tmp_path / "m.gguf", "llama", tiny_model("llama", tie_word_embeddings=False))
    convert_gguf(tmp_path / "m.gguf", tmp_path / "m", title="Tiny")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    assert not read.config.tie_word_embeddings and torch.equal(read.lm_head.weight, model.lm_head.weight)
    biases = [name for name in tiny_model("qwen2").state_dict() if name.endswith("q_proj.bias")]
    assert len(biases) == 2  # what the first test compares for Qwen2


def test_shards_hold_at_most_what_they_may(tmp_path):
    model = write_gguf(tmp_path / "m.gguf", "qwen2")
    seen = []
    options = {"shard_bytes": 60_000, "poll": lambda done, total: seen.append((done, total))}
    convert_gguf(tmp_path / "m.gguf", tmp_path / "m", title="Tiny", **options)
    shards = sorted((tmp_path / "m").glob("model-*.safetensors"))
    assert len(shards) > 2 and all(path.stat().st_size < 64_000 for path in shards)
    assert not (tmp_path / "m/model.safetensors").exists()
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32).state_dict()
    assert all(torch.equal(weight, read[name]) for name, weight in model.state_dict().items())
    total = sum(2 * weight.numel() for weight in model.state_dict().values())
    assert seen[0] == (0, total) and seen[-1] == (total, total) and seen == sorted(seen)


def test_the_writer_writes_what_safetensors_reads(tmp_path):
    drawn = np.random.default_rng(0)
    arrays = {"b": drawn.standard_normal((7, 5)), "a": drawn.standard_normal(3), "c": np.float32([[np.inf, -0.0]])}
    sources = [Source(k, v.shape, lambda i, j, v=v: v[i:j].astype(np.float32)) for k, v in arrays.items()]
    write_bfloat16(tmp_path, sources)
    read = load_file(tmp_path / "model.safetensors")
    assert {k: v.dtype for k, v in read.items()} == dict.fromkeys("abc", torch.bfloat16)
    assert all(torch.equal(read[k], torch.tensor(v).float().bfloat16()) for k, v in arrays.items())


def test_the_writer_holds_one_block_for_each_thread(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_writer, "_BLOCK_VALUES", 64)
    live, most = set(), [0]

    def read(start, stop):
        rows = np.full((stop - start, 8), start, np.float32)
        assert rows.size <= 64
        live.add(id(rows))
        weakref.finalize(rows, live.discard, id(rows))
        most[0] = max(most[0], len(live))
        return rows

    write_bfloat16(tmp_path, [Source(name, (400, 8), read) for name in "ab"], threads=3)
    assert 1 <= most[0] <= 6  # a thread reads its next block before its last one is dropped
    assert load_file(tmp_path / "model.safetensors")["b"][399, 0] == 392


def test_memory_does_not_grow_with_the_model(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_writer, "_BLOCK_VALUES", 1 << 14)
    model = tiny_model("llama", intermediate_size=1 << 14)  # 2 layers of 3 matrices of 4 MB in float32
    write_gguf(tmp_path / "m.gguf", "llama", model, Kind.Q8_0)
    del model
    tracemalloc.start()
    convert_gguf(tmp_path / "m.gguf", tmp_path / "m", title="Tiny")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(path.stat().st_size for path in (tmp_path / "m").glob("*.safetensors")) > 12e6
    assert peak < 4e6  # less than one matrix


def test_an_error_in_one_block_ends_the_writing(tmp_path):
    calls = []

    def read(start, stop):
        calls.append(start)
        time.sleep(0.01)
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        write_bfloat16(tmp_path, [Source("a", (10_000_000, 1000), read)], threads=2)
    assert len(calls) < 200


@pytest.mark.parametrize("family", FAMILIES)
def test_the_quick_reader_reads_what_gguf_reads(family, tmp_path):
    write_gguf(tmp_path / "m.gguf", family)
    settings, tensors = read_gguf(tmp_path / "m.gguf")
    reader = GGUFReader(tmp_path / "m.gguf")
    skipped = "tokenizer.ggml.scores"
    assert settings == {k: v.contents() for k, v in reader.fields.items() if v.types and k != skipped}
    assert [t.name for t in reader.tensors] == list(tensors)
    assert all(np.array_equal(t.data, tensors[t.name].data) for t in reader.tensors)


def test_what_is_no_such_model_is_refused_in_one_line(tmp_path):
    (tmp_path / "zeros.gguf").write_bytes(b"GGUF" + b"\0" * 100)
    (tmp_path / "text.gguf").write_bytes(b"hello" * 100)
    write_gguf(tmp_path / "less.gguf", "llama", drop=["blk.1.ffn_up.weight"])
    extra = {"rope_freqs.weight": (np.ones(8, np.float32), None)}
    write_gguf(tmp_path / "more.gguf", "llama", extra=extra)
    extra = {"blk.2.ffn_up.weight": (np.ones((96, 64), np.float32), None)}
    write_gguf(tmp_path / "layer.gguf", "llama", extra=extra)
    whole = (tmp_path / "layer.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "mamba")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for name, words in {
        "zeros": "cannot read zeros.gguf as a model",
        "text": "cannot read text.gguf as a model",
        "cut": "cannot read cut.gguf as a model",
        "less": "expected model.layers.1.mlp.up_proj.weight of shape .96, 64., got none",
        "layer": "expected model.layers.2.mlp.up_proj.weight of shape none, got .96, 64.",
        "more": "got rope_freqs.weight",
        "other": "architecture: expected one of gemma3, llama, qwen2, got 'mamba'",
    }.items():
        with pytest.raises(InputError, match=words) as error:
            convert_gguf(tmp_path / f"{name}.gguf", tmp_path / "out", title="Tiny")
        assert "\n" not in str(error.value)
        assert not (tmp_path / "out").exists()


@pytest.mark.host
def test_the_real_hosts_folder_is_the_one_that_the_shipped_projector_was_fitted_to(real_host):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(real_host), AutoTokenizer.from_pretrained(real_host)
    weights = hashlib.sha256((real_host / "model.safetensors").read_bytes()).hexdigest()
    assert weights == "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b"
    assert (host_fingerprint(model), tokenizer_fingerprint(tokenizer)) == (
        "cab58dcabf5f75301f42ab1be0c9ac37",
        "31c4df0368465d0670c89c676311b701",
    )
