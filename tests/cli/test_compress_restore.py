import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_crouter.cli.main import main
from hf_crouter.context import CompressedContext
from hf_crouter.crouter.fingerprint import crouter_fingerprint
from hf_crouter.crouter.loading import load_crouter
from hf_crouter.routing.calibration import Calibration

from ..trained_crouter import TEXT, make_tokenizer


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "long.py"
    path.write_text(TEXT, encoding="utf-8", newline="")
    return path


@pytest.fixture
def context(text, crouter, tmp_path, capsys):
    path = tmp_path / "long.safetensors"
    assert main(["compress", str(text), "-o", str(path), "--crouter", str(crouter)]) == 0
    capsys.readouterr()
    return path


def fails(capsys, *words):
    """Runs a command that must end with one clear line and status 2; returns the line."""
    assert main([str(word) for word in words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("hf-crouter: error: ")
    assert "Traceback" not in err
    return err


def test_there_and_back(text, crouter, tmp_path, capsys):
    context = tmp_path / "c.safetensors"
    assert main(["compress", str(text), "-o", str(context), "--crouter", str(crouter)]) == 0
    out = capsys.readouterr().out
    assert "grade" in out.splitlines()[0] and "uncalibrated" in out and "no calibration" in out
    made = CompressedContext.load(context)
    assert len(out.splitlines()) == len(made) + 4
    assert f"{len(made)} chunks: TRA 100.0%; {len(made)} uncalibrated" in out and "times the" in out
    assert main(["restore", str(context), "--crouter", str(crouter)]) == 0
    out, err = capsys.readouterr()
    assert out == TEXT
    assert "% of" in err and "original to the last byte" in err


def test_json(text, crouter, tiny_host, tmp_path, capsys):
    context, rebuilt = tmp_path / "c.safetensors", tmp_path / "rebuilt.py"
    words = ["compress", text, "-o", context, "--crouter", crouter, "--host", tiny_host, "--json"]
    assert main([str(word) for word in words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert sum(chunk["tokens"] for chunk in found["chunks"]) == found["tokens"]
    assert found["latents"] == 2 * len(found["chunks"])
    assert found["file_bytes"] == context.stat().st_size
    assert found["host"]["bytes_per_slot"] == 2 * 2 * 2 * 8 * 4  # K and V, layers, heads, width, float32
    assert found["host"]["kv_bytes"] == found["host"]["tokens"] * found["host"]["bytes_per_slot"]
    assert main(["restore", str(context), "-o", str(rebuilt), "--crouter", str(crouter), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["exact"] and found["certain_share"] > 0.9 and rebuilt.read_bytes() == text.read_bytes()


def test_grades_come_from_the_crouters_calibration(text, crouter, tmp_path, capsys):
    fingerprint = crouter_fingerprint(load_crouter(crouter)[0], decoder=True)
    Calibration.fit([0.5] * 100, 3, fingerprint).save(crouter)
    words = ["compress", str(text), "-o", str(tmp_path / "c.safetensors"), "--crouter", str(crouter), "--json"]
    assert main(words) == 0
    assert {c["reconstruction_grade"] for c in json.loads(capsys.readouterr().out)["chunks"]} == {"rebuildable"}
    Calibration.fit([1e-9] * 100, 3, fingerprint).save(crouter)
    assert main(words) == 0
    assert {c["reconstruction_grade"] for c in json.loads(capsys.readouterr().out)["chunks"]} == {"foreign"}
    Calibration.fit([0.5] * 100, 3, "of another crouter").save(crouter)
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert {c["reconstruction_grade"] for c in json.loads(out)["chunks"]} == {
        "uncalibrated"
    } and "other weights" in err


def test_a_text_shorter_than_a_chunk_works_and_says_so(crouter, tmp_path, capsys):
    (tmp_path / "short").write_text(TEXT[:5])
    assert main(["compress", str(tmp_path / "short"), "-o", str(tmp_path / "c"), "--crouter", str(crouter)]) == 0
    assert "shorter than one chunk" in capsys.readouterr().out


def test_stdin(crouter, tmp_path, capsys, monkeypatch):
    import io
    import sys

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    assert main(["compress", "-", "-o", str(tmp_path / "c"), "--crouter", str(crouter)]) == 0
    assert CompressedContext.load(tmp_path / "c").source == "stdin"


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file"), (b"", "empty"), (b"a\0b", "binary"), (b"caf\xe9 au lait", "not UTF-8 text (byte 3)")],
    ids=["missing", "empty", "binary", "undecodable"],
)
def test_bad_text(crouter, tmp_path, capsys, content, message):
    path, output = tmp_path / "text", tmp_path / "c.safetensors"
    if content is not None:
        path.write_bytes(content)
    assert message in fails(capsys, "compress", path, "-o", output, "--crouter", crouter)
    assert not output.exists()


def test_bad_output(text, crouter, tmp_path, capsys):
    words = ["compress", text, "--crouter", crouter, "-o"]
    assert "does not exist" in fails(capsys, *words, tmp_path / "absent" / "c")
    assert "folder" in fails(capsys, *words, tmp_path)
    assert Path("/dev/null").exists() is False or "device" in fails(capsys, *words, "/dev/null")
    assert "-o" in fails(capsys, "compress", text)
    assert "overwrite" in fails(capsys, *words, text) and text.read_text() == TEXT


def test_bad_crouter(text, crouter, tmp_path, capsys):
    words = ["compress", text, "-o", tmp_path / "c", "--crouter"]
    assert "no such crouter folder" in fails(capsys, *words, tmp_path / "absent")
    weights = crouter / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    assert "cannot be read as a crouter" in fails(capsys, *words, crouter)
    weights.write_bytes(data)
    make_tokenizer(300).save_pretrained(crouter)
    assert "300 entries" in fails(capsys, *words, crouter)


def test_latents_that_are_not_finite(text, crouter, tmp_path, capsys):
    weights = crouter / "model.safetensors"
    tensors = load_file(weights)
    tensors["to_latent.weight"] = tensors["to_latent.weight"] * float("inf")
    save_file(tensors, weights, {"format": "pt"})
    line = fails(capsys, "compress", text, "-o", tmp_path / "c", "--crouter", crouter)
    assert "latents: not finite in chunk 0" in line and not (tmp_path / "c").exists()


@pytest.mark.parametrize("words", [("--device", "nonsense"), ("--device", "meta"), ("--batch-size", "0")])
def test_bad_options(text, crouter, tmp_path, capsys, words):
    fails(capsys, "compress", text, "-o", tmp_path / "c", "--crouter", crouter, *words)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "foreign", "missing", "text"])
def test_bad_context(context, crouter, tmp_path, capsys, damage):
    data = context.read_bytes()
    if damage == "truncated":
        context.write_bytes(data[:-20])
    elif damage == "flipped":
        context.write_bytes(data[:-20] + bytes([data[-20] ^ 1]) + data[-19:])
    elif damage == "foreign":
        shutil.copy(crouter / "model.safetensors", context)
    elif damage == "text":
        context.write_text(TEXT)
    else:
        context.unlink()
    output = tmp_path / "rebuilt"
    fails(capsys, "restore", context, "-o", output, "--crouter", crouter)
    assert not output.exists()


def test_a_context_of_another_crouter(context, crouter, capsys):
    weights = crouter / "model.safetensors"
    tensors = load_file(weights)
    tensors["slots"] = tensors["slots"] + 1
    save_file(tensors, weights, {"format": "pt"})
    assert "made by crouter" in fails(capsys, "restore", context, "--crouter", crouter)


@pytest.mark.parametrize("command", ["compress", "restore"])
def test_a_full_disk_leaves_nothing(text, context, crouter, tmp_path, capsys, monkeypatch, command):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(Path, "write_bytes", full)
    source = text if command == "compress" else context
    line = fails(capsys, command, source, "-o", tmp_path / "new", "--crouter", crouter)
    assert "full" in line or "space" in line
    assert sorted(tmp_path.rglob("*")) == before


def test_threshold(context, crouter, capsys):
    assert main(["restore", str(context), "--crouter", str(crouter), "--threshold", "0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["certain_share"] == 1
    fails(capsys, "restore", context, "--threshold", "1.5")


def test_a_gpu_that_is_not_there(context, crouter, capsys):
    if not torch.cuda.is_available():
        assert "--device cuda" in fails(capsys, "restore", context, "--crouter", crouter, "--device", "cuda")
