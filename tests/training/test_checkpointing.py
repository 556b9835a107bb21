import json

import pytest
import torch
from safetensors import safe_open
from torch import nn

from hf_crouter.errors import InputError
from hf_crouter.training import checkpointing
from hf_crouter.training.checkpointing import latest_checkpoint, load_checkpoint, save_checkpoint
from hf_crouter.training.optim import build_optimizers


class Small(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.matrix, self.norm = nn.Linear(4, width), nn.LayerNorm(width)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


def trained(seed=0, steps=3, width=4):
    torch.manual_seed(seed)
    module = Small(width)
    optimizers = build_optimizers(module, 1e-2)
    for _ in range(steps):
        step(module, optimizers)
    return module, optimizers


def step(module, optimizers):
    module.norm(module.matrix(torch.ones(2, 4).cumsum(0))).square().sum().backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_what_is_loaded_goes_on_like_what_was_saved(tmp_path):
    module, optimizers = trained()
    path = save_checkpoint(tmp_path, module, optimizers, {"step": 3, "more": [1.5]})
    other, others = trained(seed=1, steps=1)
    other.frozen.load_state_dict(module.frozen.state_dict())
    assert not same(module, other)
    assert load_checkpoint(path, other, others) == {"step": 3, "more": [1.5]}
    for _ in range(3):
        assert same(module, other)
        step(module, optimizers)
        step(other, others)


def test_only_trainable_parameters_are_kept_and_nothing_is_pickled(tmp_path):
    path = save_checkpoint(tmp_path, *trained(), {"step": 3})
    assert sorted(p.name for p in path.iterdir()) == [
        "optimizers.safetensors", "progress.json", "weights.safetensors"
    ]  # fmt: skip
    with safe_open(path / "weights.safetensors", "pt") as file:
        assert sorted(file.keys()) == ["matrix.bias", "matrix.weight", "norm.bias", "norm.weight"]
    json.loads((path / "progress.json").read_text())


def test_the_newest_one_stays_alone(tmp_path):
    module, optimizers = trained()
    assert latest_checkpoint(tmp_path) is None and latest_checkpoint(tmp_path / "missing") is None
    save_checkpoint(tmp_path, module, optimizers, {"step": 3})
    (tmp_path / ".checkpoint-00000005.killed").mkdir()  # of a process that was killed while it wrote
    (tmp_path / "checkpoint-notes").mkdir()
    newest = save_checkpoint(tmp_path, module, optimizers, {"step": 12})
    assert latest_checkpoint(tmp_path) == newest and newest.name == "checkpoint-00000012"
    assert sorted(p.name for p in tmp_path.iterdir()) == [newest.name, "checkpoint-notes"]


@pytest.mark.parametrize("failing", ["weights", "optimizers"])
def test_a_failing_write_leaves_the_old_checkpoint(tmp_path, monkeypatch, failing):
    module, optimizers = trained()
    old = save_checkpoint(tmp_path, module, optimizers, {"step": 3})
    write = checkpointing.save_file

    def full(tensors, path, *rest):
        if failing in path.name:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        write(tensors, path, *rest)

    monkeypatch.setattr(checkpointing, "save_file", full)
    for number in (3, 4):
        with pytest.raises(InputError, match="the disk is full"):
            save_checkpoint(tmp_path, module, optimizers, {"step": number})
    assert [p.name for p in tmp_path.iterdir()] == [old.name]
    load_checkpoint(old, *trained(seed=1))


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizers.safetensors", "progress.json"])
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_damaged_checkpoint_is_one_line(tmp_path, name, damage):
    path = save_checkpoint(tmp_path, *trained(), {"step": 3})
    data = (path / name).read_bytes()
    (path / name).unlink()
    if damage == "truncated":
        (path / name).write_bytes(data[: len(data) // 2])
    module, optimizers = trained(seed=1)
    before = [p.clone() for p in module.parameters()]
    with pytest.raises(InputError, match="expected a complete checkpoint") as caught:
        load_checkpoint(path, module, optimizers)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    path = save_checkpoint(tmp_path, *trained(), {"step": 3})
    with pytest.raises(InputError, match="got other parameters"):
        load_checkpoint(path, *trained(width=5))
    module, optimizers = trained()
    with pytest.raises(InputError, match="expected a checkpoint of these optimisers"):
        load_checkpoint(path, module, optimizers[:1])
