"""Cached keys moved to other positions, against what the host itself caches there."""

import gc

import pytest
import torch
from accelerate import cpu_offload
from transformers import AutoModelForCausalLM, DynamicCache

from hf_crouter.errors import InputError
from hf_crouter.hosts import rotation
from hf_crouter.hosts.rotation import KeyRotation

from ..tiny import VOCAB, prompt, tiny_host
from .tiny_families import IMAGE, TEXT, names, tiny_family

torch.set_num_threads(1)

ROTATED = names("""
    apertus arcee bitnet codegen cohere cohere2 cwm dbrx diffllama ernie4_5 exaone4 falcon gemma gemma2 gemma3_text
    gemma3n_text gemma4_text glm glm4 glm4_moe gpt_neox gpt_oss gptj granite helium hrm_text hunyuan_v1_dense laguna
    lfm2 llama llama4_text mimo_v2_flash minimax_m2 mistral mixtral modernbert-decoder nanochat nemotron olmo olmo2
    persimmon phi phi3 qwen2 qwen2_moe qwen2_vl qwen3 qwen3_next seed_oss smollm3 stablelm starcoder2 zaya
""")
COARSE = ["codegen", "cohere", "gemma3_text", "glm4", "gpt_oss", "gptj", "llama", "llama4_text", "phi", "qwen3_next"]
STILL = ["bloom", "falcon_alibi", "mpt", "nemotron_h", "granitemoehybrid"]  # positions enter elsewhere, or nowhere
LATENTS, MORE, ONE_KEY, ANYWHERE = "caches latents", "caches more that depends", "one key a token", "a token anywhere"
REFUSED = {
    **dict.fromkeys(("axk1", "axk2", "bailing_hybrid", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots3_note_text",
                     "glm4_moe_lite", "glm_moe_dsa", "hy_v4", "kimi_k25", "kimi_linear", "longcat_flash", "minicpm3",
                     "youtu"), LATENTS),
    **dict.fromkeys(("biogpt", "ctrl", "gpt-sw3", "gpt2", "gpt_bigcode", "gpt_neo", "opt", "xglm"), MORE),
    **dict.fromkeys(("deepseek_v4", "recurrent_gemma"), MORE),  # values too; what position 0 resets
    **dict.fromkeys(("qwen4_exp", "qwen4_exp_text"), MORE),  # an index of positions
    **dict.fromkeys(("cpmant", "falcon_mamba", "mamba", "mamba2", "openai-gpt", "reformer", "rwkv", "xlstm"), ONE_KEY),
    **dict.fromkeys(("blt", "minimax", "minimax_m3_vl_text"), ANYWHERE),
}  # fmt: skip
HOSTS = {**TEXT, **IMAGE}
OTHERS = sorted(set(HOSTS) - {*ROTATED, *STILL, *REFUSED})
HERE = sorted(ROTATED & set(HOSTS))  # families that this transformers knows


@torch.no_grad()
def cached(host, ids, positions):
    """Keys of each layer of the cache, of rows of ids at their positions; None where there are none."""
    cache = DynamicCache(config=host.config.get_text_config(decoder=True))
    host.base_model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True)
    return [getattr(layer, "keys", None) for layer in cache.layers]


def apart(found, expected):
    return float((found - expected.float()).norm() / expected.float().norm())


def check_single_tokens(host, most, places=((0, 7), (1, 200), (250, -249), (100, -37), (13, 0), (200, -200))):
    """A random token's keys, moved, are the keys of the same token there; returns how far the farthest went."""
    rotation_, farthest = KeyRotation.of(host), 0.0
    ids = torch.randint(3, VOCAB, (len(places), 1), generator=torch.Generator().manual_seed(5))
    at, by = torch.tensor(places).T
    before, after = cached(host, ids, at[:, None]), cached(host, ids, (at + by)[:, None])
    assert len(rotation_.turns) == len(before) and any(keys is not None for keys in before)
    for layer, (old, new) in enumerate(zip(before, after, strict=True)):
        for row in range(len(places) if old is not None else 0):
            moved = rotation_.moved(old[row], by[row, None], layer)
            assert moved.dtype == torch.float32 and moved.shape == old[row].shape
            assert apart(moved, new[row]) <= most, (layer, places[row])
            farthest = max(farthest, apart(old[row].float(), new[row]))
    return farthest


@pytest.fixture(scope="module")
def host(request):
    return HOSTS[request.param]()


@pytest.mark.parametrize("host", HERE, indirect=True)
class TestRotatedFamilies:
    def test_a_token_alone(self, host):
        assert check_single_tokens(host, 1e-4) > 0.5  # unmoved keys are far off
        assert KeyRotation.of(host).limit is None

    def test_a_text(self, host):
        moves, ids, positions = KeyRotation.of(host), prompt(30)[0], torch.arange(30)[None]
        before, after = cached(host, ids, positions + 180), cached(host, ids, positions + 3)
        layers = [layer for layer, keys in enumerate(before) if keys is not None]
        for layer in (layers[0], layers[-1]):
            by = torch.full((before[layer].shape[-2],), -177)
            assert apart(moves.moved(before[layer], by, layer), after[layer]) <= 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", COARSE)
def test_coarse_dtypes(name, dtype):
    assert check_single_tokens(HOSTS[name]().to(dtype), 0.02) > 0.5


@pytest.mark.families
@pytest.mark.parametrize("name", OTHERS)
def test_other_families(name):
    check_single_tokens(HOSTS[name](), 1e-4)


@pytest.mark.parametrize("name", STILL)
def test_keys_that_know_no_positions_stay(name):
    host = HOSTS[name]()
    assert check_single_tokens(host, 1e-6) <= 1e-6
    assert set(KeyRotation.of(host).turns) == {None}


@pytest.mark.parametrize("name", [name for name in REFUSED if name in HOSTS])
def test_refused_in_one_line(name):
    with pytest.raises(InputError, match=REFUSED[name]) as refusal:
        KeyRotation.of(HOSTS[name]())
    message = str(refusal.value)
    assert message.startswith("host: expected ") and ", got " in message and "\n" not in message


def test_each_token_by_its_own():
    host = tiny_host()
    ids, old = prompt(40)[0], torch.arange(40) * 5 + torch.arange(40) % 3
    new = torch.arange(40) + 2
    before, after = cached(host, ids, old[None]), cached(host, ids, new[None])
    moved = KeyRotation.of(host).moved(before[0], new - old, 0)  # deeper layers would attend by other distances
    assert apart(moved, after[0]) <= 1e-5 < 0.5 < apart(before[0], after[0])


def test_frequencies_are_the_buffers_own():
    for name, sign in (("llama", 1), ("nanochat", -1)):
        host = tiny_family(name)
        frequencies = KeyRotation.of(host).turns[0].frequencies
        assert torch.equal(frequencies, sign * host.model.rotary_emb.inv_freq.double())


def test_layers_without_rotation_and_of_two_kinds():
    some = KeyRotation.of(tiny_family("smollm3", num_hidden_layers=4))
    assert [turn is None for turn in some.turns] == [False, False, False, True]
    sliding, full = KeyRotation.of(tiny_family("gemma3_text")).turns
    assert sliding.frequencies[-1] > 10 * full.frequencies[-1]
    keys = torch.randn(1, 2, 3, 8)
    assert some.moved(keys, torch.tensor([5, 6, 7]), 3) is keys


@pytest.mark.parametrize("name, first, rotated", [
    ("phi", slice(0, 2), 4), ("glm", slice(0, 4, 2), 4), ("llama", slice(0, 4), 8), ("cohere", slice(0, 8, 2), 8),
    ("gptj", slice(0, 8, 2), 8),
])  # fmt: skip
def test_pairs_and_how_many(name, first, rotated):
    for turn in KeyRotation.of(tiny_family(name)).turns:
        assert turn.first == first and 2 * len(turn.frequencies) == rotated


SCALED = {
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
}


@pytest.mark.parametrize("kind", SCALED)
def test_scaled_frequencies(kind):
    rope = {"rope_type": kind, "rope_theta": 10000.0, **SCALED[kind]}
    host = tiny_family("llama", rope_parameters=rope)
    assert check_single_tokens(host, 1e-4) > 0.5 and KeyRotation.of(host).limit is None


def changing(kind):
    if kind == "dynamic":
        rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
        return tiny_family("llama", max_position_embeddings=64, rope_parameters=rope)
    factors = {"short_factor": [1.0, 1.2, 1.4, 1.7], "long_factor": [2.0, 3.5, 6.0, 8.0]}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 64, **factors}
    return tiny_family("phi3", original_max_position_embeddings=64, rope_parameters=rope)


@pytest.mark.parametrize("read", [0, 200])
@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_that_longer_texts_change(kind, read):
    host = changing(kind)
    if read:  # then the host stands at the other frequencies
        cached(host, prompt(read)[0], torch.arange(read)[None])
    assert check_single_tokens(host, 1e-4, places=((0, 7), (62, -62), (50, -13))) > 0.5
    moves = KeyRotation.of(host)
    assert moves.limit == 64
    moves.check(64)
    with pytest.raises(InputError, match="at most 64 positions.*got 65"):
        moves.check(65)
    with pytest.raises(InputError, match="at most 64 positions.*got 65"):
        moves.moved(torch.ones(2, 1, 8), torch.tensor([-64]), 0)
    moves.moved(torch.ones(2, 0, 8), torch.tensor([], dtype=torch.long), 0)


def test_far_moves_are_not_rounded():
    moves = KeyRotation.of(tiny_host())
    turn, keys = moves.turns[0], torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    by = torch.tensor([-1_000_003, 77_777, -131_071])
    angles = by.double()[:, None] * turn.frequencies
    half = torch.complex(keys[..., :4].double(), keys[..., 4:].double()) * torch.polar(torch.ones_like(angles), angles)
    expected = torch.cat([half.real, half.imag], -1).float()
    torch.testing.assert_close(moves.moved(keys, by, 0), expected, atol=1e-6, rtol=0)
    before = keys.clone()
    moves.moved(keys, by, 0)
    assert torch.equal(keys, before)


def test_heads_by_their_own_distances():
    moves, generator = KeyRotation.of(tiny_host()), torch.Generator().manual_seed(0)
    keys, by = torch.randn(4, 2, 3, 8, generator=generator), torch.tensor([[5, -9, 0], [100, 2, -30]])
    moved = moves.moved(keys, by, 0)
    assert moved.shape == keys.shape
    for head in (0, 1):
        assert torch.equal(moved[:, head], moves.moved(keys[:, head : head + 1], by[head], 0)[:, 0])
    assert torch.equal(moves.moved(keys, torch.tensor(7), 0), moves.moved(keys, torch.full((3,), 7), 0))
    assert torch.equal(moves.moved(keys, by[None].expand(4, -1, -1), 0), moved)


def test_float64_stays_as_fine():
    moves, keys = KeyRotation.of(tiny_host()), torch.randn(2, 3, 8, dtype=torch.float64)
    there = moves.moved(keys, torch.tensor([100, -7, 3]), 0)
    assert there.dtype == torch.float64
    torch.testing.assert_close(moves.moved(there, torch.tensor([-100, 7, -3]), 0), keys, atol=1e-12, rtol=0)


def test_near_the_last_of_many_positions():
    host = tiny_host(positions=131072)
    # a host rounds the angles themselves to float32, up to 0.008 here
    assert check_single_tokens(host, 0.01, places=((131000, -130000), (131071, -131071), (70000, -1))) > 0.5


@pytest.mark.parametrize("name", ["llama", "phi", "glm"])
def test_frequencies_that_no_buffer_holds_are_measured(name):
    host = tiny_family(name)
    rotary = host.model.rotary_emb
    frequencies = rotary.inv_freq * 0.7
    del rotary.inv_freq, rotary.original_inv_freq
    rotary.inv_freq = frequencies  # a plain attribute
    assert check_single_tokens(host, 1e-4) > 0.5
    measured = KeyRotation.of(host).turns[1].frequencies[: len(frequencies)]
    torch.testing.assert_close(measured, frequencies.double(), atol=1e-6, rtol=1e-5)


def test_keys_that_are_scaled_by_position_are_refused():
    host = tiny_host()

    def scaled(module, args, kwargs, output):
        factor = 1 + kwargs["position_ids"][..., None] / 1000
        return tuple(part * factor for part in output)

    host.model.rotary_emb.register_forward_hook(scaled, with_kwargs=True)
    with pytest.raises(InputError, match="keys of layer 0 depend on positions in another way"):
        KeyRotation.of(host)


def test_weights_of_a_norm_after_rotation_are_refused():
    host = tiny_family("hunyuan_v1_dense")
    host.model.layers[1].self_attn.key_layernorm.weight.data[:3] *= 1.5
    with pytest.raises(InputError, match="HunYuanDenseV1ForCausalLM, whose keys of layer 1 depend"):
        KeyRotation.of(host)


@pytest.mark.parametrize("buffers", [False, True])
def test_an_offloaded_host(buffers):
    host = cpu_offload(tiny_host(), torch.device("cpu"), offload_buffers=buffers)
    assert host.model.embed_tokens.weight.device.type == "meta"
    assert check_single_tokens(host, 1e-4) > 0.5


def test_found_out_once_for_each_dtype_and_forgotten_with_the_host():
    host, calls = tiny_host(), []
    handle = host.model.register_forward_hook(lambda *args: calls.append(1))
    first = KeyRotation.of(host)
    assert KeyRotation.of(host) is first and len(calls) == 1
    second = KeyRotation.of(host.to(torch.bfloat16))
    assert len(calls) == 2 and not torch.equal(first.turns[0].frequencies, second.turns[0].frequencies)
    handle.remove()
    gc.collect()
    kept = len(rotation._FOUND)
    del host, handle
    gc.collect()
    assert len(rotation._FOUND) == kept - 1


def test_a_refusal_costs_one_forward():
    host, calls = tiny_host("gpt2"), []
    host.base_model.register_forward_hook(lambda *args: calls.append(1))
    for _ in range(3):
        with pytest.raises(InputError, match="caches more that depends"):
            KeyRotation.of(host)
    assert len(calls) == 1


@pytest.mark.host
@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_the_real_host(real_host, dtype, most):
    host = AutoModelForCausalLM.from_pretrained(real_host, dtype=dtype).eval()
    moves, ids = KeyRotation.of(host), prompt(200)[0] * 37
    before = cached(host, ids, torch.arange(200)[None] + 7900)
    after = cached(host, ids, torch.arange(200)[None])
    for layer, (old, new) in enumerate(zip(before, after, strict=True)):
        assert apart(moves.moved(old, torch.full((200,), -7900), layer), new) <= most


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_on_a_gpu(dtype, most):
    host = tiny_host().to("cuda", dtype)
    moves, ids = KeyRotation.of(host), prompt(40)[0].cuda()
    positions = torch.arange(40, device="cuda")[None]
    before, after = cached(host, ids, positions + 200), cached(host, ids, positions)
    for layer, (old, new) in enumerate(zip(before, after, strict=True)):
        moved = moves.moved(old, torch.full((40,), -200, device="cuda"), layer)
        assert moved.device == old.device and apart(moved, new) <= most
