import runpy

import pytest


@pytest.mark.parametrize("module", ["eval.run", "eval.tables", "eval.plots", "eval.documents", "eval.routing.data"])
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_a_module_that_is_a_command_runs(module, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [module, "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module(module, run_name="__main__")
    assert not stopped.value.code and f"usage: python -m {module} " in capsys.readouterr().out
