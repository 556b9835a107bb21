import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from eval import gates
from eval.rows import Record, Rows, Shape
from hf_crouter.chunking import tokenizer_fingerprint
from hf_crouter.ngram.gate import FEATURES, SOURCES, Gate
from hf_crouter.training.gate import mixture_log_likelihood

from .tiny_world import SOURCE, world

torch.set_num_threads(1)

SMALL = Shape(chunks=4, target=24)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """What two processes recorded of one host, a file each."""
    folder = tmp_path_factory.mktemp("gates")
    tokenizer = world().reader().tokenizer
    ids = np.array(tokenizer.encode(SOURCE), np.uint32)
    for name in ("gate_code", "gate_prose"):
        rows = np.stack([ids[n * 300 : n * 300 + SMALL.length] for n in range(4)])
        records = [Record(f"{name}{n}", f"group{n}", "code", 0.0) for n in range(4)]
        Rows(rows, np.zeros((4, SMALL.target), np.int16), records, SMALL, tokenizer_fingerprint(tokenizer), {}).save(
            folder, name, 0
        )
    for shard in range(2):
        words = ["record", "--host", world().host, "--data", str(folder), "--sets", "gate_code", "gate_prose",
                 "--shard", f"{shard}/2", "--out", str(folder / f"{shard}.safetensors")]  # fmt: skip
        assert gates.main(words) == 0
    return folder


def test_every_row_is_recorded_once(files):
    groups = []
    for shard in range(2):
        with safe_open(files / f"{shard}.safetensors", "pt") as file:
            assert file.metadata()["host"] == "tiny-host"
            groups += json.loads(file.metadata()["groups"])
            features, copied = file.get_tensor("features"), file.get_tensor("copied")
        assert features.shape[1] == FEATURES and copied.shape == (len(features), SOURCES)
    assert {name for name in groups if name.startswith("group")} == {f"group{n}" for n in range(4)}


def test_a_gate_over_hosts_and_one_that_never_saw_one(files, capsys, tmp_path):
    both = [str(files / f"{shard}.safetensors") for shard in range(2)]
    assert gates.main(["fit", *both, "--out", str(tmp_path / "all")]) == 0
    gate = Gate.load(tmp_path / "all")
    assert gate.config.host_name == "" and gate.config.training["hosts"] == ["tiny-host"]
    said = capsys.readouterr().out
    parts = [part for path in both for part in gates.read(files / path)[1]]
    gained = gates.gain(gate, parts)
    assert f"tiny-host: {gained:.4f} nats gained on all" in said
    total = sum(
        float((mixture_log_likelihood(gate, part.features, part.available, part.copied, part.host) - part.host).sum())
        for part, _ in parts
    )
    assert gained == pytest.approx(total / sum(len(part.host) for part, _ in parts), abs=1e-5)
    assert gates.main(["fit", *both, "--leave-out", "tiny-host", "--out", str(tmp_path / "none")]) == 2
    assert "expected examples of a host that is not left out" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_odd_files_are_refused_in_one_line(tmp_path, capsys):
    (tmp_path / "odd.safetensors").write_bytes(b"nothing")
    assert gates.main(["fit", str(tmp_path / "odd.safetensors"), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert gates.main(["record", "--host", world().host, "--data", str(tmp_path), "--out", str(tmp_path / "x")]) == 2
    assert "expected the set gate_code" in capsys.readouterr().err and not (tmp_path / "x").exists()
    save_file({"features": np.zeros(3, np.float32)}, tmp_path / "bare.safetensors")
    assert gates.main(["fit", str(tmp_path / "bare.safetensors"), "--out", str(tmp_path / "out")]) == 2
    assert "expected a file of eval.gates record" in capsys.readouterr().err


def test_what_leaves_nothing_or_names_nobody_is_refused(files, tmp_path, capsys):
    words = ["record", "--host", world().host, "--data", str(files), "--sets", "gate_code", "--documents", "1",
             "--shard", "1/2", "--out", str(tmp_path / "x.safetensors")]  # fmt: skip
    assert gates.main(words) == 2 and "got none in shard 1/2" in capsys.readouterr().err
    words = ["fit", str(files / "0.safetensors"), "--leave-out", "tiny-hots", "--out", str(tmp_path / "out")]
    assert gates.main(words) == 2 and "expected hosts among ['tiny-host'], got tiny-hots" in capsys.readouterr().err
