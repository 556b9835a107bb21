import pytest
import torch
from torch import nn


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """Far faster than many threads on matrices this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def quickly_compiled(monkeypatch):
    """Modules are compiled as far as their graphs, without the minutes that machine code takes."""
    compile = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: compile(self, backend="aot_eager", **options))
