import pytest
import torch

from hf_crouter.crouter.fingerprint import crouter_fingerprint
from hf_crouter.errors import InputError
from hf_crouter.hosts.fingerprint import host_fingerprint
from tests.tiny import FAMILIES, tiny_crouter, tiny_host


@pytest.mark.parametrize("family", FAMILIES)
class TestHost:
    def test_the_dtype_does_not_count(self, family):
        host = tiny_host(family).to(torch.bfloat16)
        expected = host_fingerprint(host)
        assert len(expected) == 32 and int(expected, 16)
        assert host_fingerprint(host.float()) == expected

    def test_other_weights_count(self, family):
        assert host_fingerprint(tiny_host(family)) != host_fingerprint(tiny_host(family, seed=1))

    def test_first_and_last_attention_and_final_norm_count(self, family):
        host = tiny_host(family)
        prints = [host_fingerprint(host)]
        names = ("q_proj", "query_key_value", "c_attn")
        attention = [p for n, p in host.named_parameters() if any(k in n for k in names) and n.endswith("weight")]
        norms = [p for n, p in host.base_model.named_parameters() if n.endswith(("norm.weight", "ln_f.weight"))]
        for weight in (attention[0], attention[-1], norms[-1]):
            with torch.no_grad():
                weight += 1
            prints.append(host_fingerprint(host))
        assert len(set(prints)) == len(prints)


class TestWrapped:
    def test_wrappers_and_adapters_do_not_count(self):
        peft = pytest.importorskip("peft")
        expected = host_fingerprint(tiny_host())
        assert host_fingerprint(torch.compile(tiny_host())) == expected
        config = peft.LoraConfig(target_modules=["q_proj", "v_proj", "embed_tokens"], init_lora_weights=False)
        assert host_fingerprint(peft.get_peft_model(tiny_host(), config)) == expected
        native = tiny_host()
        native.add_adapter(peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
        assert host_fingerprint(native) == expected

    def test_merged_adapters_count(self):
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
        merged = peft.get_peft_model(tiny_host(), config).merge_and_unload()
        assert host_fingerprint(merged) != host_fingerprint(tiny_host())

    def test_no_host(self):
        with pytest.raises(InputError, match="decoder"):
            host_fingerprint(torch.nn.Linear(2, 2))


class TestCrouter:
    def test_encoder_counts_and_decoder_does_not(self):
        crouter = tiny_crouter()
        expected = crouter_fingerprint(crouter)
        assert crouter_fingerprint(tiny_crouter(seed=1)) != expected
        with torch.no_grad():
            crouter.decoder_input += 1
            crouter.from_latent.weight += 1
        assert crouter_fingerprint(crouter) == expected
        with torch.no_grad():
            crouter.slots += 1
        assert crouter_fingerprint(crouter) != expected

    def test_configuration_counts(self):
        assert crouter_fingerprint(tiny_crouter(rope_theta=5000.0)) != crouter_fingerprint(tiny_crouter())

    def test_the_dtype_does_not_count(self):
        crouter = tiny_crouter().to(torch.bfloat16)
        expected = crouter_fingerprint(crouter)
        assert crouter_fingerprint(crouter.float()) == expected
