"""What tests of fetching do to the pip of `conftest.py`, and what they look at afterwards."""

import hashlib

from hf_crouter.hosts import fetch


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def know(monkeypatch, host):
    monkeypatch.setattr(fetch, "KNOWN_HOSTS", {"tiny": host})


def kept(pip):
    """What is kept of a fetch that did not finish."""
    return sorted(path.name for path in pip["store"].iterdir()) if pip["store"].exists() else []


def fail(pip, number):
    """Lets pip fail at this part."""

    def before():
        pip["status"] = int(pip["asked"][-1] == f"tiny_host_part{number}")

    pip.update(before=before, output="ERROR: Connection refused")


def recover(pip):
    pip.update(status=0, before=lambda: None, asked=[], harm={})


def leftovers(pip):
    parent = pip["folder"].parent
    if not parent.exists():
        return []
    return [p.name for p in parent.iterdir() if p != pip["folder"] and p.name != ".partial"]


def cut(path):
    path.write_bytes(path.read_bytes()[:-10])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
