"""The files of an expert: what is refused."""

import dataclasses
import hashlib
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_crouter.errors import InputError, MismatchError
from hf_crouter.routing.expert_files import Centroid, Texts
from hf_crouter.routing.experts import Expert, ExpertSet

from .trained_experts import trained_set


def change(path, **values):
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, **values}))


def resealed(folder):
    """Checksums of what stands there now: damage that only the file itself can show."""
    sums = json.loads((folder / "expert.json").read_text())["sha256"]
    change(folder / "expert.json", sha256={p: hashlib.sha256((folder / p).read_bytes()).hexdigest() for p in sums})


@pytest.fixture
def expert(folders, tmp_path):
    return shutil.copytree(folders["a"], tmp_path / "a")


@pytest.mark.parametrize("part", ["compressor", "host"])
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_adapter_file(expert, part, name):
    (expert / part / name).unlink()
    with pytest.raises(InputError, match=f"{part}.*{name}"):
        Expert.load(expert)


@pytest.mark.parametrize("name", ["calibration.json", "latents.safetensors", "expert.json"])
def test_another_missing_file(expert, name):
    (expert / name).unlink()
    with pytest.raises(InputError, match=name):
        Expert.load(expert)


@pytest.mark.parametrize("part", ["compressor", "host"])
def test_altered_weights(expert, part):
    path = expert / part / "adapter_model.safetensors"
    save_file({key: value + 1 for key, value in load_file(path).items()}, path)
    with pytest.raises(InputError, match="other weights" if part == "compressor" else "altered"):
        Expert.load(expert)


def test_an_altered_scale(expert):
    change(expert / "host" / "adapter_config.json", lora_alpha=99)
    with pytest.raises(InputError, match="altered"):
        Expert.load(expert)


@pytest.mark.parametrize("key", ["weights", "fingerprint"])
def test_a_calibration_made_for_other_weights(expert, key):
    change(expert / "calibration.json", **{key: "0" * 32})
    resealed(expert)
    with pytest.raises(MismatchError, match="calibration of its own (compressor|crouter).* other weights"):
        Expert.load(expert)


@pytest.mark.parametrize(
    "changes",
    [{"residuals": {}}, {"residuals": {"16": {"0.5": 1.0}}}, {"residuals": 3}, {"pieces": None},
     {"residuals": {"0": {}}}, {"pieces": {"16": "many"}}],
    ids=str,
)  # fmt: skip
def test_a_damaged_calibration(expert, changes):
    change(expert / "calibration.json", **changes)
    resealed(expert)
    with pytest.raises(InputError, match="calibration.json: (expected reconstruction NLLs|not an expert's)"):
        Expert.load(expert)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "3", '{"name": "a", "sha256": 3}'])
def test_a_damaged_description(expert, text):
    (expert / "expert.json").write_text(text)
    with pytest.raises(InputError, match="expert.json: not an expert's"):
        Expert.load(expert)


@pytest.mark.parametrize(
    "changes", [{"host_fingerprint": 3}, {"training": []}, {"sha256": {}}, {"sha256": {"../x": "0"}}], ids=str
)
def test_a_description_of_something_else(expert, changes):
    change(expert / "expert.json", **changes)
    with pytest.raises(InputError, match="expert.json: (not an expert's|expected checksums)"):
        Expert.load(expert)


def test_damaged_latents(expert):
    (expert / "latents.safetensors").write_bytes(b"\0" * 9)
    with pytest.raises(InputError, match="latents.safetensors: damaged"):
        Expert.load(expert)


def test_a_name_that_is_not_the_folders(expert, tmp_path):
    with pytest.raises(InputError, match="expected the folder's name, got an expert named a"):
        Expert.load(expert.rename(tmp_path / "z"))


@pytest.mark.parametrize("name", ["", "a b", "a/b", "..", ".a", "ä", "a\n", 3, None])
def test_a_bad_name(expert, name):
    change(expert / "expert.json", name=name)
    with pytest.raises(InputError, match="expected a name"):
        Expert.load(expert)


def test_a_description_of_other_adapters(folders, expert):
    with pytest.raises(InputError, match="expected the adapter"):
        Expert.load(folders["a"]).save_description(folders["b"])
    (expert / "host" / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match="cannot be read"):
        Expert.load(folders["a"]).save_description(expert)


def test_texts(folders, tmp_path):
    expert = shutil.copytree(folders["a"], tmp_path / "a")
    (expert / "texts.safetensors").write_bytes(b"no")
    with pytest.raises(InputError, match="texts.safetensors: altered"):
        Expert.load(expert)
    with pytest.raises(InputError, match="not an expert's texts"):
        Texts.load(expert)


def test_centroid():
    near, far = torch.randn(50, 2, 12), torch.randn(50, 2, 12) + 1
    centroid = Centroid.fit(near)
    assert (centroid.distance(near) < centroid.distance(far)).float().mean() > 0.9
    with pytest.raises(InputError, match="at least 2"):
        Centroid.fit(near[:1])


def test_no_expert_is_named_like_a_file_of_the_set(tmp_path):
    with pytest.raises(InputError, match="expected a name"):
        dataclasses.replace(ExpertSet.load(trained_set())["low"], name="margins.json")
