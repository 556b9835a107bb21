import dataclasses

import pytest
import torch

from hf_crouter import Compact, CompressedHistory, Copy, Experts, InputError, Retrieve, SoftPrompts
from hf_crouter.hosts.fingerprint import host_fingerprint
from hf_crouter.modes import MODES, modes_from_options
from hf_crouter.ngram.gate import Gate, GateConfig
from tests.hosts.tiny_families import tiny_family
from tests.tiny import tiny_crouter, tiny_host, tiny_projector

from .kept_pairs import KeptPairs

torch.set_num_threads(1)


class TestChoices:
    def test_any_host_compacts_and_retrieves_at_once(self):
        assert CompressedHistory(tiny_host(), modes="auto").modes == (Compact(slots=32), Retrieve(chunks=2))
        assert CompressedHistory(tiny_host()).modes == (Compact(slots=32), Retrieve(chunks=2))
        assert CompressedHistory(tiny_host(), modes="fast").modes == (Retrieve(chunks=2),)

    def test_a_host_whose_pairs_cannot_be_compacted_retrieves(self):
        host = tiny_family("deepseek_v3")
        assert CompressedHistory(host).modes == (Retrieve(chunks=2),)
        host.config._attn_implementation = "flash_attention_2"
        assert CompressedHistory(host).modes == (Retrieve(chunks=2),)

    def test_auto_takes_what_the_crouter_brings_for_this_host(self, tmp_path, monkeypatch):
        host, crouter = tiny_host(), tiny_crouter()
        assert [type(m) for m in CompressedHistory(host, crouter).modes] == [Compact, Retrieve]
        crouter.save_pretrained(tmp_path)
        crouter.config._name_or_path = str(tmp_path)
        tiny_projector(host, crouter).save(tmp_path / "projectors" / "tiny")
        assert [type(m) for m in CompressedHistory(host, crouter).modes] == [Compact, Retrieve], "of a kind the first"
        Gate(GateConfig(host_fingerprint=host_fingerprint(host))).save(tmp_path / "gates" / "tiny")
        assert [type(m) for m in CompressedHistory(host, crouter).modes] == [Compact, Copy, Retrieve]
        assert [type(m) for m in CompressedHistory(tiny_host(seed=5), crouter).modes] == [Compact, Retrieve]
        monkeypatch.setattr(Compact, "ready", lambda setting: None)
        assert [type(m) for m in CompressedHistory(host, crouter).modes] == [SoftPrompts, Copy, Retrieve]
        assert [type(m) for m in CompressedHistory(host, crouter, modes="fast").modes] == [Retrieve]

    def test_an_empty_list_drops_what_leaves_the_window(self):
        history = CompressedHistory(tiny_host(), modes=[])
        assert history.modes == () and history.policy.compressor is None and history.policy.retriever is None


@pytest.mark.parametrize(
    ("modes", "line"),
    [
        ("slow", "modes: expected 'auto', 'fast' or a list of modes .*, got 'slow'"),
        (
            ["retrieve", "recall"],
            "modes: expected names among compact, soft_prompts, copy, retrieve, experts, got 'recall'",
        ),
        ([Retrieve(2), Retrieve(4)], "modes: expected Retrieve once, got it twice"),
        ([Copy(), "copy"], "modes: expected Copy once, got it twice"),
        ([SoftPrompts()], "SoftPrompts: expected a crouter, got None"),
        ([Experts()], "Experts: expected a crouter, got None"),
        ([Copy(source="rebuilt")], "Copy: expected a crouter, got None"),
        ([Retrieve], "modes: expected a mode such as"),
        (Retrieve(2), "modes: expected 'auto', 'fast' or a list of modes"),
        ([3], "modes: expected a mode such as"),
    ],
)
def test_bad_modes_are_named_in_one_line(modes, line):
    host = tiny_host()
    with pytest.raises(InputError, match=line) as caught:
        CompressedHistory(host, modes=modes)
    assert "\n" not in str(caught.value) and type(host).__mro__[1].__name__ != "CompressedGenerationMixin"


def test_two_modes_that_make_entries_exclude_each_other():
    host, crouter = tiny_host(), tiny_crouter()
    with pytest.raises(InputError, match="expected one that gives entries, got SoftPrompts and KeptPairs"):
        CompressedHistory(host, crouter, modes=[SoftPrompts(tiny_projector(host, crouter)), KeptPairs()])


def test_a_mode_that_cannot_be_bound_leaves_no_trace(tmp_path):
    host, crouter = tiny_host(), tiny_crouter()
    with pytest.raises(InputError, match="no set of experts"):
        CompressedHistory(host, crouter, modes=[Retrieve(), Experts(tmp_path)])
    assert not any(m._forward_hooks for model in (host, crouter) for m in model.modules())


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "modes"),
        [
            ({}, "auto"),
            ({"modes": "fast"}, "fast"),
            ({"modes": "none"}, []),
            ({"retrieve": 2, "copy": True}, [Copy(), Retrieve(2)]),
            ({"retrieve": "4", "retrieve_every": "64"}, [Retrieve(4, every=64)]),
            ({"copy": "rebuilt", "copy_strength": "0.5"}, [Copy("rebuilt", strength=0.5)]),
            ({"copy": "true", "copy_generated": "true"}, [Copy(generated=True)]),
            ({"retrieve": 0, "copy": False, "soft_prompts": None}, "auto"),
            ({"experts": "folder", "experts_top_k_experts": 2}, [Experts("folder", top_k_experts=2)]),
        ],
    )
    def test_flat_options_make_modes(self, options, modes):
        found, rest = modes_from_options({**options, "window": 512})
        assert found == modes and rest == {"window": 512}

    @pytest.mark.parametrize(
        ("options", "line"),
        [
            ({"retrieve": "two"}, "retrieve_chunks: expected a whole number, got 'two'"),
            ({"retrieve_every": 64}, "retrieve_every: expected retrieve as well, got it alone"),
            ({"copy": True, "copy_generated": "maybe"}, "copy_generated: expected true or false, got 'maybe'"),
            (
                {"retrieve": 2, "retrieve_evry": 64},
                "retrieve_evry: expected one of retrieve's settings .*retrieve_every",
            ),
            ({"modes": "auto", "copy": True}, "modes: expected 'auto' or single modes, got both"),
            ({"retrieve": -1}, "Retrieve.chunks=.: expected a number of chunks"),
        ],
    )
    def test_bad_options_are_named(self, options, line):
        with pytest.raises(InputError, match=line):
            modes_from_options(options)


def test_modes_are_frozen_and_documented():
    for name, cls in MODES.items():
        assert dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen and cls.name == name
        for field in dataclasses.fields(cls):
            assert f"        {field.name}: " in (cls.__doc__ or ""), f"{cls.__name__}.{field.name}"
