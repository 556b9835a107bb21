import copy
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel

from hf_crouter import CRouterConfig, CRouterModel

from .reference import reference

SMALL = dict(vocab_size=61, chunk_length=12, num_latents=3, latent_size=10, embedding_size=8, hidden_size=16,
             intermediate_size=24, num_attention_heads=2, num_encoder_layers=1, num_decoder_layers=2,
             num_encoder_loops=2)  # fmt: skip


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = CRouterModel(CRouterConfig(**SMALL)).eval()
    for parameter in model.parameters():  # no zeros left: every path carries signal
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def chunks(count, length=12, seed=1):
    return torch.randint(61, (count, length), generator=torch.Generator().manual_seed(seed))


def test_matches_the_slow_reference_with_ragged_chunks(model):
    ids, lengths = chunks(4), [12, 1, 7, 11]
    mask = torch.arange(12) < torch.tensor(lengths)[:, None]
    with torch.no_grad():
        out = model.double()(ids, mask)
        rows = [reference(copy.deepcopy(model), ids[i, :n].tolist()) for i, n in enumerate(lengths)]
    for i, (latents, logits, reconstruction_nll, token_reconstruction_nll, accuracy) in enumerate(rows):
        torch.testing.assert_close(out.latents[i], latents)
        torch.testing.assert_close(out.logits[i, : lengths[i]], logits)
        assert out.reconstruction_nll[i].item() == pytest.approx(
            reconstruction_nll, abs=1e-5
        )  # cross-entropy is taken in float32
        assert out.token_reconstruction_nll[i, : lengths[i]].tolist() == pytest.approx(
            token_reconstruction_nll, abs=1e-5
        )
        assert out.token_reconstruction_nll[i, lengths[i] :].abs().sum() == 0
        assert out.reconstruction_accuracy[i].item() == pytest.approx(accuracy)
    everything = sum(sum(row[3]) for row in rows) / sum(lengths)
    assert out.loss.item() == pytest.approx(everything, abs=1e-5)


def test_what_stands_under_the_mask_cannot_matter(model):
    ids = chunks(2)
    mask = torch.arange(12) < torch.tensor([[9], [12]])
    other = torch.where(mask, ids, (ids + 17) % 61)
    first, second = model(ids, mask), model(other, mask)
    assert torch.equal(first.latents, second.latents)
    assert torch.equal(first.reconstruction_nll, second.reconstruction_nll)
    torch.testing.assert_close(model(ids[:1, :9]).latents, first.latents[:1])


def test_output_follows_the_latents_not_the_input(model):
    ids = chunks(2)
    latents = model.encode(ids)
    swapped = model.decode(latents.flip(0))
    torch.testing.assert_close(swapped, model.decode(latents).flip(0))
    assert not torch.allclose(swapped, model.decode(latents))


def test_logits_have_no_gradient_to_the_input_other_than_through_the_latents(model):
    embedded = {}
    model.embed_tokens.register_forward_hook(lambda _, __, out: embedded.update(x=out.requires_grad_()) or out)
    latents = model.encode(chunks(1))
    through = torch.autograd.grad(model.decode(latents).square().sum(), embedded["x"], retain_graph=True)[0]
    assert through.abs().sum() > 0
    cut = model.decode(latents.detach())
    assert torch.autograd.grad(cut.square().sum(), embedded["x"], allow_unused=True)[0] is None


def test_overfits_a_few_chunks_to_the_last_token():
    torch.manual_seed(0)
    model = CRouterModel(CRouterConfig(**{**SMALL, "hidden_size": 64, "latent_size": 64, "num_encoder_loops": 1}))
    ids = chunks(8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(250):
        optimizer.zero_grad()
        model(ids).loss.backward()
        optimizer.step()
    out = model(ids)
    assert out.reconstruction_accuracy.min() == 1.0
    assert torch.equal(model.reconstruct(out.latents).input_ids, ids)


def test_save_and_load_are_bit_exact_with_shards(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="2KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = AutoModel.from_pretrained(tmp_path)
    assert type(again) is CRouterModel
    ids = chunks(3)
    for name, value in model(ids).items():
        assert torch.equal(again(ids)[name], value), name
    stored = {k for f in tmp_path.glob("*.safetensors") for k in load_file(f)}
    assert "lm_head.weight" not in stored  # tied: kept once


def test_loads_without_the_package(model, tmp_path):
    model.save_pretrained(tmp_path / "crouter")
    script = (
        "import sys, json, torch\n"
        "class Block:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name.split('.')[0] == 'hf_crouter': raise ImportError(name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "from transformers import AutoModel\n"
        "m = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "o = m(torch.tensor(json.loads(sys.argv[2])))\n"
        "m.save_pretrained(sys.argv[1] + '-again')\n"
        "print(json.dumps([m.config.model_type, o.loss.item(), 'hf_crouter' in sys.modules]))\n"
    )
    ids = chunks(2)
    arguments = [sys.executable, "-c", script, str(tmp_path / "crouter"), json.dumps(ids.tolist())]
    done = subprocess.run(arguments, capture_output=True, text=True, env=_environment(tmp_path), check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    kind, loss, imported = json.loads(done.stdout.splitlines()[-1])
    assert (kind, imported) == ("crouter", False)
    assert loss == pytest.approx(model(ids).loss.item(), abs=1e-6)
    assert (tmp_path / "crouter-again" / "modeling_crouter.py").exists()


def _environment(folder):
    import os

    return {**os.environ, "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1"}


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
def test_attention_back_ends_agree(model, attention):
    with torch.no_grad():  # flex attention has no backward pass on the CPU
        expected = model(chunks(2)).logits
        model.set_attn_implementation(attention)
        torch.testing.assert_close(model(chunks(2)).logits, expected, atol=1e-5, rtol=1e-4)


def test_gradient_checkpointing_changes_nothing(model):
    ids = chunks(2, 9)
    model.train()
    model(ids).loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(ids).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], msg=name)


def test_compiles_to_one_graph(model):
    seen = []

    def backend(graph, _):
        seen.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    mask = torch.arange(12) < torch.tensor([[9], [12]])
    torch.testing.assert_close(compiled(chunks(2), mask).loss, model(chunks(2), mask).loss)
    assert len(seen) == 1


def test_return_dict_false_gives_a_tuple(model):
    out = model(chunks(1), return_dict=False)
    assert isinstance(out, tuple) and torch.equal(out[0], model(chunks(1)).loss)


def test_too_long_a_chunk_is_refused(model):
    with pytest.raises(ValueError, match="at most 12 tokens a chunk, got 13"):
        model.encode(chunks(1, 13))


@pytest.mark.parametrize("wrong", [{"hidden_size": 33}, {"num_latents": 0}, {"num_latents": 700}, {"vocab_size": "x"}])
def test_impossible_configurations_are_refused(wrong):
    with pytest.raises(Exception, match=next(iter(wrong))):
        CRouterConfig(**wrong)


def test_config_round_trip(tmp_path):
    config = CRouterConfig(**SMALL)
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is CRouterConfig
    assert {k: getattr(again, k) for k in SMALL} == SMALL
