import errno
import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_crouter.context import ON_DISK, CompressedContext, _digest, compress_text, restore_text
from hf_crouter.crouter.loading import load_crouter, shipped_crouter
from hf_crouter.errors import InputError, MismatchError

from .trained_crouter import LENGTH, TEXT, make_tokenizer, trained_crouter


@pytest.fixture(scope="module")
def crouter():
    return load_crouter(trained_crouter())


@pytest.fixture(scope="module")
def context(crouter):
    return compress_text(TEXT, *crouter, source="text")


@pytest.fixture
def saved(context, tmp_path):
    path = tmp_path / "c.safetensors"
    context.save(path)
    return path


def test_context_is_what_the_crouter_makes_chunk_by_chunk(crouter, context):
    model, tokenizer = crouter
    ids = tokenizer(TEXT)["input_ids"]
    assert context.num_tokens == len(ids) and len(context) == -(-len(ids) // LENGTH)
    assert len(ids) % LENGTH, "the text should end in a ragged chunk"
    for i in range(len(context)):  # reference: one chunk a pass, no padding
        chunk = torch.tensor([ids[i * LENGTH : (i + 1) * LENGTH]])
        assert int(context.tokens[i]) == chunk.shape[1]
        with torch.no_grad():
            latents = model.encode(chunk).to(torch.bfloat16)
            logits = model.decode(latents.float(), length=chunk.shape[1])[0]
        loss = -logits.log_softmax(-1)[torch.arange(chunk.shape[1]), chunk[0]].mean()
        torch.testing.assert_close(context.latents[i], latents[0], atol=0.02, rtol=0.02)
        torch.testing.assert_close(context.reconstruction_nll[i], loss, atol=2e-3, rtol=0.02)
        assert context.accuracy[i] == (logits.argmax(-1) == chunk[0]).float().mean()


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_batch_size_changes_nothing(crouter, context, batch_size):
    other = compress_text(TEXT, *crouter, batch_size=batch_size)
    torch.testing.assert_close(other.reconstruction_nll, context.reconstruction_nll, atol=1e-3, rtol=1e-2)
    assert torch.equal(other.tokens, context.tokens)


def test_round_trip_is_exact_and_the_text_comes_back(crouter, context, saved):
    loaded = CompressedContext.load(saved)
    for name in ("latents", "tokens", "reconstruction_nll", "accuracy"):
        assert torch.equal(getattr(loaded, name), getattr(context, name))
    assert loaded.sha256 == hashlib.sha256(TEXT.encode()).hexdigest()
    assert (loaded.source, loaded.crouter, loaded.num_bytes) == ("text", "crouter-tiny", len(TEXT.encode()))
    restored = restore_text(loaded, *crouter)
    assert restored.text == TEXT
    assert restored.confidence.shape == (context.num_tokens,)
    assert restored.certain_share == (restored.confidence >= 0.9).float().mean() > 0.9


def test_a_file_of_the_first_version(tmp_path):
    tensors = {"latents": torch.ones(2, 3, 4).bfloat16(), "tokens": torch.tensor([5, 1], dtype=torch.int32),
               "residual": torch.tensor([0.5, 2.0]), "accuracy": torch.tensor([1.0, 0.0])}  # fmt: skip
    metadata = {"format": "crouter-context-1", "chunks": "2", "num_tokens": "6", "crouter": "c",
                "crouter_fingerprint": "f", "tokenizer_fingerprint": "t", "source": "s", "sha256": "0",
                "num_bytes": "7"}  # fmt: skip
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    save_file(tensors, tmp_path / "old", {**metadata, "digest": digest.hexdigest()})
    found = CompressedContext.load(tmp_path / "old")
    assert torch.equal(found.reconstruction_nll, tensors["residual"]) and found.num_tokens == 6
    found.save(tmp_path / "new")
    assert CompressedContext.load(tmp_path / "new").num_bytes == 7
    assert load_file(tmp_path / "new").keys() == tensors.keys(), "and is written as before"


def test_a_file_keeps_the_names_of_its_first_version(context, saved):
    assert set(load_file(saved)) == {"latents", "tokens", "residual", "accuracy"}
    assert torch.equal(load_file(saved)["residual"], context.reconstruction_nll)


def test_certain_share_follows_the_threshold(crouter, context):
    assert restore_text(context, *crouter, threshold=0.0).certain_share == 1
    assert restore_text(context, *crouter, threshold=1.1).certain_share == 0


def test_a_text_shorter_than_a_chunk(crouter):
    short = compress_text(TEXT[:7], *crouter)
    assert len(short) == 1 and short.num_tokens < LENGTH
    assert len(restore_text(short, *crouter).confidence) == short.num_tokens


def test_characters_across_a_chunk_border_are_decoded_whole(crouter):
    model, tokenizer = crouter
    text = "a" + "€" * LENGTH  # three bytes and three tokens each
    context = compress_text(text, *crouter)
    assert len(context) > 1
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text and context.num_tokens == len(ids)


def test_progress_is_told(crouter, context):
    told, total = [], len(context)
    compress_text(TEXT, *crouter, batch_size=5, progress=lambda *step: told.append(step))
    assert told == [(min(done, total), total) for done in range(5, total + 5, 5)]


def test_refuses_an_empty_text(crouter):
    with pytest.raises(InputError, match="empty"):
        compress_text("", *crouter)


def test_refuses_latents_that_are_not_finite_and_names_the_chunk():
    model, tokenizer = load_crouter(trained_crouter())
    ids = tokenizer(TEXT)["input_ids"]
    only_late = next(i for i in ids[3 * LENGTH : 4 * LENGTH] if i not in ids[: 3 * LENGTH])
    with torch.no_grad():
        model.embed_tokens.weight[only_late] = float("nan")
    with pytest.raises(InputError, match="latents: not finite in chunk 3"):
        compress_text(TEXT, model, tokenizer, batch_size=2)


def test_refuses_a_tokenizer_with_more_entries(crouter):
    text = TEXT * 3
    with pytest.raises(MismatchError, match="outside the crouter's 384"):
        compress_text(text, crouter[0], make_tokenizer(600, Path(json.decoder.__file__).read_text() + text))


def test_restore_refuses_another_crouter_or_tokenizer(crouter, context):
    other, tokenizer = load_crouter(trained_crouter())
    with torch.no_grad():
        other.slots.mul_(1.5)
    with pytest.raises(MismatchError, match="whose crouter"):
        restore_text(context, other, tokenizer)
    with pytest.raises(MismatchError, match="whose tokenizer"):
        restore_text(context, crouter[0], make_tokenizer(384, "other words altogether, of a kind"))


def test_every_flipped_bit_is_noticed(saved):
    data = saved.read_bytes()
    for position in range(0, len(data), max(1, len(data) // 40)):
        saved.write_bytes(data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :])
        with pytest.raises(InputError) as error:
            CompressedContext.load(saved)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.99])
def test_a_truncated_file(saved, share):
    data = saved.read_bytes()
    saved.write_bytes(data[: int(share * len(data))])
    with pytest.raises(InputError, match="truncated"):
        CompressedContext.load(saved)


def test_foreign_and_newer_files(saved, context, tmp_path):
    foreign = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.ones(3)}, foreign)
    with pytest.raises(InputError, match="not a compressed context"):
        CompressedContext.load(foreign)
    save_file(load_file(saved), foreign, {"format": "crouter-context-9"})
    with pytest.raises(InputError, match="crouter-context-9"):
        CompressedContext.load(foreign)
    with pytest.raises(FileNotFoundError):
        CompressedContext.load(tmp_path / "absent")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [("latents", lambda x: x * float("nan"), "not finite in chunk 0"),
     ("latents", torch.Tensor.float, "bfloat16"),
     ("latents", lambda x: x[0], "shape"),
     ("tokens", lambda x: x[1:], "values"),
     ("tokens", torch.zeros_like, "at least one token"),
     ("reconstruction_nll", lambda x: x / 0, "not finite")],
)  # fmt: skip
def test_bad_values_cannot_be_held_or_loaded(saved, context, name, change, message):
    value = change(getattr(context, name)).contiguous()
    with pytest.raises(InputError, match=message):
        replace(context, **{name: value})
    metadata = {"format": "crouter-context-1", "crouter": "c", "crouter_fingerprint": "f", "num_bytes": "3",
                "tokenizer_fingerprint": "t", "source": "", "sha256": ""}  # fmt: skip
    tensors = load_file(saved) | {ON_DISK.get(name, name): value}
    save_file(tensors, saved, metadata | {"digest": _digest(tensors, metadata)})
    with pytest.raises(InputError, match=message):
        CompressedContext.load(saved)


def test_a_full_disk_leaves_nothing(context, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises((InputError, OSError)):
        context.save(tmp_path / "c.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_failed_write_keeps_the_old_file(saved, context, monkeypatch):
    before = saved.read_bytes()
    monkeypatch.setattr("os.replace", lambda *a: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
    with pytest.raises((InputError, OSError)):
        context.save(saved)
    assert saved.read_bytes() == before and len(list(saved.parent.iterdir())) == 1


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(trained_crouter(), tmp_path / "crouter"))


def test_load_crouter_refuses_a_damaged_folder(folder):
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-100])
    with pytest.raises(InputError, match="cannot be read as a crouter"):
        load_crouter(folder)
    tensors = load_file(trained_crouter() / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if k != "slots"}, weights, {"format": "pt"})
    with pytest.raises(InputError, match="slots"):
        load_crouter(folder)
    save_file(tensors | {"slots": torch.ones(3, 3)}, weights, {"format": "pt"})
    with pytest.raises(InputError, match="crouter"):
        load_crouter(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read as a crouter"):
        load_crouter(folder)


def test_load_crouter_refuses_another_vocabulary(folder):
    make_tokenizer(300).save_pretrained(folder)
    with pytest.raises(MismatchError, match="300 entries.*384"):
        load_crouter(folder)


def test_load_crouter_refuses_what_is_no_crouter(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"} | {"vocab_size": config["vocab_size"]}))
    with pytest.raises(InputError, match="type 'llama'"):
        load_crouter(folder)
    with pytest.raises(InputError, match="no such crouter folder"):
        load_crouter(tmp_path / "absent")
    with pytest.raises(InputError, match="got a file"):
        load_crouter(folder / "config.json")


def test_the_shipped_crouter_is_named_when_missing(monkeypatch, tmp_path):
    monkeypatch.setattr("hf_crouter.crouter.loading.SHIPPED", tmp_path / "crouter-code-mini")
    with pytest.raises(InputError, match="shipped crouter is missing"):
        shipped_crouter()
