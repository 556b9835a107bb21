import json
import re

import pytest

from eval import tables
from eval.results import FOLDER
from eval.tables import README, TABLES, main, render, rewrite
from hf_crouter.errors import InputError

TEXT = "Before\n<!-- table: tra-mini -->\nold\n<!-- end -->\nAfter <!-- a comment -->\n"


def write(folder, name, metrics):
    origin = {"command": f"python -m eval.run {name} --seed 3", "device": "a device", "date": "2026-01-02"}
    result = {"name": name, **origin, "metrics": metrics}
    (folder / f"{name}.json").write_text(json.dumps(result))


def test_the_readme_shows_what_was_measured(capsys):
    text = README.read_text(encoding="utf-8")
    assert sorted(re.findall(r"<!-- table: (\S+) -->", text)) == sorted(TABLES)
    assert main(["--check"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("name", TABLES)
def test_a_result_that_is_missing_is_a_row_that_says_so(name, tmp_path):
    lines = render(name, tmp_path).splitlines()
    assert lines[2].startswith("| not measured yet | ") and lines[2].count("|") == lines[0].count("|")
    assert lines[-1].startswith("Host: ") and f"`python -m eval.run {name}`" in lines[-1] and len(lines) == 5


@pytest.mark.parametrize("name", TABLES)
def test_host_device_and_command_are_named(name, tmp_path):
    write(tmp_path, name, {})
    last = render(name, tmp_path).splitlines()[-1]
    assert re.fullmatch(rf"Host: .+\. Device: a device\. Made by `python -m eval.run {name} --seed 3` \(.*\)\.", last)


def test_tra_mini(tmp_path):
    metrics = {"code.files.tra": 0.98724, "code.files.nll": 0.05734, "code.files.chunks": 2048.0}
    write(tmp_path, "tra-mini", {"params": 15968160.0, "train.seconds": 470.0, "train.tokens": 1e6, **metrics})
    lines = render("tra-mini", tmp_path).splitlines()
    assert lines[2] == "| held-out files | 98.72% | 0.057 | 2,048 |"
    assert lines[3] == "| held-out packages | – | – | – |" and len(lines[2:]) == 6 + 4
    assert lines[9] == "15,968,160 parameters; trained for 470 seconds on 1,000,000 tokens, MFU –."


def test_soft_mini(tmp_path):
    metrics = {}
    for part, chunks in (("packages", 10), ("packages", 2), ("files", 8)):
        key = f"{part}.n{chunks}"
        metrics |= {f"{key}.loss.{arm}": 1 + n / 10 for n, arm in enumerate(
            ("full", "soft", "shuffled", "recent_same_slots", "window"))}  # fmt: skip
        metrics |= {f"{key}.soft.hgr": 0.0314, f"{key}.soft.hgr.lo": -0.01, f"{key}.soft.hgr.hi": 0.057,
                    f"{key}.soft_minus_shuffled.hgr": -0.002, f"{key}.documents": 48.0}  # fmt: skip
    write(tmp_path, "soft-mini", metrics)
    rows = [line.strip("| ").split(" | ") for line in render("soft-mini", tmp_path).splitlines()[2:5]]
    assert [row[:2] for row in rows] == [
        ["held-out files", "8"],
        ["held-out packages", "2"],
        ["held-out packages", "10"],
    ]
    assert rows[0][2:] == ["1.4000", "1.3000", "1.1000", "1.2000", "1.0000", "3.1% [−1.0%, 5.7%]", "−0.2%", "48"]


def test_compress_cpu(tmp_path):
    metrics = {f"{length}.{arm}.seconds": 1.234 for length in ("32k", "512", "2k")
               for arm in ("encode", "residual", "prefill")}  # fmt: skip
    metrics |= {"2k.encode.ratio": 3.456, "crossover.encode.tokens": 1234.5}
    write(tmp_path, "compress-cpu", metrics)
    lines = render("compress-cpu", tmp_path).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:5]] == ["| 512", "| 2k", "| 32k"]
    assert lines[3] == "| 2k | 1.23 | 1.23 | 1.23 | 3.46x | – |"
    assert lines[6] == "Cheaper than prefill: encode from 1,234 tokens, encode with residual at no length."


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
     (TEXT.replace("<!-- end -->", "<!-- table: soft-mini -->\n<!-- end -->"), "expected <!-- end")],
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
    assert tables.FOLDER == FOLDER and list(FOLDER.glob("*.json"))
    for path in FOLDER.glob("*.json"):
        text = path.read_text(encoding="utf-8")
        result = json.loads(text, parse_constant=pytest.fail)
        assert list(result) == ["name", "command", "commit", "date", "device", "versions", "seed", "config", "metrics",
                                "notes"]  # fmt: skip
        assert result["name"] == path.stem and result["command"].startswith("python -m eval.run ")
        assert all(isinstance(value, int | float) for value in result["metrics"].values())
        assert not re.search(r"(^|[ \"=])(/|~/|\.\w)", result["command"]), result["command"]
