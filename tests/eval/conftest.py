import pytest
import torch

from .tiny_world import make_rows, world


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny products: several threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="package")
def reader():
    return world().reader()


@pytest.fixture(scope="package")
def rows(reader):
    return make_rows(reader.tokenizer, 3)
