import gzip
import io
import json
import re
import sysconfig
import zipfile
from pathlib import Path

import numpy as np
import pytest

from eval import documents, sources
from eval.documents import CAPS, EVALUATION, corpus, cut, shape_of, table
from eval.repositories import distance
from eval.rows import Record, Rows, Shape, breaks_lines, in_turns, line_numbers, repetition, row_grams
from hf_crouter.chunking import tokenizer_fingerprint
from hf_crouter.data.dedup import training_grams
from hf_crouter.data.documents import Document
from hf_crouter.data.split import Split, SplitRules
from hf_crouter.data.tokens import TokenArray
from hf_crouter.errors import InputError

from ..trained_crouter import make_tokenizer
from .tiny_world import world

LENGTH = Shape().length
NAMES = ("argparse", "ast", "datetime", "decimal", "difflib", "doctest", "inspect", "pathlib", "pickle", "typing")


@pytest.fixture(scope="module")
def tokenizer(library):
    return make_tokenizer(6000, "".join(document.text for document in library))


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


def test_windows_are_pieces_of_their_files_and_the_same_in_every_run(library, tokenizer):
    first, again = (cut(order, tokenizer, cap=50, seed=3) for order in (library, library[::-1]))
    other = cut(library, tokenizer, cap=50, seed=4)
    assert first.records == again.records and np.array_equal(first.ids, again.ids)
    assert first.ids.shape == (len(first.records), LENGTH) and first.ids.dtype == np.uint32 and len(first.ids) > 3
    assert first.shape == Shape() and first.tokenizer == tokenizer_fingerprint(tokenizer)
    assert {r.name for r in first.records} & {r.name for r in other.records}
    assert not np.array_equal(first.ids, other.ids)
    texts = {f"own/{document.id}": document.text for document in library}
    for record, row in zip(first.records, first.ids, strict=True):
        assert tokenizer.decode(row[1:-1].tolist()) in texts[record.name]
        assert record.repetition == round(repetition(row, 512), 4)
        assert record.cluster == "own" and record.domain == "code"
    breaks = breaks_lines(tokenizer)
    assert [line_numbers(row[-512:], breaks).tolist() for row in first.ids] == first.lines.tolist()
    assert first.lines.shape == (len(first.ids), 512) and first.lines.max() > 10
    assert in_turns(first.records, 3) == list(range(len(first.records)))


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
        assert sorted(names) == [f"{cluster}#{n}" for n in range(3)]
        rows = [row for row, record in zip(windows.ids, windows.records, strict=True) if record.cluster == cluster]
        grams = [row_grams([row]) for row in rows]
        assert not any(np.intersect1d(grams[a], grams[b]).size for a, b in ((0, 1), (0, 2), (1, 2)))
    many = [Document(f"notes/{n}", "notes", words(n, 2_000)) for n in range(30)]
    assert all("#" not in record.name for record in cut(many, tokenizer, cap=30, prose=True).records)


def test_long_files_give_several_windows_after_every_file_gave_one(tokenizer):
    files = [Document(f"own/{n}.py", "own", words(n, count)) for n, count in enumerate((6_000, 1_500, 3_000))]
    windows = cut(files, tokenizer, cap=50, each=2)
    names = [record.name.removeprefix("own/own/") for record in windows.records]
    assert {record.cluster for record in windows.records} == {"own"}
    assert set(names) == {"0.py#0", "1.py", "2.py#0", "0.py#1", "2.py#1"}
    for name in ("0.py", "2.py"):
        first, second = (windows.ids[names.index(f"{name}#{k}")] for k in range(2))
        assert not np.intersect1d(row_grams([first]), row_grams([second])).size
    fewer = cut(files, tokenizer, cap=4, each=2)
    left = {record.name.removeprefix("own/own/") for record in fewer.records}
    assert len(left) == 4 and {"0.py#0", "1.py", "2.py#0"} < left and fewer.dropped["cap"] == 1
    alone = cut(files[2:], tokenizer, cap=50, each=2)
    for record, row in zip(alone.records, alone.ids, strict=True):
        assert np.array_equal(row, windows.ids[names.index(record.name.removeprefix("own/own/"))])


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
    assert documents.main(["--out", str(tmp_path / "out"), "--sets", "young", "gate_code",
                           "--host", world().host]) == 0  # fmt: skip
    young, gate = (Rows.load(tmp_path / "out", name) for name in ("young", "gate_code"))
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
    assert documents.main(["--out", str(tmp_path), "--sets", "files", "--host", world().host]) == 0
    assert {record.name.partition("#")[0] for record in Rows.load(tmp_path, "files").records} == {f"own/{name}"}


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
    assert documents.main(["--out", str(tmp_path), "--sets", "prose", "--host", world().host]) == 2
    assert "prose needs --data FOLDER" in capsys.readouterr().err


REPOSITORY = Shape(prefix=4, chunk=256, chunks=32, window=128, target=128)


def files_of(package, count, size=200):
    """Files of a package in three folders, each of other words."""
    seed = sum(map(ord, package))
    return [Document(f"{package}/{'abc'[n % 3]}/{n}.py", package, words(97 * n + seed, size)) for n in range(count)]


def titles(tokenizer, row):
    """The paths whose titles stand in a row, in order; its text."""
    text = tokenizer.decode(row.tolist())
    return re.findall(r"^# (\S+\.py)$", text, re.MULTILINE), text


def test_distance_between_folders():
    assert distance("a/b/x.py", "a/b/y.py") == 0 and distance("a/b/x.py", "a/x.py") == 1
    assert distance("a/b/x.py", "a/c/x.py") == 2 and distance("a/x.py", "b/c/x.py") == 3


def test_a_file_of_a_repository_stands_behind_the_others_with_the_nearest_last(tokenizer):
    files = files_of("one", 15) + files_of("two", 15)
    rows = cut(files, tokenizer, cap=4, seed=2, shape=REPOSITORY, repository=True)
    again = cut(files[::-1], tokenizer, cap=4, seed=2, shape=REPOSITORY, repository=True)
    assert np.array_equal(rows.ids, again.ids) and rows.records == again.records
    assert rows.ids.shape == (8, REPOSITORY.length) and rows.shape == REPOSITORY
    texts = {document.id: document.text for document in files}
    for record, row in zip(rows.records, rows.ids, strict=True):
        target, (found, text) = record.name.partition("/")[2], titles(tokenizer, row)
        assert found[-1] == target and found.count(target) == 1  # never in its own context
        assert {path.partition("/")[0] for path in found} == {record.cluster}
        parts = re.split(r"^# \S+\.py\n", text, flags=re.MULTILINE)
        for path, part in zip(found[:-1], parts[1:-1], strict=True):
            assert part == f"{texts[path]}\n\n"  # whole files
        assert texts[target].startswith(parts[-1]) and len(tokenizer.encode(parts[-1])) >= 256 - 20
        apart = [distance(path, target) for path in found[:-1]]
        assert apart == sorted(apart, reverse=True) and apart[-1] == 0 < apart[0]
        # where the row begins, a file is cut at its beginning
        near = {path for path in texts if path.split("/")[:2] == target.split("/")[:2]}
        assert near <= {*found} or len(found) == 1 or any(texts[path].endswith(parts[0].strip()) for path in near)


def test_the_targets_of_a_repository_end_anywhere_in_their_file(tokenizer):
    rows = cut(files_of("one", 15), tokenizer, cap=15, shape=REPOSITORY, repository=True)
    sizes = {len(titles(tokenizer, row)[1].rpartition(".py\n")[2]) for row in rows.ids}
    assert len(sizes) > 5


def test_small_packages_and_short_files_of_repositories_are_counted(tokenizer):
    short = [Document(f"one/a/short{n}.py", "one", "x = 1\n" * 5) for n in range(3)]
    files = files_of("one", 15) + short + files_of("tiny", 2)
    rows = cut(files, tokenizer, cap=50, shape=REPOSITORY, repository=True)
    assert {record.cluster for record in rows.records} == {"one"} and len(rows.ids) == 15
    assert rows.dropped["short"] == 3 and rows.dropped["small package"] == 2
    few = cut(files, tokenizer, cap=2, shape=REPOSITORY, repository=True)
    assert len(few.ids) == 2 and few.dropped["cap"] == 13


def test_a_copy_of_the_file_elsewhere_in_its_package_would_tell_it(tokenizer):
    files = files_of("one", 15)
    copy = Document("one/a/copy.py", "one", files[3].text)
    rows = cut([*files, copy], tokenizer, cap=50, shape=REPOSITORY, repository=True)
    names = {record.name for record in rows.records}
    assert rows.dropped["duplicate"] == 1 == rows.dropped["repetition"] and len(names) == 14
    assert not {f"one/{files[3].id}", "one/one/a/copy.py"} & names


def test_shapes_of_sets():
    assert shape_of("young") == shape_of("gate_code") == Shape() and shape_of("repo").chunks == 40
    assert shape_of("gate_repo", 16) == Shape(chunks=16) and shape_of("prose", 16) == Shape()
    assert {name for name in CAPS if not name.startswith("gate_")} == set(EVALUATION)


def test_repositories_are_the_young_packages_and_those_of_gates_are_kept_apart(tmp_path, monkeypatch):
    archives = {f"{name}==1": write_wheel(tmp_path, f"{name}==1", {d.id: d.text for d in files_of(name, 12, 400)})
                for name in ("fresh", "older")}  # fmt: skip
    monkeypatch.setattr("hf_crouter.data.wheels.fetch_archive", archives.__getitem__)
    monkeypatch.setattr(documents, "package_lists", lambda: {"young": ["fresh==1"], "gate_code": ["older==1"]})
    asked = []
    monkeypatch.setattr(documents, "training_grams", lambda *_, **__: asked.append(1) or np.empty(0, dtype=np.uint64))
    words = ["--out", str(tmp_path / "out"), "--sets", "repo", "gate_repo", "--host", world().host, "--chunks", "4"]
    assert documents.main([*words, "--corpus", str(tmp_path / "corpus")]) == 0
    known = tokenizer_fingerprint(make_tokenizer(300))
    repo, gate = (Rows.load(tmp_path / "out", name, known) for name in ("repo", "gate_repo"))
    assert asked == [1]  # what crouters were trained on is not among the young
    assert repo.shape.chunks == gate.shape.chunks == 4
    assert {r.cluster for r in repo.records} == {"fresh"} and {r.cluster for r in gate.records} == {"older"}
    assert all(record.overlap == 0 for record in gate.records) and len(repo.ids) == 4 and len(gate.ids) == 2
    learnt = TokenArray.load(tmp_path / "corpus" / "train.safetensors")  # of gate sets alone
    assert learnt.names == tuple(record.name for record in gate.records) and set(learnt.groups) == {"older"}


def test_sets_of_other_tokens_are_no_guard(tmp_path, tokenizer):
    other = Rows(np.zeros((1, LENGTH), np.uint32), np.zeros((1, 512), np.int16), [Record("a", "a", "code", 0.0)],
                 Shape(), "another", {})  # fmt: skip
    other.save(tmp_path, "young", 0)
    with pytest.raises(InputError, match="young: expected rows of tokenizer"):
        documents.build("gate_code", tmp_path, None, 0, tokenizer)


def test_a_corpus_of_rows_has_no_separator_inside(tokenizer, tmp_path):
    files = [Document(f"{p}/{n}.py", p, words(n + 7 * ord(p), 1_500)) for p in "ab" for n in range(2)]
    sets = [cut(files[:2], tokenizer, cap=9), cut(files[2:], tokenizer, cap=9)]
    found = corpus(sets, tokenizer)
    found.save(tmp_path / "train.safetensors")
    loaded = TokenArray.load(tmp_path / "train.safetensors")
    read = list(loaded.documents())
    rows = [row for one in sets for row in one.ids]
    records = [record for one in sets for record in one.records]
    assert loaded.separator_id == tokenizer.eos_token_id and loaded.vocab_size == len(tokenizer)
    assert [(name, group) for name, group, _ in read] == [(r.name, r.cluster) for r in records] and len(read) == 4
    assert all(np.array_equal(ids, row) for (*_, ids), row in zip(read, rows, strict=True))
    assert (loaded.ids == loaded.separator_id).sum() == 4
    sets[0].ids[0, 5] = tokenizer.eos_token_id
    with pytest.raises(InputError, match="expected a separator that no row holds"):
        corpus(sets, tokenizer)
    with pytest.raises(InputError, match="expected rows of gate sets, got none"):
        corpus([], tokenizer)


def test_the_table_counts_lines_and_clusters(tokenizer):
    files = [Document(f"own/{n}.py", "own", words(n, 1_500).replace(" ", "\n")) for n in range(2)]
    rows = cut(files, tokenizer, cap=1)
    lines = int(rows.lines.max(1).sum()) + 1
    assert table({"young": rows}).splitlines()[2] == f"| young | 1 | 1 | 1 | {lines} | 0.000 | cap 1 |"
