"""What ships: the trained crouter with its projector, the wheel, and an import that changes nothing else."""

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModel

import hf_crouter
from hf_crouter import CRouterModel
from hf_crouter.chunking import tokenizer_fingerprint
from hf_crouter.compressors.projector import Projector, find_projector
from hf_crouter.crouter.fingerprint import crouter_fingerprint
from hf_crouter.crouter.loading import load_crouter, shipped_crouter
from hf_crouter.fitting import HostInUse, fit_of
from hf_crouter.hosts.fingerprint import host_architecture
from hf_crouter.hosts.loading import load_host
from hf_crouter.ngram.gate import own_gate
from hf_crouter.routing.calibration import load_calibration
from hf_crouter.routing.experts import ExpertSet, expert_folder
from hf_crouter.training.evaluate import reconstruction_score

PACKAGE = Path(hf_crouter.__file__).parent
ROOT = PACKAGE.parent
SHIPPED = shipped_crouter()
MIB = 1 << 20
NEVER = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz", ".h5", ".msgpack"}


@pytest.fixture(scope="module")
def crouter():
    return load_crouter()


def python(code, *words, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)],
        capture_output=True, text=True, timeout=250, env=os.environ | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_sizes():
    weights = list(SHIPPED.rglob("*.safetensors"))
    assert sum(path.stat().st_size for path in weights) <= 32 * MIB
    large = {path.name: path.stat().st_size for path in SHIPPED.rglob("*") if path.stat().st_size >= 16 * MIB}
    assert large == {}


def test_weights_are_sharded_safetensors_in_bfloat16():
    index = json.loads((SHIPPED / "model.safetensors.index.json").read_text())
    shards = {path.name for path in SHIPPED.glob("*.safetensors")}
    assert shards == set(index["weight_map"].values()) and len(shards) > 1
    model = CRouterModel.from_pretrained(SHIPPED, dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_no_pickle_anywhere_in_the_package():
    files = [path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert [path for path in files if path.suffix in NEVER] == []
    for path in files:  # whatever it is called: a pickle, or a zip archive, which torch.save writes
        with path.open("rb") as file:
            assert file.read(4)[:2] not in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"), path


@pytest.mark.parametrize("name", ["configuration_crouter.py", "modeling_crouter.py"])
def test_the_copied_source_is_the_package_s(name):
    source, copy = PACKAGE / "crouter" / name, SHIPPED / name
    refresh = f"cp {source.relative_to(ROOT)} {copy.relative_to(ROOT)}"
    assert copy.read_bytes() == source.read_bytes(), f"the copy beside the weights is stale; refresh it: {refresh}"


LOAD = """
import sys, torch
if sys.argv[2] == "without":
    sys.modules["hf_crouter"] = None
from transformers import AutoModel
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float32).eval()
assert type(model).__name__ == "CRouterModel" and "hf_crouter." not in type(model).__module__
ids = torch.arange(100, 612)[None]
print(model.encode(ids).double().sum().item(), model(ids).reconstruction_nll.item())
"""


def test_autoload_with_and_without_the_package(tmp_path):
    model = AutoModel.from_pretrained(SHIPPED, dtype=torch.float32).eval()
    assert type(model) is CRouterModel
    ids = torch.arange(100, 612)[None]
    with torch.no_grad():
        expected = [model.encode(ids).double().sum().item(), model(ids).reconstruction_nll.item()]
    alone = python(LOAD, SHIPPED, "without", HF_MODULES_CACHE=str(tmp_path), HF_HUB_OFFLINE="1")
    assert [float(word) for word in alone.split()] == pytest.approx(expected, rel=1e-4)


def test_calibration_and_tokenizer_belong_to_it(crouter):
    model, tokenizer = crouter
    calibration = load_calibration()
    assert calibration.fingerprint == crouter_fingerprint(model, decoder=True)
    assert calibration.chunks >= 1000
    assert len(tokenizer) == model.config.vocab_size
    assert (model.config.chunk_length, model.config.num_latents) == (512, 8)


def test_projectors_fit_it(crouter):
    model, tokenizer = crouter
    folders = sorted((SHIPPED / "projectors").iterdir())
    assert [folder.name for folder in folders] == ["smollm2-135m"]
    config = Projector.load(folders[0]).config
    assert config.crouter_fingerprint == crouter_fingerprint(model)
    assert config.crouter_tokenizer == tokenizer_fingerprint(tokenizer)


@pytest.mark.host
def test_the_projector_fits_the_real_host(crouter, real_host):
    host, tokenizer = load_host(real_host)
    found = find_projector(crouter[0], host)
    assert found.config.host_tokenizer == tokenizer_fingerprint(tokenizer)
    experts = ExpertSet.load(expert_folder())
    assert own_gate(crouter[0], host) is None  # the general gate serves every host
    for made in (found.config, *(expert.config for expert in experts)):
        assert fit_of(made, HostInUse(host, tokenizer)) == "exact"
        assert made.host_architecture == host_architecture(host)
    with torch.no_grad():
        for weight in host.parameters():
            weight += 1e-3 * torch.randn_like(weight)
    for made in (found.config, *(expert.config for expert in experts)):
        assert fit_of(made, HostInUse(host, tokenizer)) == "twin"


def test_it_rebuilds_the_standard_library_and_not_noise(crouter):
    model, tokenizer = crouter
    split = json.loads((SHIPPED / "split.json").read_text())
    assert split["parts"]["stdlib"]["files"] > 0  # held out from its training as a whole
    length, pieces = model.config.chunk_length, []
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.glob("[a-z]*.py")):
        ids = tokenizer(path.read_text(encoding="utf-8"), verbose=False)["input_ids"]
        if len(ids) >= 2 * length:
            pieces.append(ids[length : 2 * length])
    assert len(pieces) >= 40
    chosen = torch.tensor([pieces[k * len(pieces) // 12] for k in range(12)])  # evenly spread, from a to z
    noise = torch.randint(model.config.vocab_size, (4, length), generator=torch.Generator().manual_seed(0))
    code = reconstruction_score(model, chosen, batch_size=4)
    random = reconstruction_score(model, noise, batch_size=4)
    print(f"TRA of code {code.accuracy:.4f}, of random ids {random.accuracy:.4f}")
    assert code.accuracy >= 0.9
    assert code.accuracy >= random.accuracy + 0.5
    assert float(code.chunk_reconstruction_nll.max()) < float(random.chunk_reconstruction_nll.min())


PATCHES = """
import logging, os, sys, warnings
import torch, transformers, accelerate, huggingface_hub, gguf, rich, safetensors.torch, tokenizers
import transformers.cache_utils, transformers.generation.utils, transformers.modeling_utils
import transformers.models.llama.modeling_llama, transformers.models.qwen2.modeling_qwen2

def classes():
    found = {}
    for module_name, module in list(sys.modules.items()):
        if module is None or module_name.split(".")[0] not in ("transformers", "torch", "accelerate"):
            continue
        for name, value in list(vars(module).items()):
            if isinstance(value, type) and value.__module__ == module_name:
                for attribute, content in list(vars(value).items()):
                    found[module_name, name, attribute] = content
            elif callable(value):
                found[module_name, name] = value
    return found

def settings():
    names = [None, *logging.root.manager.loggerDict]
    loggers = [logging.getLogger(name) for name in names]
    return {
        "handlers": {log.name: list(log.handlers) for log in loggers if log.handlers},
        "levels": {log.name: log.level for log in loggers if log.level},
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "dtype": torch.get_default_dtype(), "grad": torch.is_grad_enabled(),
        "matmul": torch.get_float32_matmul_precision(), "seed": torch.initial_seed(),
        "warnings": list(warnings.filters), "environment": dict(os.environ),
        "hooks": (sys.excepthook, sys.displayhook, sys.stdout, sys.stderr),
    }

before, were = classes(), settings()
import hf_crouter
after, are = classes(), settings()
changed = [key for key, value in before.items() if key not in after or after[key] is not value]
changed += [key for key in after if key not in before and len(key) == 3 and (key[0], key[1], "__module__") in before]
print("attributes", len(before), "changed", [key for key in changed if key[-1] != "_abc_impl"])
for name, value in were.items():
    assert are[name] == value, (name, value, are[name])
"""


def test_importing_it_changes_nothing_else():
    out = python(PATCHES).split(maxsplit=3)
    assert int(out[1]) > 10_000
    assert out[3].strip() == "[]"


def test_the_wheel_holds_the_checkpoint(tmp_path):
    pytest.importorskip("hatchling", reason="hatchling is not installed: pip install hatchling")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    files = [path for path in SHIPPED.parent.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert {str(path.relative_to(ROOT)) for path in files} <= names
    assert not [name for name in names if not name.startswith("hf_crouter")]
