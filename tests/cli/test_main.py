import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.utils import logging as transformers_logging

from hf_crouter.cli import console
from hf_crouter.cli.main import COMMANDS, main


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(name, capsys):
    module = importlib.import_module(f"hf_crouter.cli.{name.replace('-', '_')}")
    assert name == module.NAME
    assert main([name, "--help"]) == 0
    out = capsys.readouterr().out
    assert "example:\n  hf-crouter " + name in out


def test_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in COMMANDS)


@pytest.mark.parametrize("words", [[], ["nonsense"], ["compress"], ["host"], ["host", "get"], ["demo", "--nonsense"]])
def test_wrong_words_are_one_line(words, capsys):
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("hf-crouter: error: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [(KeyboardInterrupt(), 130, "interrupted"), (OSError(28, "No space left on device", "/x"), 2, "/x: No space"),
     (OSError("odd"), 2, "odd"), (ValueError("a bug"), None, "")],
)  # fmt: skip
def test_how_errors_end(error, status, text, capsys, monkeypatch):
    module = importlib.import_module("hf_crouter.cli.doctor")

    def stop(args):
        raise error

    monkeypatch.setattr(module, "run", stop)
    if status is None:
        with pytest.raises(ValueError, match="a bug"):  # a bug is not bad input: its traceback is wanted
            main(["doctor"])
        return
    assert main(["doctor"]) == status
    assert text in capsys.readouterr().err


def test_transformers_is_silenced_only_while_a_command_runs():
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    with console.quiet():
        assert transformers_logging.get_verbosity() == transformers_logging.ERROR
        assert not transformers_logging.is_progress_bar_enabled()
    assert (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()) == before


def test_a_table_in_a_pipe_is_aligned_text(capsys):
    columns = [console.Column("name", right=False), console.Column("n")]
    console.print_table(columns, [("a", "1"), ("bcdef", "200")])
    assert capsys.readouterr().out == "name     n\na        1\nbcdef  200\n"


def test_a_table_on_a_terminal_is_framed(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    console.print_table([console.Column("grade", right=False)], [("foreign",), ("[red]",)])
    out = capsys.readouterr().out
    assert "┃" in out and "foreign" in out and "[red]" in out


def test_json_has_no_nan():
    with pytest.raises(ValueError, match="JSON"):
        console.print_json({"x": float("nan")})


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 bytes"), (1023, "1,023 bytes"), (1536, "1.50 KiB"), (3 << 20, "3.00 MiB")]
)
def test_sizes(count, text):
    assert console.size(count) == text


def test_host_list_and_get(capsys, monkeypatch, tmp_path):
    module = importlib.import_module("hf_crouter.cli.host")
    monkeypatch.setattr(module, "cached_host", lambda name: None)
    assert main(["host", "list"]) == 0
    assert "smollm2-135m" in capsys.readouterr().out
    assert main(["host", "list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0] == {"name": "smollm2-135m", "path": None, "error": None}
    asked = []

    def fetch(name, **options):
        asked.append((name, options))
        return tmp_path

    monkeypatch.setattr(module, "fetch_host", fetch)
    assert main(["host", "get", "smollm2-135m", "--force", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"path": str(tmp_path)}
    assert asked == [("smollm2-135m", {"progress": False, "force": True})]


def test_host_get_refuses_an_unknown_name(capsys):
    assert main(["host", "get", "no-such-host"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow
def test_the_console_script_and_the_module(crouter, tmp_path):
    script = shutil.which("hf-crouter", path=str(Path(sys.executable).parent))
    assert script, "hf-crouter is not installed beside this Python"
    (tmp_path / "short").write_text("import json\n")
    words = ["compress", "short", "-o", "c.safetensors", "--crouter", str(crouter), "--json"]
    done = subprocess.run([script, *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    assert json.loads(done.stdout)["chunks"][0]["tokens"] > 0
    if Path("/dev/full").exists():
        with open("/dev/full", "w") as full:
            words = [script, "restore", "c.safetensors", "--crouter", str(crouter)]
            done = subprocess.run(words, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True)
        assert done.returncode == 2 and "No space left" in done.stderr and "Traceback" not in done.stderr
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "hf_crouter", "restore", str(tmp_path / "absent")],
        cwd=root, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"hf-crouter: error: {tmp_path / 'absent'}: No such file or directory\n"
