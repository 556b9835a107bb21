import argparse

import torch

from eval.cost import copy_step
from hf_crouter.modes.copy import Copier
from hf_crouter.ngram.gate import general_gate
from hf_crouter.ngram.row_archive import Archives

from ...tiny import tiny_host


def test_steps_are_timed():
    text = torch.randint(5, 300, (1, 3000))
    args = argparse.Namespace(window=32, soft_slots=16, steps=10, leak_steps=20)

    def copier_of(width):
        return Copier(Archives(384), general_gate(), 1.0, width, width)

    host = tiny_host(positions=1024, vocab_size=384)
    metrics = copy_step.measure({"float32": host}, copier_of, text, [1024, 2048], args)
    assert metrics["copy.step_share.10k"] > 0 and "copy.leak_mib.10k" in metrics
