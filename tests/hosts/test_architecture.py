import pytest
import torch
from accelerate import cpu_offload
from transformers import FalconConfig, FalconForCausalLM, MixtralConfig

from hf_crouter.errors import InputError
from hf_crouter.hosts.fingerprint import architecture_fields, host_architecture

from ..tiny import VOCAB, tiny_host
from ..twins import SHAPE, host_of, noised

torch.set_num_threads(1)


class TestArchitecture:
    def test_weights_their_dtype_and_wrappers_do_not_count(self):
        peft = pytest.importorskip("peft")
        expected = host_architecture(tiny_host())
        adapted = peft.get_peft_model(tiny_host(), peft.LoraConfig(target_modules=["q_proj", "embed_tokens"]))
        for host in (tiny_host().bfloat16(), tiny_host(seed=5), noised(tiny_host()), torch.compile(tiny_host()),
                     tiny_host().to("meta"), cpu_offload(tiny_host(), torch.device("cpu")), adapted):  # fmt: skip
            assert host_architecture(host) == expected

    def test_words(self):
        assert host_architecture(host_of("meta")) == (
            f"model_type=llama embeddings={VOCAB}x32 hidden_size=32 num_hidden_layers=2 num_attention_heads=4 "
            "num_key_value_heads=2 head_dim=8 intermediate_size=48 positions=rope"
        )

    @pytest.mark.parametrize("name", SHAPE)
    def test_each_shape_counts(self, name):
        ways = ({}, {name: SHAPE[name] * 2})
        before, after = (architecture_fields(host_architecture(host_of("meta", **changes))) for changes in ways)
        changed = {key for key in before if before[key] != after[key]}
        assert changed == {"vocab_size": {"embeddings"}, "hidden_size": {"hidden_size", "embeddings"}}.get(
            name, {name}
        )

    def test_embeddings_that_were_resized_count(self):
        host = host_of()
        host.resize_token_embeddings(VOCAB + 1, mean_resizing=False)
        assert f"embeddings={VOCAB + 1}x32" in host_architecture(host)

    @pytest.mark.parametrize("pack", [lambda weight: weight[:, ::2].char(), torch.Tensor.flatten])
    def test_packed_embeddings_are_what_their_module_says(self, pack):
        host = host_of()
        embedding = host.get_input_embeddings()
        embedding.weight = torch.nn.Parameter(pack(embedding.weight.detach()), requires_grad=False)
        assert host_architecture(host) == host_architecture(host_of("meta"))

    def test_families_and_their_positions_count(self):
        prints = {host_architecture(tiny_host(family)) for family in ("llama", "qwen2", "gpt_neox", "gpt2", "gemma2")}
        assert len(prints) == 5 and all(" head_dim=8" in one for one in prints), "named or not in the configuration"
        falcon = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "vocab_size": VOCAB}
        with torch.device("meta"):
            ways = [
                architecture_fields(host_architecture(FalconForCausalLM(FalconConfig(**falcon, alibi=alibi))))
                for alibi in (False, True)
            ]
        assert [way["positions"] for way in ways] == ["rope", "alibi"] and ways[0]["num_key_value_heads"] == "4"

    def test_the_base_and_scaling_of_positions_do_not(self):
        longer = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6}
        other = host_of("meta", rope_parameters=longer, max_position_embeddings=9999)
        assert host_architecture(other) == host_architecture(host_of("meta"))

    def test_values_of_each_layer_and_of_experts(self):
        host = host_of("meta")
        vars(host.config)["intermediate_size"] = [48, 48]  # past its own check of types
        assert host_architecture(host) == host_architecture(host_of("meta"))
        vars(host.config)["intermediate_size"] = [48, 96]  # past its own check of types
        assert "intermediate_size=[48,96] " in host_architecture(host)
        vars(host.config)["num_local_experts"] = MixtralConfig().num_local_experts
        assert " num_experts=8 " in host_architecture(host)

    def test_no_host(self):
        with pytest.raises(InputError, match="decoder"):
            host_architecture(torch.nn.Linear(2, 2))
