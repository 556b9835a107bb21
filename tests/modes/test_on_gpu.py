"""The same on a GPU: every mode, and a compressor of key-value pairs, against the CPU's steps."""

import pytest
import torch

from hf_crouter import Copy, Retrieve
from tests.histories import make, run
from tests.tiny import prompt, tiny_crouter, tiny_host

from .test_key_values import FAMILIES, make_host
from .test_key_values import make as make_pairs
from .test_key_values import run as run_pairs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_key_value_pairs(family, options):
    found = []
    for device in ("cpu", "cuda"):
        host = make_host(family).to(device)
        ids, mask = (part.to(device) for part in prompt(130, 70))
        options = {**options, "disable_compile": True} if "cache_implementation" in options else options
        found.append(run_pairs(host, make_pairs(host, Retrieve(chunks=1, every=16)), ids, mask, new=40, **options))
    assert torch.equal(found[0].sequences, found[1].sequences.cpu())
    torch.testing.assert_close(torch.stack(found[0].logits), torch.stack(found[1].logits).cpu(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_soft_prompts_copying_and_retrieval(family):
    found = []
    for device in ("cpu", "cuda"):
        host, crouter = tiny_host(family).to(device), tiny_crouter().to(device)
        ids, mask = (part.to(device) for part in prompt(90, 50))
        history = make(host, crouter, retrieve=1)
        assert any(isinstance(mode, Copy) for mode in history.modes)
        found.append(run(host, ids, mask, new=30, logits_processor=[history]))
        assert history.score(ids, last=20, attention_mask=mask).shape == (2, 20)
    torch.testing.assert_close(torch.stack(found[0].logits), torch.stack(found[1].logits).cpu(), atol=2e-3, rtol=0)
