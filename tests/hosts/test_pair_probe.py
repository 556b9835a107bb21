"""Hosts whose pairs `Compact` may not compact by what their configuration says, and those that nobody tried."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_crouter.errors import InputError
from hf_crouter.history import CompressedHistory
from hf_crouter.hosts import pair_probe
from hf_crouter.hosts.families import FAMILIES, check_compact
from hf_crouter.modes import Compact

from ..histories import PREFIX, WINDOW, run
from ..tiny import CHUNK, prompt, tiny_crouter, tiny_host
from .family_checks import pairs_are_compacted_and_read_right
from .tiny_families import tiny_family

torch.set_num_threads(1)


def make(host, **options):
    return CompressedHistory(host, tiny_crouter(), modes=[Compact(4, **options)], window=WINDOW, keep_first=PREFIX)


SHARED = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}


@pytest.mark.parametrize(
    "name, changes, why",
    [
        ("gemma4_text", SHARED, "has layers that read the keys of others"),
        ("mistral", {}, "has no layer that looks further back than its sliding window"),
        ("qwen3", {"layer_types": ["full_attention", "chunked_attention"]}, "has layers of the kind 'chunked_attent"),
    ],
)
def test_configurations_that_are_refused(name, changes, why):
    host = tiny_family(name, **({"attention_chunk_size": 16} if "chunked" in why else {}), **changes)
    with pytest.raises(InputError, match=f"got {type(host).__name__}, which {why}"):
        make(host)


@pytest.mark.parametrize("name", ["deepseek_v3", "bamba", "axk2", "llama4_text"])
def test_what_is_refused_by_name_is_by_its_configuration_too(name, monkeypatch):
    host = tiny_family(name)
    monkeypatch.setitem(FAMILIES, name, None)
    with pytest.raises(InputError, match="pairs can be compacted"):
        check_compact(host)


def test_other_attention_is_refused_when_the_history_is_made_and_later():
    host = tiny_host()
    history = make(host)
    host.set_attn_implementation("flex_attention")
    with pytest.raises(InputError, match="expected sdpa or eager attention .* got flex_attention in LlamaForCausalLM"):
        make(host)
    with pytest.raises(InputError, match="got flex_attention"):
        run(host, prompt(70)[0], new=3, logits_processor=[history])
    with pytest.raises(InputError, match="got flex_attention"):
        history.score(prompt(70)[0], 3)
    host.set_attn_implementation("eager")
    assert run(host, prompt(70)[0], new=3, logits_processor=[history]).past_key_values.places is not None


@pytest.mark.parametrize("name", ["llama", "modernbert-decoder", "gemma3_text", "gpt2"])
def test_eager_attention(name):  # some families' expects a mask at every step
    host = tiny_family(name)
    host.set_attn_implementation("eager")
    pairs_are_compacted_and_read_right(host)


@pytest.mark.parametrize(
    "name, changes",
    [
        ("gemma4_text", {"global_head_dim": 16}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        ("gpt_bigcode", {"multi_query": False}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1}),
        ("smollm3", {"no_rope_layers": [0, 1]}),
        ("stablelm", {"qk_layernorm": True}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_variants_of_families(name, changes):
    pairs_are_compacted_and_read_right(tiny_family(name, **changes))


class Unknown(LlamaForCausalLM):
    """A user's own class."""


def unknown():
    torch.manual_seed(0)
    host = Unknown(LlamaConfig(**tiny_host().config.to_dict())).eval()
    host.generation_config.eos_token_id = None
    return host


class TestUnknownFamilies:
    def test_one_that_attends_to_what_it_shows_is_served_and_tried_once(self):
        host, forwards = unknown(), []
        history = make(host)
        host.model.register_forward_pre_hook(lambda module, args: forwards.append(1))
        run(host, prompt(12)[0], new=3, logits_processor=[history])
        assert len(forwards) == 3 and host not in pair_probe._SHOWN
        run(host, prompt(70)[0], new=3, logits_processor=[history])
        first = len(forwards) - 3
        run(host, prompt(70)[0], new=3, logits_processor=[history])
        assert len(forwards) - 3 - first == first - 5  # three of one reading in two pieces, two of this trial
        pairs_are_compacted_and_read_right(host)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(
        "name", ["llama", "gemma2", "gemma3_text", "gpt_oss", "gpt2", "mimo_v2_flash", "qwen2_vl"]
    )
    def test_families_of_the_list_pass_it(self, name, dtype, monkeypatch):
        monkeypatch.setattr(pair_probe, "is_tested", lambda host: False)
        pair_probe.check_pairs(tiny_family(name).to(dtype))

    @pytest.mark.parametrize(
        "name, words",
        [
            ("deepseek_v3", "attends in layer 0 to other keys and values than it caches"),
            ("jetmoe", "attends in layer 0 to other keys and values than it caches"),
            ("gemma3n_text", "attends in layer 2 to other keys and values than it caches"),
            ("inkling_text", "attends in layer 0 otherwise than its queries and keys say"),
            ("diffllama", "attends in some layer not once but more often"),
            ("hrm_text", "attends in some layer not once but more often"),
            ("lfm2", "or not at all"),
            ("llama4_text", "reads otherwise by equal masks"),
            ("bloom", "cannot be given masks layer by layer"),
            ("gptj", "own hides its queries"),
        ],
    )
    def test_families_that_are_refused_by_name_fail_it(self, name, words, monkeypatch):
        monkeypatch.setattr(pair_probe, "is_tested", lambda host: False)
        monkeypatch.setattr(pair_probe, "check_compact", lambda host: None)
        host = tiny_family(name)
        with pytest.raises(InputError, match=f"got {type(host).__name__}, wh.*{words}") as error:
            pair_probe.check_pairs(host)
        assert "\n" not in str(error.value)

    def test_outputs_that_are_something_else_are_refused_before_any_other_forward(self, monkeypatch):
        host = unknown()
        history, plain, forwards = make(host), ALL_ATTENTION_FUNCTIONS["sdpa"], []

        def tempered(module, query, key, value, *args, scaling=None, **options):
            forwards.append(query.shape[2])
            return plain(module, 1.1 * query, key, value, *args, scaling=scaling, **options)

        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", tempered)
        with pytest.raises(InputError, match="Unknown, which attends in layer 0 otherwise"):
            run(host, prompt(CHUNK + 70)[0], new=3, logits_processor=[history])
        assert max(forwards) <= pair_probe.LENGTH
