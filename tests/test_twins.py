"""What the gates, projectors and experts of one host do for its twins and for strangers, and what is told of it."""

import dataclasses
import json
import shutil

import pytest
import torch
from accelerate import cpu_offload
from transformers import LlamaForCausalLM

from hf_crouter import CompressedHistory, Copy, Experts, MismatchError, SoftPrompts
from hf_crouter.chunking import tokenizer_fingerprint
from hf_crouter.compressors.projector import Projector, find_projector
from hf_crouter.fitting import HostInUse, fitted
from hf_crouter.hosts.fingerprint import host_architecture
from hf_crouter.ngram.gate import Gate, GateConfig, find_gate, own_gate
from hf_crouter.routing.experts import Expert, ExpertSet

from .histories import PREFIX, WINDOW, run
from .routing.trained_experts import trained_set
from .tiny import VOCAB, prompt, tiny_crouter, tiny_host, tiny_projector
from .twins import OTHER, TOKENIZER, host_of, noised

torch.set_num_threads(1)

TWINS = {"other weights": lambda: tiny_host(seed=5), "noise": lambda: noised(tiny_host())}
STRANGERS = {"hidden_size": {"hidden_size": 64}, "vocab_size": {"vocab_size": VOCAB + 3}}


@pytest.fixture
def crouter(tmp_path):
    tiny_crouter().save_pretrained(tmp_path / "crouter")
    return type(tiny_crouter()).from_pretrained(tmp_path / "crouter").eval()


def put_parts(crouter, host, name, tokenizer=TOKENIZER):
    """A projector and a gate of a host, in folders `name` of the crouter's."""
    folder = crouter.name_or_path
    projector = tiny_projector(host, crouter, host_tokenizer=tokenizer, crouter_tokenizer=tokenizer, host_name=name)
    projector.save(f"{folder}/projectors/{name}")
    config = {key: getattr(projector.config, key)
              for key in ("host_name", "host_fingerprint", "host_architecture", "host_tokenizer")}  # fmt: skip
    Gate(GateConfig(**config)).save(f"{folder}/gates/{name}")


def without_architecture(crouter, name):
    """Their files as they were before: without the host's architecture."""
    for part in ("projector", "gate"):
        path = f"{crouter.name_or_path}/{part}s/{name}/{part}.json"
        with open(path) as file:
            record = json.load(file)
        del record["host_architecture"]
        if part == "gate":
            del record["host_tokenizer"]
        with open(path, "w") as file:
            json.dump(record, file)


def read(host, crouter, modes=("soft_prompts", "copy", "retrieve"), tokenizer=TOKENIZER):
    """The report of a short call, as lines and as records."""
    history = CompressedHistory(host, crouter, modes=modes, window=WINDOW, keep_first=PREFIX, tokenizer=tokenizer,
                                crouter_tokenizer=TOKENIZER)  # fmt: skip
    run(host, *prompt(60), new=2, logits_processor=[history])
    report = history.report()
    history.detach()
    return str(report), {record.part: record.fit for record in report.fitted}


class TestGatesAndProjectors:
    def test_the_very_copy(self, crouter):
        put_parts(crouter, tiny_host(), "own")
        for host in (tiny_host(), tiny_host().bfloat16(), cpu_offload(tiny_host(), torch.device("cpu"))):
            lines, fits = read(host, crouter)
            assert fits == {"projector": "exact", "gate": "exact"}
        assert "projector: fitted to this very copy of own\ngate: fitted to this very copy of own\n" in lines

    @pytest.mark.parametrize("twin", TWINS.values(), ids=TWINS)
    def test_twins_are_served_and_told(self, crouter, twin):
        put_parts(crouter, tiny_host(), "own")
        lines, fits = read(twin(), crouter)
        assert fits == {"projector": "twin", "gate": "twin"}
        for part in fits:
            line = f"{part}: fitted to a twin (own, other weights of the same architecture and tokenizer)\n"
            assert line in lines and lines.count(line) == 1

    def test_folders_that_are_named(self, crouter):
        put_parts(crouter, tiny_host(), "own")
        folder = crouter.name_or_path
        modes = [SoftPrompts(f"{folder}/projectors/own"), Copy(gate=f"{folder}/gates/own")]
        assert read(tiny_host(seed=5), crouter, modes)[1] == {"projector": "twin", "gate": "twin"}
        given = [SoftPrompts(Projector.load(f"{folder}/projectors/own")), Copy(gate=Gate.load(f"{folder}/gates/own"))]
        assert read(tiny_host(), crouter, given)[1] == {"projector": "exact", "gate": "exact"}

    def test_a_gate_that_the_caller_passes_is_told_whatever_it_is(self, crouter):
        put_parts(crouter, tiny_host(), "own")
        gate = Gate.load(f"{crouter.name_or_path}/gates/own")
        lines, fits = read(tiny_host(), None, [Copy(gate=gate)], tokenizer=OTHER)
        assert fits == {"gate": "exact"}, "as before, the very copy's tokenizer is not asked for"
        lines, fits = read(tiny_host(seed=5), None, [Copy(gate=gate)], tokenizer=OTHER)
        assert fits == {"gate": "other"} and "gate: fitted to another host (own)" in lines
        assert "gate: general, for any host" in read(tiny_host(), None, [Copy(gate=Gate())])[0]

    @pytest.mark.parametrize("own_name", ["a", "z"])
    def test_the_very_copys_come_first(self, crouter, own_name):
        put_parts(crouter, tiny_host(seed=5), "m")
        put_parts(crouter, tiny_host(), own_name)
        assert read(tiny_host(), crouter)[1] == {"projector": "exact", "gate": "exact"}
        assert find_projector(crouter, tiny_host()).config.host_name == own_name
        gate = own_gate(crouter, tiny_host())
        assert gate is not None and gate.config.host_name == own_name
        third = find_projector(crouter, tiny_host(seed=9), tokenizer=TOKENIZER)
        assert third.config.host_name == min("m", own_name)

    @pytest.mark.parametrize("changes", [*STRANGERS.values(), "family", "tokenizer", "no tokenizer"], ids=str)
    def test_strangers_are_refused_in_one_line(self, crouter, changes):
        put_parts(crouter, host_of(), "own")
        host, tokenizer = host_of(), TOKENIZER
        if isinstance(changes, dict):
            host = host_of(**changes)
            word = "embeddings"
        elif changes == "family":
            host, word = tiny_host("qwen2"), "model_type llama, got qwen2"
        else:
            host, word = noised(host), "tokenizer"
            tokenizer = OTHER if changes == "tokenizer" else None
        folder = crouter.name_or_path
        projector = Projector.load(f"{folder}/projectors/own")
        asked = {
            "projector: expected one for": lambda: find_projector(crouter, host, tokenizer=tokenizer),
            "expected the host with": lambda: projector.check(host, crouter, tokenizer),
            "gates/own: expected the host": lambda: find_gate(crouter, host, f"{folder}/gates/own", tokenizer),
        }  # fmt: skip
        for start, ask in asked.items():
            with pytest.raises(MismatchError, match=start) as error:
                ask()
            assert word in str(error.value) and "hf-crouter align" in str(error.value)
            assert "\n" not in str(error.value)
        assert own_gate(crouter, host, tokenizer) is None
        assert find_gate(crouter, host, None, tokenizer).config.host_name == ""

    def test_a_projector_asks_for_the_embeddings_alone(self, crouter):
        put_parts(crouter, host_of(), "own")
        deeper = host_of(num_hidden_layers=3)
        lines, fits = read(deeper, crouter, [SoftPrompts()])
        assert "projector: fitted to a twin (own, other weights of the same embeddings' shape and tokenizer)" in lines
        assert own_gate(crouter, deeper, TOKENIZER) is None

    def test_a_projector_of_another_crouter_is_no_twins(self, crouter):
        put_parts(crouter, tiny_host(), "own")
        projector = Projector.load(f"{crouter.name_or_path}/projectors/own")
        with pytest.raises(MismatchError, match="expected the crouter with fingerprint"):
            projector.check(tiny_host(), tiny_crouter(seed=9), TOKENIZER)
        other = tiny_crouter(seed=9)
        other.config._name_or_path = crouter.name_or_path
        with pytest.raises(MismatchError, match="projector: expected one for"):
            find_projector(other, tiny_host(seed=5), tokenizer=TOKENIZER)

    def test_files_from_before_serve_their_copy_alone(self, crouter):
        put_parts(crouter, tiny_host(), "own")
        without_architecture(crouter, "own")
        assert read(tiny_host(), crouter)[1] == {"projector": "exact", "gate": "exact"}
        with pytest.raises(MismatchError, match="its file names no architecture.*; make it with: hf-crouter align"):
            find_projector(crouter, tiny_host(seed=5), tokenizer=TOKENIZER)
        with pytest.raises(MismatchError, match="its file names no architecture.*; make one with: hf-crouter align"):
            find_gate(crouter, tiny_host(seed=5), f"{crouter.name_or_path}/gates/own", TOKENIZER)
        assert read(tiny_host(seed=5), crouter, "auto")[1] == {}, "then nothing is fitted"

    def test_a_gate_with_words_of_a_later_version(self, crouter):
        put_parts(crouter, tiny_host(), "own")
        path = f"{crouter.name_or_path}/gates/own/gate.json"
        with open(path) as file:
            record = json.load(file)
        with open(path, "w") as file:
            json.dump({**record, "later": 1}, file)
        assert Gate.load(f"{crouter.name_or_path}/gates/own").config.host_name == "own"

    def test_weights_out_of_reach_leave_it_to_the_architecture(self, crouter):
        put_parts(crouter, tiny_host(), "own")
        host = tiny_host().to("meta")
        known = HostInUse(host, TOKENIZER)
        assert known.host_fingerprint == ""
        found = find_projector(crouter, known).check(known, crouter)
        gate = find_gate(crouter, known)
        assert (found.part, found.fit, gate.fitted(known).fit) == ("projector", "either", "either")
        with pytest.raises(MismatchError, match="weights out of reach.*tokenizer is not known, pass tokenizer="):
            find_projector(crouter, host)
        with pytest.raises(MismatchError, match="got one whose weights cannot be read"):
            find_gate(crouter, host, f"{crouter.name_or_path}/gates/own")

    def test_a_tokenizer_beside_the_host_is_found(self, crouter, tmp_path):
        put_parts(crouter, tiny_host(), "own")
        tiny_host(seed=5).save_pretrained(tmp_path / "twin")
        TOKENIZER.save_pretrained(tmp_path / "twin")
        host = LlamaForCausalLM.from_pretrained(tmp_path / "twin")
        assert find_projector(crouter, host).check(host, crouter).fit == "twin"
        assert read(host, crouter, tokenizer=None)[1] == {"projector": "twin", "gate": "twin"}


def rewritten(folder, target, **changes):
    """An expert set whose descriptions are changed."""
    shutil.copytree(folder, target)
    for path in target.glob("*/expert.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return target


class TestExperts:
    @pytest.fixture
    def folder(self, tmp_path):
        tokenizer = tokenizer_fingerprint(TOKENIZER)
        named = {"host_tokenizer": tokenizer, "crouter_tokenizer": tokenizer}
        named |= {"host_architecture": host_architecture(tiny_host())}
        return rewritten(trained_set(), tmp_path / "experts", **named)

    def test_twins_are_served_and_told(self, folder):
        for host, fit in ((tiny_host(), "exact"), (tiny_host(seed=5), "twin"), (noised(tiny_host()), "twin")):
            lines, fits = read(host, tiny_crouter(), [Experts(folder)])
            assert fits == {"expert low": fit, "expert high": fit}
        assert "expert low: fitted to a twin (tiny, other weights of the same architecture and tokenizer)" in lines

    def test_strangers_are_refused_in_one_line(self, folder):
        for host, tokenizer, word in (
            (host_of(num_hidden_layers=3), TOKENIZER, "num_hidden_layers"),
            (tiny_host("qwen2"), TOKENIZER, "model_type"),
            (tiny_host(seed=5), OTHER, "tokenizer"),
            (tiny_host(seed=5), None, "tokenizer is not known"),
            (tiny_host(), OTHER, "host's tokenizer"),
        ):
            with pytest.raises(MismatchError, match=word) as error:
                read(host, tiny_crouter(), [Experts(folder)], tokenizer)
            assert "\n" not in str(error.value)

    def test_weights_out_of_reach(self, folder):
        known, experts = HostInUse(tiny_host().to("meta"), TOKENIZER), ExpertSet.load(folder)
        crouter = experts.experts[0].config.crouter_fingerprint
        experts.check(crouter, "", host_tokenizer=known.host_tokenizer, host_architecture=known.host_architecture)
        assert fitted("expert", experts.experts[0].config, known).fit == "either"
        with pytest.raises(MismatchError, match="weights cannot be read"):
            experts.check(crouter, "", host_architecture=known.host_architecture)
        with pytest.raises(TypeError, match="host's fingerprint"):
            experts.check(crouter, tiny_host())  # pyright: ignore

    def test_files_from_before_serve_their_copy_alone(self, folder):
        for path in folder.glob("*/expert.json"):
            record = json.loads(path.read_text())
            del record["host_architecture"]
            path.write_text(json.dumps(record))
        assert set(read(tiny_host(), tiny_crouter(), [Experts(folder)])[1].values()) == {"exact"}
        with pytest.raises(MismatchError, match="its file names no architecture"):
            read(tiny_host(seed=5), tiny_crouter(), [Experts(folder)])

    def test_a_set_holds_experts_of_twins(self, folder):
        low, high = ExpertSet.load(folder).experts
        twins = dataclasses.replace(high, config=dataclasses.replace(high.config, host_fingerprint="of a twin"))
        assert len(ExpertSet((low, twins))) == 2
        stranger = dataclasses.replace(twins.config, host_architecture="model_type=qwen2")
        with pytest.raises(MismatchError, match="expert high: expected the host with fingerprint of a twin"):
            ExpertSet((low, dataclasses.replace(high, config=stranger)))

    def test_what_is_saved_names_the_architecture(self, folder):
        expert = Expert.load(folder / "low")
        expert.save_description(folder / "low")
        assert Expert.load(folder / "low").config == expert.config and "llama" in expert.config.host_architecture


def test_a_report_before_any_call_has_them_too(crouter):
    put_parts(crouter, tiny_host(), "own")
    history = CompressedHistory(tiny_host(seed=5), crouter, modes=[Copy()], tokenizer=TOKENIZER)
    report = history.report()
    assert [str(record) for record in report.fitted] == [
        "gate: fitted to a twin (own, other weights of the same architecture and tokenizer)"
    ]
    assert report.to_dict()["fitted"][0]["fit"] == "twin" and json.dumps(report.to_dict())
    assert CompressedHistory(tiny_host()).report().fitted == ()
