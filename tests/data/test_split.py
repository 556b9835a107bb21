import json

import pytest

from hf_crouter.data.documents import Document
from hf_crouter.data.installed import STDLIB
from hf_crouter.data.split import PARTS, Split, SplitRules, ids_sha256, make_split
from hf_crouter.errors import InputError

from .samples import sentences


def document(name, group=None, seed=0, count=60):
    return Document(name, group or name.split("/")[0], sentences(seed, count))


@pytest.mark.parametrize(
    ("name", "group", "part"),
    [
        ("<stdlib>/json/decoder.py", STDLIB, "stdlib"),
        ("<stdlib>/rich/x.py", STDLIB, "stdlib"),
        ("rich/console.py", "rich", "packages"),
        ("pip/_vendor/rich/console.py", "pip", "packages"),
        ("pip/_vendor/Rich/console.py", "pip", "packages"),
        ("other/externals/joblib/a.py", "other", "packages"),
        ("other/_vendor/jinja2.py", "other", "packages"),
        ("src/x.py", "Jinja2", "packages"),
        ("jinja2.py", "jinja2", "packages"),
    ],
)
def test_what_is_held_out_whole(name, group, part):
    assert SplitRules().part(Document(name, group, "")) == part


def test_names_that_only_look_alike_are_not_held_out():
    assert SplitRules(files_share=0, calibration_share=0).part(Document("tqdm/rich.py", "tqdm", "")) == "train"
    assert SplitRules(files_share=0, calibration_share=0).part(Document("richer/a.py", "richer", "")) == "train"


def sample():
    texts = [document(f"pkg{n % 7}/m{n}.py", seed=n) for n in range(1500)]
    texts += [document(f"rich/m{n}.py", seed=5000 + n) for n in range(20)]
    texts += [document(f"<stdlib>/m{n}.py", STDLIB, seed=6000 + n) for n in range(20)]
    return texts


def test_shares_and_records():
    split, parts = make_split(sample())
    assert 45 <= len(parts["files"]) <= 110 and 3 <= len(parts["calibration"]) <= 35
    assert len(parts["packages"]) == len(parts["stdlib"]) == 20
    ids = [d.id for name in PARTS for d in parts[name]]
    assert len(ids) == len(set(ids)) == 1540
    for name in PARTS:
        record = split.parts[name]
        assert record.files == len(parts[name])
        assert record.characters == sum(len(d.text) for d in parts[name])
        assert record.ids_sha256 == ids_sha256([d.id for d in parts[name]])
    assert "train" not in split.held_out


def test_a_document_keeps_its_part_when_others_come():
    _, few = make_split(sample()[::2])
    _, all_of_them = make_split(sample())
    part = {d.id: name for name in PARTS for d in all_of_them[name]}
    assert all(part[d.id] == name for name in PARTS for d in few[name])


def test_held_out_documents_that_training_has_seen_are_dropped():
    train = [document(f"a/m{n}.py", seed=n) for n in range(3)]
    rules = SplitRules(files_share=0, calibration_share=0)
    copied = Document("rich/copied.py", "rich", train[0].text)
    partly = Document("rich/partly.py", "rich", train[0].text[: len(train[0].text) // 4] + " " + sentences(99, 60))
    split, parts = make_split([*train, copied, partly, document("rich/own.py", seed=50)], rules)
    assert [d.id for d in parts["packages"]] == ["rich/own.py", "rich/partly.py"]
    assert split.dropped["packages"] == ["rich/copied.py"] and split.parts["packages"].dropped == 1
    assert 0 < split.parts["packages"].overlap < 0.1


def test_saved_and_loaded(tmp_path):
    split, _ = make_split(sample()[:50])
    split.save(tmp_path / "split.json")
    assert Split.load(tmp_path / "split.json") == split
    assert [p.name for p in tmp_path.iterdir()] == ["split.json"]


def test_bad_files_are_refused(tmp_path):
    split, _ = make_split(sample()[-40:])
    path = tmp_path / "split.json"
    split.save(path)
    raw = json.loads(path.read_text())
    raw["held_out"]["packages"].pop()
    (tmp_path / "altered.json").write_text(json.dumps(raw))
    (tmp_path / "other.json").write_text("[1]")
    (tmp_path / "cut.json").write_text(path.read_text()[:100])
    for name, words in [
        ("altered", "altered"),
        ("other", "no split"),
        ("cut", "no split"),
        ("missing", "cannot read"),
    ]:
        with pytest.raises(InputError, match=words):
            Split.load(tmp_path / f"{name}.json")
