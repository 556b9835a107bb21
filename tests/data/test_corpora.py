import gzip
import itertools
import json
import sys
import zipfile

import pytest

import hf_crouter.utils.pip_download
from hf_crouter.data import installed
from hf_crouter.data.corpora import load_corpus
from hf_crouter.data.documents import decode_source
from hf_crouter.errors import InputError

CODE = "def f(x):\n    return x + 1\n" * 20


def load(spec):
    return list(load_corpus(spec))


def test_installed_python_reads_packages_and_the_standard_library(tmp_path, monkeypatch):
    site = tmp_path / "site-packages"
    for name in ("demo/core.py", "demo/__pycache__/core.py", "lm_eval/tasks.py", "hf_crouter/x.py", "single.py"):
        path = site / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(CODE)
    (site / "demo/short.py").write_text("x = 1\n")
    (site / "demo/latin.py").write_bytes(CODE.encode() + b"# \xe9\n")
    monkeypatch.setattr(installed, "package_folders", lambda: [site])
    documents = load("installed-python")
    ids = [d.id for d in documents if d.group != installed.STDLIB]
    assert ids == ["demo/core.py", "single.py"]
    assert {d.group for d in documents} == {"demo", "single", installed.STDLIB}
    library = {d.id: d.text for d in documents if d.group == installed.STDLIB}
    assert "class JSONDecoder" in library["<stdlib>/json/decoder.py"]
    assert not any("site-packages" in name or "dist-packages" in name for name in library)


def test_package_folders_hold_the_running_interpreters_own(monkeypatch, tmp_path):
    folder = tmp_path / "dist-packages"
    folder.mkdir()
    monkeypatch.setattr(sys, "path", [*sys.path, str(folder)])
    folders = installed.package_folders()
    assert folder in folders and len(folders) == len(set(folders))


def test_large_families_are_capped_the_same_way_every_time(tmp_path, monkeypatch):
    site = tmp_path / "site-packages"
    (site / "big").mkdir(parents=True)
    for number in range(40):
        (site / "big" / f"m{number}.py").write_text(CODE + f"# {number:03d}\n")
    monkeypatch.setattr(installed, "package_folders", lambda: [site])
    monkeypatch.setattr(installed, "FAMILY_CAP", 10 * (len(CODE) + 6))
    first = [d.id for d in load("installed-python") if d.group == "big"]
    assert len(first) == 10 and first == sorted(first)
    assert first != [f"big/m{n}.py" for n in range(10)]
    assert first == [d.id for d in load("installed-python") if d.group == "big"]


def test_text_files_from_files_folders_globs_and_json_lines(tmp_path):
    (tmp_path / "docs/.git").mkdir(parents=True)
    (tmp_path / "docs/a.md").write_text("alpha")
    (tmp_path / "docs/.git/config.txt").write_text("hidden")
    (tmp_path / "docs/image.png").write_bytes(b"\x89PNG")
    (tmp_path / "docs/binary.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "odd.xyz").write_text("named outright")
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as file:
        file.write(
            json.dumps({"text": "one", "id": "first", "group": "g"}) + "\n" + json.dumps({"text": "two"}) + "\n"
        )
    documents = load(f"text-files:{tmp_path}/docs,{tmp_path}/odd.xyz,{tmp_path}/*.jsonl.gz")
    assert [(d.id, d.text) for d in documents] == [
        ("docs/a.md", "alpha"),
        ("odd.xyz", "named outright"),
        ("rows.jsonl.gz/first", "one"),
        ("rows.jsonl.gz/00000001", "two"),
    ]
    assert documents[0].group == "docs" and documents[2].group == "g"


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("nothing", "no corpus is called 'nothing'"),
        ("text-files:", "needs paths"),
        ("text-files:missing.txt", "no such file or folder"),
        ("text-files:missing/*.txt", "no file matches"),
        ("installed-python:all", "takes no argument"),
        ("wheels:", "needs package names"),
        ("wheels:--index-url", "expected the name of a package"),
    ],
)
def test_bad_specs_are_one_clear_line(spec, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_CROUTER_HOME", str(tmp_path))
    with pytest.raises(InputError, match=words) as error:
        load(spec)
    assert "\n" not in str(error.value)


def test_a_named_file_must_be_text(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(InputError, match="UTF-8"):
        load(f"text-files:{tmp_path}/x.txt")
    (tmp_path / "x.jsonl").write_text('{"body": 1}\n')
    with pytest.raises(InputError, match="line 1"):
        load(f"text-files:{tmp_path}/x.jsonl")


def test_source_is_decoded_strictly():
    assert decode_source(CODE.replace("\n", "\r\n").encode()) == CODE
    assert decode_source(b"x" * 10) is None and decode_source(b"x" * 400_001) is None
    assert decode_source(b"\0" * 300) is None and decode_source(b"\xff" * 300) is None


@pytest.fixture
def pip(tmp_path, monkeypatch):
    """A pip that serves what a test put in `files`, or fails with `output`."""
    calls = []
    state = {"files": {}, "output": "", "calls": calls}

    def run(command, folder, poll):
        calls.append(command)
        requirement = command[-1]
        if requirement not in state["files"] or (
            "--only-binary" in command and requirement in state.get("sdists", ())
        ):
            return 1, state["output"] or "ERROR: No matching distribution found for " + requirement
        name, members = state["files"][requirement]
        with zipfile.ZipFile(folder / name, "w") as wheel:
            for member, text in members.items():
                wheel.writestr(member, text)
        return 0, ""

    monkeypatch.setattr(hf_crouter.utils.pip_download, "run_pip", run)
    monkeypatch.setenv("HF_CROUTER_HOME", str(tmp_path / "home"))
    return state


def test_wheels_are_read_without_being_unpacked(pip, tmp_path):
    members = {"demo/core.py": CODE, "../../evil.py": CODE + "#", "demo-1.0.dist-info/METADATA": "Name: demo"}
    pip["files"]["demo==1.0"] = ("demo-1.0-py3-none-any.whl", members)
    pip["files"]["old_one"] = ("old_one-2.0.zip", {"x/y.py": CODE})
    pip["sdists"] = ["old_one"]
    documents = load("wheels:demo==1.0,old_one")
    assert [(d.id, d.group) for d in documents] == [
        ("../../evil.py", "demo"), ("demo/core.py", "demo"), ("x/y.py", "old-one"),
    ]  # fmt: skip
    assert not list(tmp_path.rglob("evil.py"))
    count = len(pip["calls"])
    assert load("wheels:demo==1.0,old_one") == documents and len(pip["calls"]) == count  # cached
    assert not [p for p in (tmp_path / "home/wheels").iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("No module named pip", "has no pip"),
        ("Retrying after connection broken by 'NewConnectionError'", "index cannot be reached"),
        ("OSError: [Errno 28] No space left on device", "disk is full"),
        ("ERROR: something else", "pip says: ERROR: something else"),
        ("ERROR: No matching distribution found for demo", "no such distribution"),
    ],
)
def test_pip_failures_are_one_clear_line(pip, tmp_path, output, words):
    pip["output"] = output
    with pytest.raises(InputError, match=words):
        load("wheels:demo")
    assert not list((tmp_path / "home/wheels").iterdir())


def write_rows(folder, rows):
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_hub_data_sets_from_a_local_folder_of_the_same_layout(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows = [{"repo_name": f"a/b{n % 2}", "path": f"f{n}.py", "content": f"text {n}"} for n in range(5)]
    write_rows(tmp_path, rows)
    spec = f"hub:{tmp_path},field=content,group=repo_name,id=path,limit=3"
    assert [(d.id, d.group, d.text) for d in load(spec)] == [
        ("a/b0/f0.py", "a/b0", "text 0"),
        ("a/b1/f1.py", "a/b1", "text 1"),
        ("a/b0/f2.py", "a/b0", "text 2"),
    ]
    with pytest.raises(InputError, match="no text in the field 'text'; its columns are content, path, repo_name"):
        load(f"hub:{tmp_path}")
    with pytest.raises(InputError, match="cannot open the data set"):
        load(f"hub:{tmp_path},split=absent")
    with pytest.raises(InputError, match="limit must be a positive number"):
        load(f"hub:{tmp_path},limit=-1")


def test_wikitext_lines_become_articles():
    module = pytest.importorskip("hf_crouter.data.hub", exc_type=InputError)
    lines = ["", " = One = \n", "a\n", " = = Part = = \n", "b\n", " = Two = \n", "c\n"]
    corpus = module.parse("wikitext")
    texts = [d.text for d in module._articles(corpus, [{"text": line} for line in lines])]
    assert texts == [" = One = \na\n = = Part = = \nb\n", " = Two = \nc\n"]
    assert module.parse("codeparrot/codeparrot-clean").field == "content"


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.delitem(sys.modules, "hf_crouter.data.hub", raising=False)
    with pytest.raises(InputError, match=r"hf_crouter\[train\]"):
        list(itertools.islice(load_corpus("hub:anything"), 1))


@pytest.mark.parametrize("requirement", ["lm_eval", "lm-eval==0.4.13", "LM.Eval[hf]"])
def test_wheels_refuse_what_holds_benchmarks(requirement):
    with pytest.raises(InputError, match="evaluation data"):
        list(load_corpus(f"wheels:six,{requirement}"))
