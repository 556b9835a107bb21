import runpy

import pytest

from eval import run


@pytest.mark.parametrize(
    "module", ["eval.run", "eval.tables", "eval.plots", "eval.documents", "eval.gates", "eval.routing.data"]
)
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_a_module_that_is_a_command_runs(module, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [module, "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module(module, run_name="__main__")
    assert not stopped.value.code and f"usage: python -m {module} " in capsys.readouterr().out


@pytest.mark.parametrize("name", run.EXPERIMENTS)
def test_every_experiment_tells_its_arguments(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        run.main([name, "--help"])
    assert not stopped.value.code and f"usage: python -m eval.run {name} " in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        ["hgr", "report", "--data", "{}", "--save", "{}"],
        ["questions", "report", "--save", "{}", "--host", "{}"],
        ["questions", "prepare", "--save", "{}"],
        ["near-matches", "--data", "{}", "--host", "{}"],
        ["experts", "--host", "{}", "--experts", "{}", "--data", "odd"],
    ],
)
def test_bad_input_is_one_line_and_status_2(words, tmp_path, capsys):
    assert run.main([word.format(tmp_path) for word in words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"eval.run {words[0]}: error: ")
