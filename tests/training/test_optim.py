import pytest
import torch
from torch import nn

from hf_crouter.training.optim import build_optimizers, learning_rate_factor

from ..tiny import tiny_crouter


def names_of(optimizer, module):
    taken = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return {name for name, p in module.named_parameters() if id(p) in taken}


def test_muon_gets_the_matrices_of_linear_layers_and_adamw_the_rest():
    crouter = tiny_crouter()
    muon, adamw = build_optimizers(crouter, 1e-3)
    assert isinstance(muon, torch.optim.Muon) and isinstance(adamw, torch.optim.AdamW)
    matrices, rest = names_of(muon, crouter), names_of(adamw, crouter)
    assert not matrices & rest and matrices | rest == {name for name, _ in crouter.named_parameters()}
    assert {"embed_tokens.weight", "slots", "decoder_input", "latent_norm.weight"} <= rest
    assert matrices == {name for name, _ in crouter.named_parameters() if "proj" in name or "_latent." in name}
    counts = [len(group["params"]) for optimizer in (muon, adamw) for group in optimizer.param_groups]
    assert sum(counts) == len(list(crouter.parameters()))  # a tied matrix once


def test_decay_is_for_matrices_only():
    muon, adamw = build_optimizers(tiny_crouter(), 1e-3, weight_decay=0.1)
    assert muon.param_groups[0]["weight_decay"] == 0.1 and adamw.param_groups[0]["weight_decay"] == 0


def test_frozen_parameters_are_left_out_and_no_optimiser_is_empty():
    module = nn.Sequential(nn.Linear(3, 3, bias=False), nn.LayerNorm(3))
    module[1].requires_grad_(False)
    (only,) = build_optimizers(module, 1e-3)
    assert isinstance(only, torch.optim.Muon)
    module.requires_grad_(False)
    with pytest.raises(ValueError, match="expected trainable parameters"):
        build_optimizers(module, 1e-3)


def test_the_schedule_warms_up_holds_and_decays():
    assert [learning_rate_factor(step, 0.0, 4) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert [learning_rate_factor(99, p, 4) for p in (0.0, 0.49, 0.5, 0.75)] == [1, 1, 1, 0.5]
    assert learning_rate_factor(99, 0.999, 4) == learning_rate_factor(99, 1.0, 4) == 0.02
    assert learning_rate_factor(0, 0.0, 0) == 1
