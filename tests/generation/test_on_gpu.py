"""Calls that only an accelerator can show: offloaded caches and hosts, memory that runs out."""

import gc

import pytest
import torch
from accelerate import dispatch_model

from hf_crouter.hosts.fingerprint import host_fingerprint

from ..histories import make, run
from ..hosts.tiny_families import tiny_family
from ..tiny import prompt, tiny_crouter, tiny_host, tiny_projector

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
FAMILIES = ("llama", "gemma3_text", "mistral", "gpt_neox", "lfm2", "deepseek_v3")


def on_gpu(*lengths):
    return [tensor.cuda() for tensor in prompt(*lengths)]


@pytest.mark.parametrize("kind", ["offloaded", "offloaded_static", "static", "dynamic"])
@pytest.mark.parametrize("family", FAMILIES)
def test_caches(family, kind):
    host = tiny_family(family).cuda()
    crouter = tiny_crouter().cuda()
    history = make(host, crouter)
    expected = run(host, *on_gpu(70, 40), new=30, logits_processor=[history])
    try:  # transformers compiles static caches; what it cannot compile by itself is not ours to judge
        run(host, *on_gpu(70, 40), new=3, cache_implementation=kind, disable_compile=True)
    except Exception as error:
        pytest.skip(f"the plain host fails: {error}")
    out = run(
        host, *on_gpu(70, 40), new=30, logits_processor=[history], cache_implementation=kind, disable_compile=True
    )
    assert out.past_key_values.offloading == kind.startswith("offloaded") and history.report().chunks
    torch.testing.assert_close(torch.stack(out.logits), torch.stack(expected.logits), atol=1e-3, rtol=0)


def test_rows_that_end_early():
    host, crouter = tiny_host(positions=512).cuda(), tiny_crouter().cuda()
    history = make(host, crouter)
    out = run(host, *on_gpu(70, 50, 60), new=60, logits_processor=[history])
    ends = [int(out.sequences[0, 75]), int(out.sequences[1, 90])]
    out = run(host, *on_gpu(70, 50, 60), new=60, logits_processor=[history], eos_token_id=ends, pad_token_id=0)
    for i, length in enumerate((70, 50, 60)):
        row = out.sequences[i, 70 - length :]
        alone = run(host, row[None, :length], new=60, logits_processor=[history], eos_token_id=ends, pad_token_id=0)
        assert torch.equal(row[: alone.sequences.shape[1]], alone.sequences[0])


@pytest.mark.parametrize("places", [{"": 0}, {"model.embed_tokens": 0, "model.layers": "cpu", "model.norm": "cpu",
                                              "model.rotary_emb": "cpu", "lm_head": 0}])  # fmt: skip
def test_dispatched_hosts(places):
    plain = tiny_host()
    projector = tiny_projector(plain, tiny_crouter())
    expected = run(
        plain, *prompt(70, 40), new=12, logits_processor=[make(plain, tiny_crouter(), soft_prompts=projector)]
    )
    host = dispatch_model(tiny_host(), places, main_device=0, force_hooks=True)
    assert host_fingerprint(host) == host_fingerprint(plain)
    history = make(host, tiny_crouter().cuda(), soft_prompts=tiny_projector(tiny_host(), tiny_crouter()))
    out = run(host, *on_gpu(70, 40), new=12, logits_processor=[history])
    assert torch.equal(out.sequences.cpu(), expected.sequences) and history.report().chunks


def test_memory_that_runs_out_comes_back():
    host, crouter = tiny_host(positions=1 << 20).cuda(), tiny_crouter().cuda()
    history = make(host, crouter, window=4096)
    run(host, *on_gpu(200), new=3, logits_processor=[history])
    gc.collect()
    torch.cuda.empty_cache()
    before, total = torch.cuda.memory_allocated(), torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((before + (48 << 20)) / total)
    cls = type(host)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            run(host, *on_gpu(200_000), new=3, logits_processor=[history])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    gc.collect()
    torch.cuda.empty_cache()
    # a library's workspace may be new; what the call held is fifty times that
    assert torch.cuda.memory_allocated() <= before + (2 << 20) and type(host) is cls
    run(host, *on_gpu(9000), new=3, logits_processor=[history])
    assert history.report().chunks
