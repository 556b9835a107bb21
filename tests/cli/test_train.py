import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModel

from hf_crouter.cli.main import main
from hf_crouter.compressors.projector import find_projector
from hf_crouter.crouter.loading import load_crouter
from hf_crouter.hosts.loading import load_host

from ..data.samples import LIBRARY, SOURCES
from ..trained_crouter import make_tokenizer

CONFIG = [
    "chunk_length=16", "num_latents=2", "latent_size=24", "embedding_size=16", "hidden_size=32",
    "intermediate_size=48", "num_attention_heads=2", "num_encoder_layers=1", "num_decoder_layers=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Folder of a few source files, and of a tokenizer."""
    folder = tmp_path_factory.mktemp("corpus") / "own"
    folder.mkdir()
    for name in SOURCES:
        (folder / name.replace("/", "_")).write_text((LIBRARY / name).read_text(encoding="utf-8")[:8000], "utf-8")
    tokenizer = folder.parent / "tokenizer"
    make_tokenizer().save_pretrained(tokenizer)
    return folder, tokenizer


def train(corpus, output, *more):
    words = ["train", "--corpus", f"text-files:{corpus[0]}", "--tokenizer", str(corpus[1]), "--output", str(output)]
    return [*words, "--config", *CONFIG, "--batch-size", "8", *more]


def align(crouter, host, output, *more):
    words = ["align", "--host", str(host), "--crouter", str(crouter), "--output", str(output), "--chunks", "1", "2"]
    return [*words, "--window", "12", "--target", "8", "--batch-size", "2", "--hidden-size", "20", *more]


def refused(words, capsys, *texts):
    assert main(words) == 2
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if line.startswith("hf-crouter: error: ")]
    assert out == "" and len(errors) == 1 and err.rstrip().splitlines()[-1] == errors[0], err
    assert all(text in errors[0] for text in texts), errors[0]


def test_from_text_files_to_a_crouter_and_its_projector(corpus, tiny_host, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(train(corpus, run, "--steps", "5", "--json")) == 0
    record = json.loads(capsys.readouterr().out)  # nothing else on stdout
    crouter = Path(record["path"])
    assert crouter == run / "crouter" and record["steps"] == 5
    assert AutoModel.from_pretrained(crouter).config.hidden_size == 32
    for name in ("split.json", "training.json", "tokenizer.json"):
        assert (crouter / name).is_file()

    words = align(crouter, tiny_host, tmp_path / "align", "--data", str(run / "data"), "--steps", "3", "--json")
    assert main(words) == 0
    records = json.loads(capsys.readouterr().out)
    assert records["projector"]["path"] == str(crouter / "projectors/tiny-host")
    assert records["projector"]["steps"] == 3 and records["gate"]["path"] == str(crouter / "gates/tiny-host")
    assert main([*words, "--only", "gate"]) == 0
    assert list(json.loads(capsys.readouterr().out)) == ["gate"]
    assert find_projector(load_crouter(crouter)[0], load_host(tiny_host)[0]).config.host_name == "tiny-host"


def test_plain_output_is_one_line_a_part(corpus, tiny_host, tmp_path, capsys):
    assert main(train(corpus, tmp_path / "run", "--tokens", "300", "--log-every", "1")) == 0
    out, err = capsys.readouterr()
    crouter = tmp_path / "run/crouter"
    assert out.startswith(f"{crouter}: ") and " parameters, " in out and out.count("\n") == 1
    assert "train 100.0%" in err
    words = align(crouter, tiny_host, tmp_path / "a", "--corpus", f"text-files:{corpus[0]}", "--seconds", "0.2")
    assert main(words) == 0
    projector, gate = capsys.readouterr().out.splitlines()
    assert projector.startswith(f"{crouter}/projectors/tiny-host: ")
    assert gate.startswith(f"{crouter}/gates/tiny-host: ") and gate.endswith("on those held out")


@pytest.mark.slow
def test_two_processes_train_one_stage_after_the_other(corpus, tiny_host, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(train(corpus, run, "--steps", "2")) == 0
    words = align(run / "crouter", tiny_host, tmp_path / "a", "--data", str(run / "data"), "--steps", "2")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [*launch, "-m", "hf_crouter", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (run / "crouter/projectors/tiny-host").is_dir() and (run / "crouter/gates/tiny-host").is_dir()


def test_training_goes_on_from_a_crouter_with_its_own_tokenizer(corpus, tmp_path, capsys):
    assert main(train(corpus, tmp_path / "a", "--steps", "2")) == 0
    words = ["train", "--init", str(tmp_path / "a/crouter"), "--data", str(tmp_path / "a/data"), "--batch-size", "4"]
    assert main([*words, "--output", str(tmp_path / "b"), "--steps", "2"]) == 0
    assert len(json.loads((tmp_path / "b/crouter/training.json").read_text())) == 2
    capsys.readouterr()
    refused([*words, "--output", str(tmp_path / "b"), "--steps", "4"], capsys, "expected --resume")
    assert main([*words, "--output", str(tmp_path / "b"), "--steps", "4", "--resume"]) == 0


@pytest.mark.parametrize("box", [[], ["--steps", "3", "--seconds", "5"], ["--steps", "3", "--tokens", "5"]])
def test_a_wrong_box_is_said_before_anything_is_prepared(corpus, crouter, tiny_host, tmp_path, capsys, box):
    texts = ("expected exactly one of --steps, --tokens and --seconds",)
    refused(train(corpus, tmp_path / "out", *box), capsys, *texts)
    words = align(crouter, tiny_host, tmp_path / "out", "--corpus", f"text-files:{corpus[0]}", *box)
    refused(words, capsys, *texts)
    assert not (tmp_path / "out").exists()


def test_bad_input_of_train(corpus, tmp_path, capsys):
    output = tmp_path / "out"
    refused(train(corpus, output, "--steps", "0"), capsys, "--steps: expected more than 0")
    refused(train((tmp_path / "none", corpus[1]), output, "--steps", "1"), capsys, "no such file or folder")
    refused(train((corpus[0], tmp_path), output, "--steps", "1"), capsys, "no tokenizer.json")
    refused(train(corpus, output, "--steps", "1", "--config", "nonsense=1"), capsys, "'nonsense'")
    words = ["train", "--output", str(output), "--steps", "1"]
    refused([*words, "--data", str(tmp_path)], capsys, "--tokenizer: expected a folder or a hub name, got none")
    refused([*words, "--tokenizer", str(corpus[1])], capsys, "no such token file")
    refused(["train", "--steps", "1"], capsys, "--output")
    assert not output.exists()  # all of this is said before the corpora are prepared


def test_bad_input_of_align(crouter, tiny_host, tmp_path, capsys):
    short = tmp_path / "short"
    short.mkdir()
    for name in SOURCES:
        (short / Path(name).name).write_text((LIBRARY / name).read_text(encoding="utf-8")[:600], "utf-8")
    data = ["--corpus", f"text-files:{short}", "--steps", "1"]
    output = tmp_path / "out"
    refused(["align", "--crouter", str(crouter), "--output", str(output), "--steps", "1"], capsys, "--host: expected")
    refused(
        ["align", "--host", str(tiny_host), "--output", str(output), "--steps", "1"], capsys, "--crouter: expected"
    )
    refused(align(crouter, tmp_path / "missing", output, *data), capsys, "no such host folder")
    refused(align(tmp_path / "missing", tiny_host, output, *data), capsys, "expected a crouter's local folder")
    refused(align(crouter, tiny_host, output, *data, "--chunks", "60"), capsys, "documents of 984", "for 60 chunks")
    refused(align(crouter, tiny_host, output, *data, "--chunks", "600"), capsys, "at most 1024 slots")
    refused(align(crouter, tiny_host, output, *data, "--only", "all"), capsys, "--only: expected")
    assert not (crouter / "projectors").exists()


def test_budgets_of_a_host(corpus, tiny_host, tmp_path, capsys):
    words = ["budgets", "--host", str(tiny_host), "--output", str(tmp_path / "b"), "--documents", "2", "--chunks", "1"]
    words += ["--window", "20", "--target", "10", "--device", "cpu", "--slots", "2", "8"]
    assert main([*words, "--corpus", f"text-files:{corpus[0]}"]) == 0
    out = capsys.readouterr().out
    path = tmp_path / "b/layer_budgets.json"
    assert out.startswith(f"{path}: ") and len(out.splitlines()) == 4
    assert main([*words, "--data", str(tmp_path / "b/data"), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["path"] == str(path) and record["host_name"] == "tiny-host" and len(record["losses"]) == 2
    refused([*words, "--data", str(tmp_path / "none")], capsys, "none")
    refused([*words, "--slots", "8", "2"], capsys, "--slots: expected two ascending numbers")
    refused(words[:1], capsys, "--host: expected")
