import json

import pytest

from hf_crouter.data.prepare import main, prepare
from hf_crouter.data.split import PARTS, Split
from hf_crouter.data.tokens import TokenArray
from hf_crouter.errors import InputError

from .samples import byte_tokenizer, sentences


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    for n in range(60):
        path = folder / ("rich" if n % 6 == 0 else "own") / f"m{n}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(sentences(n, 100))
    (folder / "own/copy.py").write_text(sentences(1, 100))
    return folder


def test_everything_is_written_and_fits_the_split(corpus, tmp_path):
    out = tmp_path / "out"
    paths = prepare([f"text-files:{corpus}"] * 2, byte_tokenizer(), out, progress=False)
    assert sorted(paths) == sorted([*PARTS, "split"])
    split = Split.load(paths["split"])
    for name in PARTS:
        tokens = TokenArray.load(paths[name])
        assert len(tokens.names) == split.parts[name].files
        assert len(tokens) == split.notes["tokens"][name]
        if name != "train":
            assert list(tokens.names) == split.held_out[name]
    assert split.parts["packages"].files == 10 and split.parts["stdlib"].files == 0
    assert split.notes["duplicates"]["ids"] == 61 and split.notes["duplicates"]["exact"] == 1
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in paths.values())


def test_the_command_reports_paths_and_refuses_in_one_line(corpus, tmp_path, capsys):
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    arguments = ["--corpus", f"text-files:{corpus}", "--tokenizer", str(tmp_path / "tokenizer")]
    assert main([*arguments, "--output", str(tmp_path / "out"), "--held-out", ""]) == 0
    assert "train\t" in capsys.readouterr().out
    assert json.loads((tmp_path / "out/split.json").read_text())["parts"]["packages"]["files"] == 0
    assert main(["--corpus", "nothing", *arguments[2:], "--output", str(tmp_path / "no")]) == 2
    assert "no corpus is called" in capsys.readouterr().err
    assert main([*arguments[:3], str(tmp_path), "--output", str(tmp_path / "no")]) == 2
    assert not (tmp_path / "no").exists()


def test_a_corpus_that_is_all_held_out_is_refused(corpus, tmp_path):
    with pytest.raises(InputError, match="no document is left"):
        prepare([f"text-files:{corpus}/rich"], byte_tokenizer(), tmp_path / "out", progress=False)
