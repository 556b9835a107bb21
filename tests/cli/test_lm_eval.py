import builtins
import functools
import importlib
import json
import logging
import sys
from pathlib import Path

import pytest

from hf_crouter.cli import lm_eval as command
from hf_crouter.cli.main import main
from hf_crouter.hosts import fetch

from ..trained_crouter import TEXT

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
{more}
metric_list:
  - metric: {metric}
"""
KINDS = {
    "tiny_choice": ("multiple_choice", "acc", 'doc_to_choice: ["yes", "no"]'),
    "tiny_rolling": ("loglikelihood_rolling", "bits_per_byte", ""),
    "tiny_generate": (
        "generate_until", "exact_match", "generation_kwargs: {do_sample: false, until: ['zz'], max_gen_toks: 6}",
    ),
}  # fmt: skip


@pytest.fixture
def installed():
    pytest.importorskip("lm_eval", reason='lm_eval is not installed: pip install -e ".[lm-eval]"')


@pytest.fixture
def tasks(tmp_path, installed, monkeypatch):
    """A folder of tasks: short and long prompts, in files beside them."""
    data = tmp_path / "data.jsonl"
    rows = [{"question": text, "answer": answer} for text, answer in (("a b", "yes"), (TEXT, "no"), (TEXT[9:], "no"))]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, (kind, metric, more) in KINDS.items():
        text = TASK.format(name=name, data=data, kind=kind, metric=metric, more=more)
        if kind == "loglikelihood_rolling":
            text = text.replace('doc_to_text: "{{question}}"', 'doc_to_text: ""').replace("{{answer}}", "{{question}}")
        (folder / f"{name}.yaml").write_text(text)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # neither the index of the harness's own tasks nor its bootstrap: ten seconds each
    own = functools.partial(importlib.import_module("lm_eval.tasks").TaskManager, include_defaults=False)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", own)
    monkeypatch.setattr("lm_eval.api.metrics.bootstrap_stderr", lambda *args: 0.0)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    yield folder
    logging.getLogger("lm_eval").handlers.clear()


def run(tasks, model_args, *more, names=KINDS):
    return main(["lm-eval", "--model_args", model_args, "--device", "cpu", "--include_path", str(tasks),
                 "--tasks", ",".join(names), *map(str, more)])  # fmt: skip


def results(folder):
    """Results, and the samples of every task, as the harness wrote them."""
    (path,) = folder.rglob("results_*.json")
    samples = {}
    for path_of_samples in folder.rglob("samples_*.jsonl"):
        name = next(name for name in KINDS if name in path_of_samples.name)
        samples[name] = [json.loads(line) for line in path_of_samples.read_text().splitlines()]
    return json.loads(path.read_text())["results"], samples


def test_the_harness_runs_with_its_own_options(pair, tasks, tmp_path, capsys):
    words = f"pretrained={pair[1]},crouter={pair[0]},window=16,soft_prompts=true,keep_first=4"
    more = ("--batch_size", 2, "--log_samples", "--output_path")
    assert run(tasks, words, "--apply_chat_template", *more, tmp_path / "ours") == 0
    assert "tiny_choice" in capsys.readouterr().out
    found, samples = results(tmp_path / "ours")
    assert set(found) == set(KINDS) and {name: len(rows) for name, rows in samples.items()} == dict.fromkeys(KINDS, 3)
    assert samples["tiny_generate"][0]["arguments"]["gen_args_0"]["arg_0"].startswith("<|end|>user a b")
    assert run(tasks, f"pretrained={pair[1]}", "--model", "hf", "--apply_chat_template", *more, tmp_path / "hf") == 0
    plain, others = results(tmp_path / "hf")
    assert others["tiny_choice"][0]["resps"] == samples["tiny_choice"][0]["resps"]  # short: nothing is compressed
    assert others["tiny_choice"][1]["resps"] != samples["tiny_choice"][1]["resps"]
    assert found["tiny_rolling"] != plain["tiny_rolling"]


def test_limit_and_no_crouter(pair, tasks, tmp_path):
    words = f"pretrained={pair[1]},crouter=none,window=16"
    options = ("--limit", 1, "--log_samples", "--output_path", tmp_path / "out")
    assert run(tasks, words, *options, names=["tiny_generate"]) == 0
    assert [len(rows) for rows in results(tmp_path / "out")[1].values()] == [1]


@pytest.mark.parametrize(
    ("more", "names", "text"),
    [(["--batch_size", "auto"], KINDS, "batch_size: expected a number, got auto"),
     ([], ["no_such_task"], "Tasks not found: no_such_task"),
     (["--limit", "1", "--samples", '{"tiny_choice": [0]}'], KINDS, "samples")],
)  # fmt: skip
def test_bad_words_are_one_line(pair, tasks, capsys, more, names, text):
    assert run(tasks, f"pretrained={pair[1]},crouter={pair[0]}", *more, names=names) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("hf-crouter: error: ") and text in line


def test_a_host_that_is_not_there_is_one_line(tasks, capsys):
    assert run(tasks, "pretrained=./nowhere") == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("hf-crouter: error: ./nowhere: ")


def test_words_of_the_process_are_put_back(tasks, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["mine"])
    main(["lm-eval", "--tasks", "no_such_task"])
    assert sys.argv == ["mine"]


def test_known_hosts_are_named_by_their_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(command, "fetch_host", lambda name: Path("/hosts") / name)
    name = fetch.list_hosts()[0]
    assert command.words([f"--model_args=window=2,pretrained={name}", "--tasks", "x"]) == [
        "run", "--model", "crouter", f"--model_args=window=2,pretrained=/hosts/{name}", "--tasks", "x",
    ]  # fmt: skip
    json_words = command.words(["run", "--model_args", f'{{"pretrained": "{name}"}}'])
    assert json_words[3:] == ["--model_args", f'{{"pretrained": "/hosts/{name}"}}']
    for other in (f"pretrained=org/{name}", f"pretrained={name}-2", f"tokenizer={name}", f"pretrained={name}/x"):
        assert command.words([other])[3] == other
    assert command.words(["ls", "tasks"]) == ["ls", "tasks"]


def test_without_the_harness_the_extra_is_named(monkeypatch, capsys):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.split(".")[0] == "lm_eval":
            raise ModuleNotFoundError("No module named 'lm_eval'", name="lm_eval")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    assert main(["lm-eval", "--tasks", "x"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "lm_eval is not installed" in err and "[lm-eval]" in err
