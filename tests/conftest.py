"""The real host for tests that carry the marker `host`, and what makes the whole suite quick on few cores."""

import os

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


HEAVY = ("test_readme.py", "test_examples.py", "test_package.py", "eval/routing", "cli", "training")  # these first
# memory stays with a process: to give hundreds of MB back to the system and fetch them again is a quarter of all time
MALLOC = "glibc.malloc.trim_threshold=4000000000:glibc.malloc.mmap_max=0"


def pytest_addoption(parser):
    parser.addoption("--one-of-each-kind", action="store_true",
                     help="with -m families: one family of each kind of cache, position and attention")  # fmt: skip


def pytest_configure(config):
    """What xdist's workers inherit, and the commands that tests start: one share of the cores each, no more."""
    workers = len(config.getoption("tx", None) or ())
    if workers:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // workers)))
        os.environ.setdefault("GLIBC_TUNABLES", MALLOC)


def _weight(item):
    """Heavy files come first, so that no worker is left with one at the end."""
    path = item.path.relative_to(item.config.rootpath / "tests").as_posix()
    return next((place for place, start in enumerate(HEAVY) if path.startswith(start)), len(HEAVY))


def pytest_collection_modifyitems(items):
    items.sort(key=_weight)
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
