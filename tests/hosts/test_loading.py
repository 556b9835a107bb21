import json

import pytest
import torch

from hf_crouter.errors import InputError
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


def logits(host):
    with torch.no_grad():
        return host(prompt(20)[0]).logits


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

    @pytest.mark.parametrize(
        "change, words",
        [
            ({"base_model_name_or_path": None}, "expected the name of a host"),
            ({"base_model_name_or_path": "/no/such/host"}, "/no/such/host: no such host folder"),
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

    def test_without_peft(self, adapter, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(InputError, match="expected peft for an adapter"):
            load_host(adapter)
