import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_crouter.errors import InputError, MismatchError
from hf_crouter.hosts.fingerprint import host_fingerprint
from hf_crouter.hosts.loading import load_host, load_host_tokenizer

from ..histories import make, run
from ..test_chunking import byte_tokenizer
from ..tiny import prompt, tiny_crouter, tiny_host

peft = pytest.importorskip("peft")
torch.set_num_threads(1)


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    tiny_host(vocab_size=320).save_pretrained(folder)
    byte_tokenizer(300).save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(tmp_path, base):
    torch.manual_seed(3)
    host, _ = load_host(base)
    lora = peft.get_peft_model(host, peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    lora.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def save_adapter(base, folder, config):
    host = peft.get_peft_model(load_host(base)[0], config)
    generator = torch.Generator().manual_seed(5)
    for weight in host.parameters():
        if weight.requires_grad:
            weight.data = weight.data + 0.1 * torch.randn(weight.shape, generator=generator)
    host.save_pretrained(folder)
    return folder


def lora(**options):
    return peft.LoraConfig(**{"target_modules": ["q_proj", "v_proj"], **options})


KINDS = {
    "dora": lora(use_dora=True),
    "rslora": lora(use_rslora=True, r=4),
    "embedding": lora(target_modules=["embed_tokens", "o_proj"]),
    "whole modules": lora(modules_to_save=["embed_tokens", "norm", "lm_head"]),
    "token rows": lora(trainable_token_indices=[3, 4, 5]),
    "ia3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "loha": peft.LoHaConfig(target_modules=["q_proj"]),
    "adalora": peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10),
}


def logits(host):
    with torch.no_grad():
        return host(prompt(20)[0]).logits


def test_a_tokenizer_larger_than_the_host_is_told(base):
    byte_tokenizer(330).save_pretrained(base)
    with pytest.raises(MismatchError, match="base: the tokenizer has 330 entries, the host embeds 320"):
        load_host(base)


class TestAdapterFolders:
    def test_is_the_host_with_the_adapter_active(self, base, adapter):
        host, tokenizer = load_host(adapter)
        expected = peft.PeftModel.from_pretrained(load_host(base)[0], adapter).eval()
        assert torch.equal(logits(host), logits(expected)) and not torch.equal(
            logits(host), logits(load_host(base)[0])
        )
        assert len(tokenizer) == 300 and not host.training
        assert host_fingerprint(host) == host_fingerprint(load_host(base)[0])

    def test_it_is_a_host_of_histories(self, adapter):
        host, _ = load_host(adapter)
        history = make(host, tiny_crouter(vocab_size=320))
        out = run(host, prompt(70)[0], new=3, logits_processor=[history])
        assert out.sequences.shape == (1, 73) and history.report().chunks

    def test_its_own_tokenizer_comes_first(self, adapter):
        byte_tokenizer(290).save_pretrained(adapter)
        assert len(load_host(adapter)[1]) == 290
        config, tokenizer = load_host_tokenizer(adapter)
        assert len(tokenizer) == 290 and config.model_type == "llama"

    def test_its_own_tokenizer_must_fit(self, adapter):
        byte_tokenizer(330).save_pretrained(adapter)
        with pytest.raises(MismatchError, match="adapter: the tokenizer has 330 entries, the host embeds 320"):
            load_host(adapter)
        (adapter / "tokenizer.json").write_text("{")
        for load in (load_host, load_host_tokenizer):
            with pytest.raises(InputError, match="adapter: cannot be read as a tokenizer"):
                load(adapter)

    @pytest.mark.parametrize("kind", KINDS)
    def test_kinds(self, kind, base, tmp_path):
        folder = save_adapter(base, tmp_path / "kind", KINDS[kind])
        host, plain = load_host(folder)[0], load_host(base)[0]
        expected = peft.PeftModel.from_pretrained(load_host(base)[0], folder).eval()
        assert torch.equal(logits(host), logits(expected)) and not torch.equal(logits(host), logits(plain))
        assert not any(weight.requires_grad for weight in host.parameters()) and not host.training

    @pytest.mark.parametrize("lost", ["lora_A", "lora_magnitude_vector", "lm_head"])
    def test_a_weight_that_is_missing_is_told(self, base, tmp_path, lost):
        folder = save_adapter(base, tmp_path / "kind", lora(use_dora=True, modules_to_save=["lm_head"]))
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        tensors.pop(next(name for name in tensors if lost in name))
        save_file(tensors, path)
        with pytest.raises(InputError, match=f"does not fit .*base, 1 weights are .*{lost}|no weights .*{lost}"):
            load_host(folder)

    def test_weights_that_do_not_fit_are_told(self, adapter):
        path = adapter / "adapter_model.safetensors"
        tensors = load_file(path)
        save_file({**tensors, "base_model.model.model.layers.9.x": torch.ones(1)}, path)
        with pytest.raises(InputError, match="1 weights are missing or unknown, model.layers.9.x among them"):
            load_host(adapter)
        save_file({name: tensor[:, :3].contiguous() for name, tensor in tensors.items()}, path)
        with pytest.raises(InputError, match="cannot be read as an adapter of .*size mismatch for"):
            load_host(adapter)

    @pytest.mark.parametrize("load", [load_host, load_host_tokenizer])
    def test_an_adapter_is_no_host_of_another(self, adapter, load):
        config = json.loads((adapter / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = str(adapter)
        (adapter / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(InputError, match="expected a host in base_model_name_or_path, got an adapter"):
            load(adapter)

    @pytest.mark.parametrize(
        "change, words",
        [
            ({"base_model_name_or_path": None}, "expected the name of a host"),
            (
                {"base_model_name_or_path": "/no/such/host"},
                "adapter: expected the adapter's host, got /no/such/host: no such host folder",
            ),
            ({"peft_type": "NOTHING"}, "cannot be read as an adapter"),
        ],
    )
    def test_what_does_not_fit_is_one_line(self, adapter, change, words):
        config = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(InputError, match=words):
            load_host(adapter)

    def test_pickles_are_never_loaded(self, adapter):
        weights = adapter / "adapter_model.safetensors"
        weights.rename(adapter / "adapter_model.bin")
        with pytest.raises(InputError, match="expected an adapter's weights in adapter_model.safetensors"):
            load_host(adapter)
        weights.with_suffix(".bin").rename(weights)
        weights.with_suffix(".bin").write_bytes(b"not read")
        load_host(adapter)

    def test_without_peft(self, adapter, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(InputError, match="expected peft for an adapter"):
            load_host(adapter)
