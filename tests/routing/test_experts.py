"""Experts and sets on disk: what is written, and what is refused."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch

from hf_crouter.crouter.fingerprint import crouter_fingerprint
from hf_crouter.errors import InputError, MismatchError
from hf_crouter.hosts.fingerprint import host_fingerprint
from hf_crouter.routing import experts as module
from hf_crouter.routing.adapters import Lora
from hf_crouter.routing.experts import Expert, ExpertSet, Texts, add_expert, expert_names, remove_expert
from hf_crouter.routing.measure import measure_evidence
from hf_crouter.routing.profile import Evidence
from hf_crouter.utils.io import write_json

from ..tiny import tiny_crouter, tiny_host
from .trained_experts import save_expert, trained_set


@pytest.fixture
def folder(folders, tmp_path):
    """A set of `b` and `a`, in this order."""
    add_expert(tmp_path / "set", folders["b"])
    add_expert(tmp_path / "set", folders["a"])
    return tmp_path / "set"


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


class TestSet:
    def test_round_trip(self, folder, folders):
        found = ExpertSet.load(folder)
        assert found.names == ("b", "a") and len(found) == 2 and [e.name for e in found] == ["b", "a"]
        expert, lora = found["a"], Lora.load(folders["a"] / "compressor")
        assert all(torch.equal(expert.compressor.up[path], lora.up[path]) for path in lora.up)
        assert expert.config.training == {"seed": 0} and expert.calibration.reconstruction_nll(16, 0.5) > 0
        assert expert.centroid is not None and expert.nbytes > 0
        assert expert.calibration.weights == lora.checksum and expert.host.checksum != found["b"].host.checksum, (
            "each has its own files"
        )

    def test_a_set_travels_as_one(self, folder, tmp_path):
        moved = shutil.move(folder, tmp_path / "elsewhere")
        assert ExpertSet.load(moved).names == ("b", "a")

    def test_mounting_and_removing_change_no_byte_of_the_others(self, folder, folders):
        before = {name: content(folder / name) for name in ("a", "b")}
        add_expert(folder, folders["c.v-2_x"])
        assert expert_names(folder) == ["b", "a", "c.v-2_x"]
        remove_expert(folder, "b")
        assert ExpertSet.load(folder).names == ("a", "c.v-2_x")
        assert content(folder / "a") == before["a"] and not (folder / "b").exists()
        add_expert(folder, folders["b"])
        assert content(folder / "b") == before["b"]
        assert not list(folder.glob(".*")), "nothing temporary stays"

    def test_only_an_experts_own_files_are_copied(self, folder, folders):
        (folders["a"] / "compressor" / "README.md").write_text("PEFT writes one")
        assert set(content(folder / "a")) == {
            "expert.json", "calibration.json", "latents.safetensors", "texts.safetensors",
            *(f"{part}/adapter_{name}" for part in ("compressor", "host")
              for name in ("config.json", "model.safetensors")),
        }  # fmt: skip

    def test_in_place(self, folders, tmp_path):
        """An expert that was made inside the set's folder."""
        shutil.copytree(folders["a"], tmp_path / "set" / "a")
        add_expert(tmp_path / "set", tmp_path / "set" / "a")
        assert ExpertSet.load(tmp_path / "set").names == ("a",)

    def test_interrupted_mounting(self, folder, folders, monkeypatch):
        with monkeypatch.context() as patch:
            patch.setattr(module, "write_json", interrupt)
            with pytest.raises(KeyboardInterrupt):
                add_expert(folder, folders["c.v-2_x"])
        assert ExpertSet.load(folder).names == ("b", "a")
        add_expert(folder, folders["c.v-2_x"])
        assert ExpertSet.load(folder).names == ("b", "a", "c.v-2_x")

    def test_interrupted_copying(self, folder, folders, monkeypatch):
        with monkeypatch.context() as patch:
            patch.setattr(module.shutil, "copyfile", interrupt)
            with pytest.raises(KeyboardInterrupt):
                add_expert(folder, folders["c.v-2_x"])
        assert sorted(path.name for path in folder.iterdir()) == ["a", "b", "experts.json"]

    def test_interrupted_removal(self, folder, folders, monkeypatch):
        with monkeypatch.context() as patch:
            patch.setattr(module, "temporary_folder_beside", interrupt)
            with pytest.raises(KeyboardInterrupt):
                remove_expert(folder, "b")
        assert ExpertSet.load(folder).names == ("a",)
        add_expert(folder, folders["b"])
        assert ExpertSet.load(folder).names == ("a", "b")

    def test_empty(self, folder):
        for name in ("a", "b"):
            remove_expert(folder, name)
        assert ExpertSet.load(folder).names == ()

    def test_profiles_among_all_experts(self, folder, folders):
        before = {name: content(folder / name) for name in ("a", "b")}
        assert ExpertSet.load(folder)["a"].profile is None
        first = measure_evidence(folder, tiny_crouter(), rows=64)
        found = ExpertSet.load(folder)
        assert found.names == ("b", "a") and set(found["a"].profile.means) == {8, 16}
        assert found["a"].profile.limit(16, 0.9) == 1 < found["a"].profile.limit(16, 0.99)
        assert {name: content(folder / name) for name in ("a", "b")} == before
        add_expert(folder, folders["c.v-2_x"])
        assert ExpertSet.load(folder)["a"].profile.axes == (0, 1, 3), "the third did not measure its texts"
        assert ExpertSet.load(folder)["c.v-2_x"].profile is None
        more = measure_evidence(folder, tiny_crouter(), rows=64)
        for length, values in first.reconstruction_nlls["a"].items():
            assert np.array_equal(more.reconstruction_nlls["a"][length][:, [0, 1, 3]], values), "kept to the bit"
        assert all(expert.profile is not None for expert in ExpertSet.load(folder))
        remove_expert(folder, "c.v-2_x")
        again = ExpertSet.load(folder)["b"].profile
        assert again.digest == found["b"].profile.digest and again.axes == (0, 1, 2)
        assert ExpertSet((found["b"],)).experts[0].profile is None

    def test_an_expert_whose_texts_stayed_behind_keeps_its_profile(self, folder, folders, tmp_path):
        base = tmp_path / "bare"
        for seed, name in enumerate(("a", "b")):
            add_expert(base, save_expert(tmp_path / name, seed=seed, trained=False))
        measure_evidence(base, tiny_crouter(), rows=64)
        for name in ("a", "b"):
            Expert.load(base / name).save_description(base / name)
            (base / name / "texts.safetensors").unlink()
        add_expert(base, folders["c.v-2_x"])
        measure_evidence(base, tiny_crouter(), rows=64)
        assert [e.profile.axes for e in ExpertSet.load(base)] == [(0, 1, 3), (0, 1, 3), (0, 1, 2, 3)]

    def test_other_texts_are_measured_anew(self, folder):
        first = measure_evidence(folder, tiny_crouter(), rows=64)
        texts = Texts.load(folder / "a")
        fewer = Texts({8: texts.ids[8][:100]}, {8: texts.documents[8][:100]})
        Expert.load(folder / "a").save_description(folder / "a", fewer)
        second = measure_evidence(folder, tiny_crouter(), rows=64)
        assert second.reconstruction_nlls["a"][8].shape == (100, 3, 2) and set(second.reconstruction_nlls["a"]) == {8}
        assert np.array_equal(second.reconstruction_nlls["b"][16], first.reconstruction_nlls["b"][16])

    def test_an_expert_without_texts_is_told_by_its_residual(self, folder, tmp_path):
        measure_evidence(folder, tiny_crouter(), rows=64)
        add_expert(folder, save_expert(tmp_path / "late", trained=False, seed=7, with_texts=False))
        evidence = measure_evidence(folder, tiny_crouter(), rows=64)
        assert "late" not in evidence.reconstruction_nlls and np.isfinite(evidence.reconstruction_nlls["a"][16]).all()
        found = ExpertSet.load(folder)
        assert found["late"].profile is None and found["a"].profile is not None

    def test_check(self, folder):
        found, crouter = ExpertSet.load(folder), crouter_fingerprint(tiny_crouter(), decoder=True)
        host = host_fingerprint(tiny_host())
        found.check(crouter)
        found.check(crouter, host, crouter_tokenizer="crouter ids", host_tokenizer="host ids")
        with pytest.raises(MismatchError, match="expert b: expected the crouter with fingerprint"):
            found.check(crouter_fingerprint(tiny_crouter(seed=1), decoder=True))
        with pytest.raises(MismatchError, match="expected the host with"):
            found.check(crouter, host_fingerprint(tiny_host(seed=1)))
        with pytest.raises(MismatchError, match="crouter's tokenizer"):
            found.check(crouter, host, crouter_tokenizer="others")
        with pytest.raises(MismatchError, match="host's tokenizer"):
            found.check(crouter, host, host_tokenizer="others")
        with pytest.raises(TypeError, match="fingerprint"):
            found.check(tiny_crouter())  # pyright: ignore


def interrupt(*_, **__):
    raise KeyboardInterrupt


class TestRefusedSets:
    def test_no_set(self, tmp_path):
        with pytest.raises(InputError, match="no set of experts"):
            ExpertSet.load(tmp_path)

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"names": "a"}', '{"names": [3]}', '{"names": ["../a"]}'])
    def test_damaged(self, folder, text):
        (folder / "experts.json").write_text(text)
        with pytest.raises(InputError):
            ExpertSet.load(folder)

    def test_evidence(self, folder):
        evidence = measure_evidence(folder, tiny_crouter(), rows=64)
        Evidence({"b": "w"}, {}, evidence.reconstruction_nlls, evidence.documents).save(folder)
        with pytest.raises(InputError, match="expected reconstruction NLLs of shape"):
            ExpertSet.load(folder)
        (folder / "evidence.safetensors").write_bytes(b"no")
        with pytest.raises(InputError, match=r"evidence.safetensors: not a set's evidence"):
            ExpertSet.load(folder)

    def test_two_of_one_name(self, folder, folders):
        with pytest.raises(InputError, match="an expert named a already"):
            add_expert(folder, folders["a"])
        (folder / "experts.json").write_text('{"names": ["a", "b", "a"]}')
        with pytest.raises(InputError, match="two named a"):
            ExpertSet.load(folder)
        expert = Expert.load(folders["a"])
        with pytest.raises(InputError, match="two named a"):
            ExpertSet((expert, expert))

    def test_a_mounted_expert_that_is_gone(self, folder):
        shutil.rmtree(folder / "b")
        with pytest.raises(InputError, match="no expert"):
            ExpertSet.load(folder)

    def test_another_folder_in_its_place(self, folder, folders):
        (folder / "c.v-2_x").mkdir()
        (folder / "c.v-2_x" / "precious").touch()
        with pytest.raises(InputError, match="something else"):
            add_expert(folder, folders["c.v-2_x"])
        assert (folder / "c.v-2_x" / "precious").exists()

    def test_unknown_names(self, folder):
        with pytest.raises(InputError, match="one of the experts b, a, got z"):
            ExpertSet.load(folder)["z"]
        with pytest.raises(InputError, match="one of the experts b, a, got z"):
            remove_expert(folder, "z")

    @pytest.mark.parametrize(
        ("what", "options"), [("crouter", {"crouter": tiny_crouter(seed=5)}), ("host", {"host": tiny_host(seed=5)})]
    )
    def test_an_expert_of_another_base_model(self, folder, tmp_path, what, options):
        before = content(folder)
        with pytest.raises(MismatchError, match=f"expert z: expected the {what} with fingerprint"):
            add_expert(folder, save_expert(tmp_path / "z", trained=False, **options))
        assert content(folder) == before

    @pytest.mark.parametrize("key", ["crouter_tokenizer", "host_tokenizer"])
    def test_an_expert_of_another_tokenizer(self, folder, folders, key):
        found, expert = ExpertSet.load(folder), Expert.load(folders["c.v-2_x"])
        config = dataclasses.replace(expert.config, **{key: "others"})
        with pytest.raises(MismatchError, match="tokenizer"):
            ExpertSet((*found, dataclasses.replace(expert, config=config)))


def test_what_an_interrupted_removal_left_can_be_removed(tmp_path):
    folder = shutil.copytree(trained_set(), tmp_path / "set")
    write_json(folder / "experts.json", {"names": ["low"]})  # as far as it came
    remove_expert(folder, "high")
    assert not (folder / "high").exists() and ExpertSet.load(folder).names == ("low",)
    with pytest.raises(InputError, match="expected one of the experts low"):
        remove_expert(folder, "high")
