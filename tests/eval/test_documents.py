import gzip
import io
import json
import sysconfig
import zipfile
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from eval import documents, sources
from eval.documents import CAPS, LENGTH, SCORED, Windows, cut, repetition, row_grams
from hf_crouter.data.dedup import training_grams
from hf_crouter.data.documents import Document
from hf_crouter.data.split import Split, SplitRules
from hf_crouter.data.tokens import plain_tokenizer
from hf_crouter.errors import InputError

NAMES = ("argparse", "ast", "datetime", "decimal", "difflib", "doctest", "inspect", "pathlib", "pickle", "typing")


@pytest.fixture(scope="module")
def tokenizer():
    return plain_tokenizer(Tokenizer.from_file(str(documents._CHECKPOINT / "tokenizer.json")))


@pytest.fixture(scope="module")
def library():
    """Long files of the standard library, whose names have not moved between Python versions."""
    folder = Path(sysconfig.get_path("stdlib"))
    sources = {name: folder / f"{name}.py" for name in NAMES}
    texts = {name: path.read_text(encoding="utf-8") for name, path in sources.items() if path.is_file()}
    return [Document(f"{name}.py", "own", text) for name, text in texts.items() if len(text) > 45_000]


def words(seed, count=9_000):
    generator = np.random.default_rng(seed)
    return " ".join(f"w{n}" for n in generator.integers(0, 9_999, count))


def test_repetition_is_the_share_of_scored_grams_that_stand_in_the_past():
    row = np.arange(LENGTH, dtype=np.uint16)
    assert repetition(row) == 0
    row[-SCORED:] = row[:SCORED]
    assert repetition(row) == 1
    row[-SCORED // 2 :] = 50_000 + np.arange(SCORED // 2)
    assert repetition(row) == pytest.approx((SCORED // 2 - 12) / (SCORED - 12))
    row[:] = np.arange(LENGTH)
    row[-100:] = row[-200:-100]  # a repeat inside the scored tokens is none of the past
    assert repetition(row) == 0


def test_windows_are_pieces_of_their_files_and_the_same_in_every_run(library, tokenizer):
    first, again = (cut(order, tokenizer, cap=50, seed=3) for order in (library, library[::-1]))
    other = cut(library, tokenizer, cap=50, seed=4)
    assert first.records == again.records and np.array_equal(first.ids, again.ids)
    assert first.ids.shape == (len(first.records), LENGTH) and first.ids.dtype == np.uint16 and len(first.ids) > 3
    assert {r.name for r in first.records} & {r.name for r in other.records}
    assert not np.array_equal(first.ids, other.ids)
    texts = {f"own/{document.id}": document.text for document in library}
    for record, row in zip(first.records, first.ids, strict=True):
        assert tokenizer.decode(row[1:-1].tolist()) in texts[record.name]
        assert record.repetition == round(repetition(row), 4) and record.cluster == "own" and record.domain == "code"


def test_a_file_gives_the_same_window_whatever_stands_beside_it(library, tokenizer):
    alone = cut(library[:1], tokenizer, cap=50)
    together = cut(library, tokenizer, cap=50)
    at = [record.name for record in together.records].index(alone.records[0].name)
    assert np.array_equal(together.ids[at], alone.ids[0])


def test_short_repeated_and_surplus_files_are_dropped_and_counted(library, tokenizer):
    copied = [Document("copy.py", "own", library[0].text), Document("short.py", "own", "x = 1\n" * 40)]
    looped = Document("looped.py", "loop", "\n".join(f"name_{n % 50} = {n % 50}" for n in range(4_000)))
    windows = cut([*library, *copied, looped], tokenizer, cap=2)
    assert [record.cluster for record in windows.records] == ["own"] * 2
    assert windows.dropped["duplicate"] == 1 and windows.dropped["short"] == 1 and windows.dropped["repetition"] == 1
    assert windows.dropped["cap"] == len(library) - 2
    assert cut(library[:0], tokenizer, cap=2).ids.shape == (0, LENGTH)


def test_known_files_and_forbidden_windows_are_dropped(library, tokenizer):
    known = training_grams(library[:2], workers=1)
    windows = cut(library, tokenizer, cap=50, known=known)
    assert windows.dropped["seen"] == 2 and all((record.overlap or 0.0) <= 0.5 for record in windows.records)
    assert not {f"own/{document.id}" for document in library[:2]} & {record.name for record in windows.records}
    # two packages may hold files of one name: only the known one goes
    twins = cut([library[0], Document(library[0].id, "other", words(1))], tokenizer, cap=50, known=known)
    assert [record.cluster for record in twins.records] == ["other"]
    every = cut(library, tokenizer, cap=50)
    assert every.records[0].overlap is None
    left = cut(library, tokenizer, cap=50, forbidden=row_grams(every.ids[:3]))
    assert left.dropped["evaluation"] == 3 and len(left.ids) == len(every.ids) - 3


def test_few_long_records_of_prose_give_several_windows_without_overlap(tokenizer):
    records = [Document(f"tales/{n}", "tales", words(n, 30_000)) for n in range(2)]
    windows = cut(records, tokenizer, cap=6, prose=True)
    clusters = [record.cluster for record in windows.records]
    assert clusters == clusters[:2] * 3 and len(set(clusters)) == 2  # one window of each before a second one
    assert {record.domain for record in windows.records} == {"tales"}
    for cluster in ("tales/0", "tales/1"):
        names = [record.name for record in windows.records if record.cluster == cluster]
        assert names == [f"{cluster}#{n}" for n in range(3)]
        rows = [row for row, record in zip(windows.ids, windows.records, strict=True) if record.cluster == cluster]
        grams = [row_grams([row]) for row in rows]
        assert not np.intersect1d(grams[0], grams[1]).size and not np.intersect1d(grams[1], grams[2]).size
    many = [Document(f"notes/{n}", "notes", words(n)) for n in range(30)]
    assert all("#" not in record.name for record in cut(many, tokenizer, cap=30, prose=True).records)


def test_long_files_give_several_windows_after_every_file_gave_one(tokenizer):
    files = [Document(f"own/{n}.py", "own", words(n, count)) for n, count in enumerate((6_000, 1_500, 3_000))]
    windows = cut(files, tokenizer, cap=50, each=2)
    names = [record.name.removeprefix("own/own/") for record in windows.records]
    assert {record.cluster for record in windows.records} == {"own"}
    assert set(names[:3]) == {"0.py#0", "1.py", "2.py#0"} and set(names[3:]) == {"0.py#1", "2.py#1"}
    for name in ("0.py", "2.py"):
        first, second = (windows.ids[names.index(f"{name}#{k}")] for k in range(2))
        assert not np.intersect1d(row_grams([first]), row_grams([second])).size
    fewer = cut(files, tokenizer, cap=4, each=2)
    assert [record.name for record in fewer.records] == [record.name for record in windows.records[:4]]
    assert fewer.dropped["cap"] == 1
    alone = cut(files[2:], tokenizer, cap=50, each=2)
    assert np.array_equal(alone.ids, windows.ids[[names.index("2.py#0"), names.index("2.py#1")]])


def test_what_is_saved_is_what_is_loaded(library, tokenizer, tmp_path):
    windows = cut(library, tokenizer, cap=2)
    windows.save(tmp_path, "own", seed=0)
    loaded = Windows.load(tmp_path, "own")
    assert loaded.records == windows.records and loaded.dropped == windows.dropped
    assert np.array_equal(loaded.ids, windows.ids)
    about = json.loads((tmp_path / "own.json").read_text())
    about["documents"].pop()
    (tmp_path / "own.json").write_text(json.dumps(about))
    with pytest.raises(InputError, match="do not fit"):
        Windows.load(tmp_path, "own")


def test_the_lists_share_no_package_and_young_ones_are_young():
    lists = sources.package_lists()
    assert set(lists) == {"young", "files", "packages", "gate_code"} <= set(CAPS)
    assert all(requirement.count("==") == 1 for requirements in lists.values() for requirement in requirements)
    young = json.loads((sources._HERE / "young_packages.json").read_text())
    assert all(entry["first_upload"] >= "2025-01-01" for entry in young)
    held_out = {requirement.partition("==")[0] for requirement in lists["packages"]}
    assert held_out <= set(SplitRules().held_out_packages)


def test_a_package_of_two_sets_is_refused(tmp_path, monkeypatch):
    young = [{"package": "one", "version": "1", "first_upload": "2025-01-01"}]
    (tmp_path / "young_packages.json").write_text(json.dumps(young))
    (tmp_path / "gate_packages.json").write_text(json.dumps({"gate_code": ["one==2"], "files": [], "packages": []}))
    monkeypatch.setattr(sources, "_HERE", tmp_path)
    with pytest.raises(InputError, match="more than one set: one"):
        sources.package_lists()


def test_copies_of_other_packages_are_left_out():
    assert sources.no_copy(Document("own/main.py", "own", ""))
    assert sources.no_copy(Document("own/vendor.py", "own", ""))
    for folder in ("_vendor", "Vendor", "third_party"):
        assert not sources.no_copy(Document(f"own/{folder}/six.py", "own", ""))


def write_wheel(home, requirement, files):
    """Puts a wheel where `wheels:` finds it without a download."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, text in files.items():
            file.writestr(name, text)
    path = home / f"{requirement.replace('==', '-')}-py3-none-any.whl"
    path.write_bytes(buffer.getvalue())
    return path


def write_records(folder, name, records):
    zstandard = pytest.importorskip("zstandard")
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    (folder / name).write_bytes(zstandard.ZstdCompressor().compress(lines))


def test_the_command_keeps_gate_documents_away_from_measured_ones(library, tmp_path, monkeypatch, capsys):
    shared, own = library[0].text, library[1].text
    archives = {
        "fresh==1": write_wheel(tmp_path, "fresh==1", {"fresh/a.py": shared, "fresh/_vendor/b.py": own}),
        "older==1": write_wheel(tmp_path, "older==1", {"older/a.py": shared, "older/b.py": own}),
    }
    monkeypatch.setattr("hf_crouter.data.wheels.fetch_archive", archives.__getitem__)
    monkeypatch.setattr(documents, "package_lists", lambda: {"young": ["fresh==1"], "gate_code": ["older==1"]})
    monkeypatch.setattr(documents, "training_grams", lambda *_, **__: np.empty(0, dtype=np.uint64))
    monkeypatch.setattr(documents, "place", lambda seed, name: 7)  # the same offset in both copies
    assert documents.main(["--out", str(tmp_path / "out"), "--sets", "young", "gate_code"]) == 0
    young, gate = (Windows.load(tmp_path / "out", name) for name in ("young", "gate_code"))
    assert [record.name for record in young.records] == ["fresh/fresh/a.py"]
    assert [record.name for record in gate.records] == ["older/older/b.py"] and gate.dropped["evaluation"] == 1
    assert "| gate_code | 1 | 1 | 1 |" in capsys.readouterr().out


def test_files_are_those_that_the_split_lists_not_all_that_its_rule_would_deal_out(tmp_path, monkeypatch):
    split = Split.load(documents._CHECKPOINT / "split.json")
    name = split.held_out["files"][0]
    dealt = (f"{name.partition('/')[0]}/unlisted_{n}.py" for n in range(200))
    unlisted = next(other for other in dealt if split.rules.part(Document(other, "own", "")) == "files")
    wheel = write_wheel(tmp_path, "own==1", {name: words(0), unlisted: words(1), "own/trained.py": words(2)})
    monkeypatch.setattr("hf_crouter.data.wheels.fetch_archive", {"own==1": wheel}.__getitem__)
    monkeypatch.setattr(documents, "package_lists", lambda: {"files": ["own==1"]})
    assert documents.main(["--out", str(tmp_path), "--sets", "files"]) == 0
    assert {record.name.partition("#")[0] for record in Windows.load(tmp_path, "files").records} == {f"own/{name}"}


def test_prose_is_joined_and_comes_from_its_own_part(tokenizer, tmp_path):
    dialogue = [{"id": f"d{n}", "text": words(n, 600)} for n in range(40)]
    write_records(tmp_path / "dialogue_sgd", "heldout.jsonl.zst", dialogue)
    joined = list(sources.records_of(tmp_path, "dialogue_sgd", "heldout"))
    assert all(len(document.text) >= sources.JOINED for document in joined[:-1])
    assert "\n\n".join(document.text for document in joined) == "\n\n".join(record["text"] for record in dialogue)
    logs = [{"id": f"l{n}", "text": "x" * 9_000, "system": "ab"[n // 2]} for n in range(4)]
    write_records(tmp_path / "logs", "train.jsonl.zst", logs)
    assert [document.id for document in sources.records_of(tmp_path, "logs", "train")] == ["logs/l0", "logs/l2"]
    with pytest.raises(InputError, match="no heldout records of logs"):
        list(sources.records_of(tmp_path, "logs", "heldout"))


def test_leval_inputs_are_read_by_task(tmp_path):
    (tmp_path / "eval_leval").mkdir()
    for task in sources.LEVAL:
        with gzip.open(tmp_path / "eval_leval" / f"{task}.jsonl.gz", "wt") as file:
            file.write(json.dumps({"input": task}) + "\n")
    read = list(sources.leval_documents(tmp_path))
    assert [(document.group, document.text) for document in read] == [
        (f"leval_{task}", task) for task in sources.LEVAL
    ]
    (tmp_path / "eval_leval" / f"{sources.LEVAL[-1]}.jsonl.gz").unlink()
    with pytest.raises(InputError, match="no such file"):
        list(sources.leval_documents(tmp_path))


def test_prose_without_a_folder_is_refused(tmp_path, capsys):
    assert documents.main(["--out", str(tmp_path), "--sets", "prose"]) == 2
    assert "prose needs --data FOLDER" in capsys.readouterr().err
