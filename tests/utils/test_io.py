import errno
import json
import os

import pytest

from hf_crouter.errors import InputError
from hf_crouter.utils.io import replaced_file, replaced_folder, write_json


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def fill(folder, text):
    (folder / "a").write_text(text)


@pytest.mark.parametrize("before", [False, True])
def test_a_folder_is_replaced_whole(tmp_path, before):
    target = tmp_path / "parent" / "made"
    if before:
        target.mkdir(parents=True)
        (target / "old").write_text("old")
    with replaced_folder(target) as folder:
        fill(folder, "new")
        assert names(target) == ["old"] if before else not target.exists()
    assert names(target) == ["a"] and names(target.parent) == ["made"]
    assert target.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [RuntimeError("half way"), KeyboardInterrupt()])
def test_a_failing_block_leaves_the_old_folder(tmp_path, error):
    with replaced_folder(tmp_path / "made") as folder:
        fill(folder, "old")
    with pytest.raises(type(error)), replaced_folder(tmp_path / "made") as folder:
        fill(folder, "new")
        raise error
    assert (tmp_path / "made/a").read_text() == "old" and names(tmp_path) == ["made"]


def test_a_failing_rename_leaves_the_old_folder(tmp_path, monkeypatch):
    with replaced_folder(tmp_path / "made") as folder:
        fill(folder, "old")
    rename, calls = os.rename, []

    def second_fails(self, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError(errno.EIO, "no luck")
        rename(self, target)
        return target

    monkeypatch.setattr(type(tmp_path), "rename", second_fails)
    with pytest.raises(OSError, match="no luck"), replaced_folder(tmp_path / "made") as folder:
        fill(folder, "new")
    assert len(calls) == 3 and (tmp_path / "made/a").read_text() == "old" and names(tmp_path) == ["made"]


def test_a_full_disk_is_one_line(tmp_path):
    for writer in (replaced_folder, replaced_file):
        with pytest.raises(InputError, match="the disk is full"), writer(tmp_path / "made"):
            raise OSError(errno.ENOSPC, "No space left on device")
    assert names(tmp_path) == []


def test_json_is_written_atomically(tmp_path):
    write_json(tmp_path / "a.json", {"key": "ä"})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"key": object()})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"key": "ä"}
    assert names(tmp_path) == ["a.json"]
