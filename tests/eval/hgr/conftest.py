import pytest
import torch

from eval.hgr import passes

from .tiny_rows import COUNTS, make_block, make_gates, make_reader, make_rows


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny products: several threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="package")
def measured():
    reader, rows = make_reader(), make_rows()
    return reader, rows, passes.measure(reader, make_block(reader, rows), COUNTS, make_gates(), oracle=[0, 2])
