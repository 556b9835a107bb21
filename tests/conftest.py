"""The real host, for tests that carry the marker `host`; they are skipped where it is absent."""

import pytest

from hf_crouter.errors import InputError
from hf_crouter.hosts.fetch import cached_host

HOST = "smollm2-135m"


def _host_folder():
    try:
        folder = cached_host(HOST)
    except InputError as error:
        return None, str(error)
    return folder, f"the real host is not here: hf-crouter host get {HOST}"


def pytest_collection_modifyitems(items):
    marked = [item for item in items if item.get_closest_marker("host")]
    if not marked:
        return
    folder, reason = _host_folder()
    if folder is None:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def real_host():
    """Folder of SmolLM2-135M-Instruct; the test is skipped where it was not fetched."""
    folder, reason = _host_folder()
    if folder is None:
        pytest.skip(reason)
    return folder
