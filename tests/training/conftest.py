import pytest
import torch


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """Far faster than many threads on matrices this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
