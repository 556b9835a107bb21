import json
import re

import pytest

from eval.results import FOLDER
from eval.tables.readme import README, TABLES, main, render, rewrite
from hf_crouter.errors import InputError

from .results import write

TEXT = "Before\n<!-- table: tra-mini -->\nold\n<!-- end -->\nAfter <!-- a comment -->\n"


def test_the_readme_shows_what_was_measured(capsys):
    text = README.read_text(encoding="utf-8")
    assert sorted(re.findall(r"<!-- table: (\S+) -->", text)) == sorted(TABLES)
    assert main(["--check"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("name", TABLES)
def test_a_result_that_is_missing_is_a_row_that_says_so(name, tmp_path):
    lines = render(name, tmp_path).splitlines()
    assert lines[2].startswith("| not measured yet | ") and lines[2].count("|") == lines[0].count("|")
    assert lines[-1].startswith("Host: ") and len(lines) == 5
    assert f"`python -m eval.run {TABLES[name].experiment or TABLES[name].result}`" in lines[-1]


@pytest.mark.parametrize("name", TABLES)
def test_host_device_and_command_are_named(name, tmp_path):
    results = TABLES[name].result.split()
    for result in results:
        write(tmp_path, result, {})
    last = render(name, tmp_path).splitlines()[-1]
    made = ", ".join(rf"`python -m eval.run {result} --seed 3` \(.*\)" for result in results)
    assert re.fullmatch(rf"Host: .+\. Device: a device\. Made by {made}\.", last)


def test_only_what_stands_between_the_markers_changes(tmp_path, capsys):
    file = tmp_path / "README.md"
    file.write_text(TEXT)
    words = [str(file), "--results", str(tmp_path)]
    assert main([*words, "--check"]) == 1 and file.read_text() == TEXT
    assert capsys.readouterr().err == "README.md: table tra-mini is stale; run python -m eval.tables\n"
    assert main(words) == 0
    fresh = file.read_text()
    assert fresh.startswith("Before\n<!-- table: tra-mini -->\n\n| text |")
    assert fresh.endswith("\n\n<!-- end -->\nAfter <!-- a comment -->\n") and "old" not in fresh
    assert main([*words, "--check"]) == 0
    write(tmp_path, "tra-mini", {"random.tra": 0.5})
    assert main([*words, "--check"]) == 1
    assert main(words) == 0 and "50.00%" in file.read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "tra-mini.json"]


@pytest.mark.parametrize(
    ("text", "match"),
    [(TEXT.replace("tra-mini", "nothing"), "no table is called nothing"),
     (TEXT.replace("end", "stop"), "expected <!-- end"),
     (TEXT.replace("<!-- end -->", "<!-- table: demo -->\n<!-- end -->"), "expected <!-- end")],
)  # fmt: skip
def test_wrong_markers_are_refused(text, match, tmp_path, capsys):
    with pytest.raises(InputError, match=match):
        rewrite(text, tmp_path)
    (tmp_path / "x.md").write_text(text)
    assert main([str(tmp_path / "x.md")]) == 2 and capsys.readouterr().err.count("\n") == 1


def test_a_damaged_result_is_refused(tmp_path, capsys):
    (tmp_path / "tra-mini.json").write_text("{}")
    (tmp_path / "x.md").write_text(TEXT)
    assert main([str(tmp_path / "x.md"), "--results", str(tmp_path)]) == 2
    assert "expected a result of eval.run" in capsys.readouterr().err
    assert main([str(tmp_path / "none.md")]) == 2


def test_every_result_has_the_one_format_and_no_path_of_a_machine():
    assert list(FOLDER.glob("*.json"))
    for path in FOLDER.glob("*.json"):
        text = path.read_text(encoding="utf-8")
        result = json.loads(text, parse_constant=pytest.fail)
        assert list(result) == ["name", "command", "commit", "date", "device", "versions", "seed", "config", "metrics",
                                "notes"]  # fmt: skip
        assert result["name"] == path.stem and result["command"].startswith("python -m eval.run ")
        assert all(isinstance(value, int | float) for value in result["metrics"].values())
        assert not re.search(r"(^|[ \"=])(/|~/|\.\w)", result["command"]), result["command"]
