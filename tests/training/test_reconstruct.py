import json
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from hf_crouter import CRouterModel
from hf_crouter.crouter.fingerprint import crouter_fingerprint
from hf_crouter.crouter.loading import load_crouter
from hf_crouter.data.tokens import TokenArray
from hf_crouter.errors import InputError
from hf_crouter.routing.calibration import Calibration
from hf_crouter.training.evaluate import reconstruction_score
from hf_crouter.training.loop import LoopArguments
from hf_crouter.training.reconstruct import (
    ReconstructArguments,
    ReconstructionLoss,
    ragged_lengths,
    read_config,
    reconstruction_batch,
    train_reconstruction,
)

from ..tiny import tiny_crouter
from ..trained_crouter import make_tokenizer
from .prepared import CONFIG, LENGTH, prepared


def arguments(output, **changes):
    data, tokenizer = prepared()
    options = {"output": str(output), "data": str(data), "tokenizer": str(tokenizer), "config": CONFIG,
               "steps": 150, "batch_size": 16, "learning_rate": 0.01, "warmup_steps": 5, "log_every": 5}  # fmt: skip
    return ReconstructArguments(**{**options, **changes})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Output folder of a run, and what it returned."""
    output = tmp_path_factory.mktemp("trained")
    return output, train_reconstruction(arguments(output))


def refused(match, tmp_path, **changes):
    with pytest.raises(InputError, match=match) as caught:
        train_reconstruction(arguments(tmp_path / "out", **{"steps": 1, **changes}))
    assert "\n" not in str(caught.value) and not (tmp_path / "out/crouter").exists()


def test_the_loss_falls_and_the_record_says_how(trained):
    output, record = trained
    rows = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < rows[0]["loss"] - 1 and rows[-1]["tra"] > rows[0]["tra"]
    assert record["steps"] == 150 and record["final"]["loss"] == rows[-1]["loss"]
    assert 0.85 * 150 * 16 * LENGTH < record["tokens"] < 150 * 16 * LENGTH  # only real tokens count
    assert record["stage"] == "reconstruct" and record["device"] == "cpu" and record["processes"] == 1
    assert not any(str(value).startswith("/") for value in record["arguments"].values())


def test_the_folder_holds_all_that_a_crouter_is(trained):
    folder = trained[0] / "crouter"
    crouter = AutoModel.from_pretrained(folder)
    assert isinstance(crouter, CRouterModel) and crouter.dtype == torch.bfloat16
    assert crouter.num_parameters() == trained[1]["parameters"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == crouter.config.vocab_size and tokenizer.decode(tokenizer("a = 1")["input_ids"]) == "a = 1"
    assert (folder / "split.json").read_bytes() == (prepared()[0] / "split.json").read_bytes()
    assert json.loads((folder / "training.json").read_text()) == [trained[1]]
    calibration = Calibration.load(folder)
    assert calibration is not None and calibration.fingerprint == crouter_fingerprint(crouter, decoder=True)
    held_out = TokenArray.load(prepared()[0] / "calibration.safetensors")
    assert calibration.documents == len(held_out.names) > 0
    ids, mask = held_out.chunks(LENGTH, 2048)
    again = reconstruction_score(load_crouter(folder)[0], torch.from_numpy(ids), torch.from_numpy(mask))
    assert calibration.chunks == again.chunks
    assert calibration.quantiles[0.5] == pytest.approx(float(np.median(again.chunk_reconstruction_nll)), abs=1e-4)
    assert folder.stat().st_mode & 0o777 == 0o755
    assert sorted(p.name for p in trained[0].iterdir()) == ["checkpoint-00000150", "crouter", "log.jsonl"]


def test_what_is_saved_is_what_was_trained(trained):
    crouter = load_crouter(trained[0] / "crouter")[0]
    tokens = TokenArray.load(prepared()[0] / "train.safetensors")
    data = reconstruction_batch(tokens, arguments("x"), LENGTH, 149)
    with torch.no_grad():
        metrics = ReconstructionLoss(crouter)(*data.arguments)
    assert metrics["loss"].item() == pytest.approx(trained[1]["final"]["loss"], abs=0.15)  # bfloat16, one step on


def test_init_goes_on_from_weights_and_keeps_both_records(trained, tmp_path):
    options = {"init": str(trained[0] / "crouter"), "config": [], "tokenizer": "", "steps": 10, "learning_rate": 1e-3}
    record = train_reconstruction(arguments(tmp_path, **options, log_every=1, warmup_steps=0))
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rows[0]["loss"] < trained[1]["final"]["loss"] + 0.5
    records = json.loads((tmp_path / "crouter/training.json").read_text())
    assert records == [trained[1], record] and [r["steps"] for r in records] == [150, 10]
    assert load_crouter(tmp_path / "crouter")[0].config.hidden_size == 32


def test_a_resumed_run_makes_the_same_crouter(trained, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_reconstruction(arguments(whole, steps=6, log_every=1))
    from hf_crouter.training import reconstruct

    draw = reconstruct.reconstruction_batch

    def stops(tokens, options, length, index):
        if index == 4:
            raise KeyboardInterrupt
        return draw(tokens, options, length, index)

    monkeypatch.setattr(reconstruct, "reconstruction_batch", stops)
    with pytest.raises(KeyboardInterrupt):
        train_reconstruction(arguments(parts, steps=6, log_every=1, save_minutes=0))
    monkeypatch.undo()
    train_reconstruction(arguments(parts, steps=6, log_every=1, resume=True))
    name = "crouter/model.safetensors"
    assert (whole / name).read_bytes() == (parts / name).read_bytes()
    curves = [
        [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]
        for folder in (whole, parts)
    ]
    assert curves[0] == curves[1] and len(curves[0]) == 6


def test_without_calibration_documents_there_is_no_calibration(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    shutil.copy(prepared()[0] / "train.safetensors", data)
    train_reconstruction(arguments(tmp_path / "out", data=str(data), steps=1))
    folder = tmp_path / "out/crouter"
    assert Calibration.load(folder) is None and not (folder / "split.json").exists()


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_the_share_of_ragged_chunks_is_a_quota_of_every_batch(share):
    for index in range(50):
        lengths = ragged_lengths(64, 512, share, 0, index)
        cut = lengths[lengths < 512]
        assert lengths.min() >= 1 and lengths.max() == 512 and len(cut) == np.ceil(share * 64)
        assert (cut >= 480).sum() >= len(cut) // 2
    drawn = np.concatenate([ragged_lengths(64, 512, share, 0, index) for index in range(200)])
    anywhere = drawn[drawn < 480]
    assert 0.08 < (anywhere < 60).mean() < 0.18 and len(np.unique(anywhere)) > 300
    first = ragged_lengths(64, 512, share, 0, 7)
    assert np.array_equal(first, ragged_lengths(64, 512, share, 0, 7))
    assert not np.array_equal(first, ragged_lengths(64, 512, share, 1, 7))
    assert (ragged_lengths(64, 512, 0.0, 0, 0) == 512).all() and (ragged_lengths(5, 1, 1.0, 0, 0) == 1).all()


def test_a_batch_depends_on_its_number_alone_and_counts_real_tokens():
    tokens = TokenArray.load(prepared()[0] / "train.safetensors")
    one, same, other = (reconstruction_batch(tokens, arguments("x"), LENGTH, index) for index in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(one.arguments, same.arguments, strict=True))
    assert not torch.equal(one.arguments[0], other.arguments[0])
    ids, mask = one.arguments
    assert ids.shape == mask.shape == (16, LENGTH) and one.real_tokens == int(mask.sum()) < mask.numel()
    assert (mask[:, :-1] >= mask[:, 1:]).all()  # right padding


def test_configuration_comes_from_settings():
    config = read_config(["hidden_size=64", "num_attention_heads=2", "rope_theta=500.0"], 99)
    assert (config.vocab_size, config.hidden_size, config.rope_theta) == (99, 64, 500.0)


@pytest.mark.parametrize(
    ("setting", "match"),
    [("nonsense=3", "expected a setting of CRouterConfig, got 'nonsense'"), ("hidden_size", "expected a number"),
     ("hidden_size=big", "expected a number"), ("hidden_size=0", "expected a valid configuration"),
     ('hidden_size="8"', "expected a valid configuration"), ("num_attention_heads=5", "expected a valid"),
     ("model_type=3", "expected a setting")],
)  # fmt: skip
def test_unknown_or_wrong_settings_are_one_line(tmp_path, setting, match):
    refused(match, tmp_path, config=[*CONFIG, setting])


def test_what_does_not_fit_is_refused(tmp_path, trained):
    crouter = trained[0] / "crouter"
    make_tokenizer(vocab_size=300).save_pretrained(tmp_path / "other")
    refused("expected data in .* of 300 entries", tmp_path, tokenizer=str(tmp_path / "other"))
    refused("expected a tokenizer of 384 entries", tmp_path, tokenizer=str(tmp_path / "other"), init=str(crouter),
            config=[])  # fmt: skip
    refused("--config: expected none with --init", tmp_path, init=str(crouter))


def test_what_is_missing_or_damaged_is_refused(tmp_path, trained):
    refused("no such token file", tmp_path, data=str(tmp_path))
    refused("--tokenizer: expected a folder", tmp_path, tokenizer="")
    refused("no tokenizer.json", tmp_path, tokenizer=str(tmp_path))
    refused("expected exactly one of", tmp_path, steps=None)
    init = shutil.copytree(trained[0] / "crouter", tmp_path / "damaged")
    (init / "training.json").write_text("{")
    refused("training.json: expected the record", tmp_path, init=str(init), config=[])
    weights = init / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused("cannot be read as a crouter", tmp_path, init=str(init), config=[])


def test_damaged_calibration_data_is_found_before_the_training(tmp_path):
    data = shutil.copytree(prepared()[0], tmp_path / "data")
    (data / "calibration.safetensors").write_bytes(b"half")
    refused("calibration.safetensors is damaged", tmp_path, data=str(data))
    assert not (tmp_path / "out").exists()


def test_a_failing_save_leaves_the_earlier_crouter(tmp_path, monkeypatch):
    train_reconstruction(arguments(tmp_path, steps=1))
    before = (tmp_path / "crouter/model.safetensors").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(Calibration, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(InputError, match="the disk is full"):
            train_reconstruction(arguments(tmp_path, steps=3, resume=True))
    assert (tmp_path / "crouter/model.safetensors").read_bytes() == before
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_gradients_reach_every_parameter_and_nothing_but_scalars_comes_out():
    module = ReconstructionLoss(tiny_crouter().train())
    out = module(torch.randint(0, 97, (3, 16)), torch.arange(16) < torch.tensor([[16], [9], [1]]))
    assert {name: value.shape for name, value in out.items()} == {"loss": (), "tra": ()}
    out["loss"].backward()
    assert all(p.grad is not None for p in module.parameters())


def test_every_option_has_a_help_text():
    for cls in (LoopArguments, ReconstructArguments):
        assert all(field.metadata["help"] for field in cls.__dataclass_fields__.values())
