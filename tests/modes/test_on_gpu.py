"""The same on a GPU: every mode, and a compressor of key-value pairs, against the CPU's steps."""

import gc

import pytest
import torch
from accelerate import dispatch_model
from transformers import Qwen2Config, Qwen2ForCausalLM

from hf_crouter import Compact, CompressedHistory, Copy, Retrieve
from tests.histories import make, run
from tests.tiny import prompt, tiny_crouter, tiny_host

from . import copying
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


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 4}], ids=str)
@pytest.mark.parametrize("ways", [{}, {"retrieve": 2, "retrieve_every": 5}, {"copy_source": "rebuilt"}], ids=str)
def test_archives_are_searched_there_as_on_a_cpu(options, ways):
    found = []
    for device in ("cpu", "cuda"):
        host, crouter = tiny_host().to(device), tiny_crouter().to(device)
        lengths = (120,) if "prompt_lookup_num_tokens" in options else (120, 77)
        ids, mask = (part.to(device) for part in copying.repetitive(*lengths))
        history = copying.make(host, crouter, **ways)
        out = copying.run(host, ids, mask, logits_processor=[history], **options)
        found.append((out, history.report(measure=False).copies))
    (one, copies), (two, there) = found
    assert torch.equal(one.sequences, two.sequences.cpu()) and copies == there
    for a, b in zip(one.scores, two.scores, strict=True):
        torch.testing.assert_close(a.log_softmax(-1), b.cpu().log_softmax(-1), atol=2e-3, rtol=0)


@pytest.mark.parametrize("positions", [512, 192], ids=["true", "compact"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
def test_compact_beyond_the_positions_and_compiled(options, positions):
    """A static cache compiles its steps on a GPU."""
    found = []
    for device in ("cpu", "cuda"):
        host = make_host("qwen2", positions).to(device)
        modes = [Compact(6, budgets="equal", block=64), Retrieve(chunks=1, every=8)]
        history = CompressedHistory(host, tiny_crouter(chunk_length=32), window=20, keep_first=3, modes=modes)
        ids, mask = (part.to(device) for part in prompt(180, 120))
        here = options if device == "cuda" else {**options, **({"disable_compile": True} if options else {})}
        found.append(run_pairs(host, history, ids, mask, new=40, **here))
    assert torch.equal(found[0].sequences, found[1].sequences.cpu())
    torch.testing.assert_close(torch.stack(found[0].logits), torch.stack(found[1].logits).cpu(), atol=1e-4, rtol=0)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("positions", [512, 192], ids=["true", "compact"])
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_on_two_devices(family, positions):
    ids, mask = prompt(180, 120)
    plain = make_host(family, positions)
    expected = run_pairs(plain, make_pairs(plain, Retrieve(chunks=1, every=8)), ids, mask, new=40)
    host = make_host(family, positions)
    layers = [name for name, _ in host.named_modules() if name.split(".")[-1].isdigit() and name.count(".") == 2]
    places = {name: int(name in layers[1:]) for name in leaves(host, set(layers))}
    host = dispatch_model(host, places, main_device=0, force_hooks=True)
    assert {p.device.index for p in host.parameters()} == {0, 1}
    found = run_pairs(host, make_pairs(host, Retrieve(chunks=1, every=8)), ids.cuda(0), mask.cuda(0), new=40)
    assert torch.equal(found.sequences.cpu(), expected.sequences)


def leaves(host, layers):
    """Names of whole layers, and of the modules outside them that hold none."""
    inside = tuple(f"{layer}." for layer in layers)
    for name, module in host.named_modules():
        if name in layers or (name and not any(module.children()) and not name.startswith(inside)):
            yield name


def test_the_peak_of_the_allocator():
    """Pairs, two blocks and the raw part, beside what a forward of a block needs for itself."""
    config = Qwen2Config(
        vocab_size=97, hidden_size=256, intermediate_size=256, num_hidden_layers=24, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=1 << 17, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    host = Qwen2ForCausalLM(config).eval().cuda().to(torch.bfloat16)
    length, slots, block, window, prefix = 60_000, 8, 2048, 512, 4
    ids = torch.randint(5, 97, (1, length), device="cuda")
    history = CompressedHistory(
        host, modes=[Compact(slots, budgets="equal", block=block)], window=window, keep_first=prefix
    )

    def peak(work):
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.no_grad():
            work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    run_pairs(host, history, ids[:, :9000], new=2)  # libraries' workspaces
    forward = peak(lambda: host.model(ids[:, :block], use_cache=False))
    chosen = 2 * 4 * (1 << 25) * 4  # products of one tile and what is made of them, float32
    slot = 2 * 2 * config.hidden_size * config.num_hidden_layers
    entries = slots * (length // 512)
    found = peak(lambda: run_pairs(host, history, ids, new=2))
    bound = slot * (entries + 2 * block + window + 512 + prefix) + forward
    assert found <= bound + chosen and bound < slot * length / 4, (found, bound, forward, slot * length)
