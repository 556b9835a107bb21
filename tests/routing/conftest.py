import pytest

from .trained_experts import save_expert


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("experts")
    return {
        name: save_expert(base / name, seed=seed, trained=False) for seed, name in enumerate(("a", "b", "c.v-2_x"))
    }
