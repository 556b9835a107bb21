import argparse
import json
import urllib.request

import pytest
from transformers import PreTrainedTokenizerFast

from tests.tiny import tiny_host
from tests.trained_crouter import make_tokenizer

for name in ("lm_eval", "nltk", "wonderwords"):
    pytest.importorskip(name, reason=f'{name} is not installed: pip install -e ".[lm-eval]"')

from eval.questions import ruler  # noqa: E402
from eval.questions.ruler import (  # noqa: E402
    configure,
    load_tasks,
    means,
    ruler_folder,
    run,
    scores,
    write_documents,
)

LENGTH = 1024


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm-eval") / "tiny-host"
    tokenizer: PreTrainedTokenizerFast = make_tokenizer()
    made = tiny_host(vocab_size=len(tokenizer), positions=LENGTH)
    made.config.eos_token_id = made.generation_config.eos_token_id = tokenizer.eos_token_id
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def offline(monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("something is fetched")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr("nltk.download", refuse)


@pytest.fixture
def measure(host, tmp_path, monkeypatch):
    monkeypatch.setitem(ruler.LENGTHS, "1k", LENGTH)

    def measured(*words):
        monkeypatch.setenv("CROUTER_RESULTS", str(tmp_path))
        parser = argparse.ArgumentParser()
        configure(parser)
        run(parser.parse_args(["--host", host, "--crouter", "none", "--lengths", "1k", "--limit", "2",
                               "--window", "64", "--tasks", "ruler_fwe", *words]))  # fmt: skip

    measured.metrics = lambda: json.loads((tmp_path / "ruler-tiny-host.json").read_text())["metrics"]
    return measured


@pytest.mark.slow
def test_every_arm_has_scores_errors_and_slots(measure, offline):
    arms = ("full", "window", "retrieve2", "retrieve2_copy")
    measure("--arms", *arms)
    metrics = measure.metrics()
    for arm in arms:
        key = f"ruler_fwe.1k.{arm}.accuracy"
        assert 0 <= metrics[key] <= 1 and f"{key}.se" in metrics
    full, window, *retrieve = (metrics[f"slots.1k.{arm}"] for arm in arms)
    assert window < retrieve[0] == retrieve[1] <= full < LENGTH


def test_what_was_measured_is_written_though_an_arm_fails(measure, monkeypatch, capsys):
    monkeypatch.setattr("hf_crouter.integrations.lm_eval.CompressedHFLM.__init__", lambda *args, **options: 1 / 0)
    with pytest.raises(RuntimeError, match="window"):
        measure("--arms", "window", "full")
    metrics = measure.metrics()
    assert {key for key in metrics if not key.startswith("mean")} == {
        "ruler_fwe.1k.full.accuracy", "ruler_fwe.1k.full.accuracy.se", "slots.1k.full"
    }  # fmt: skip
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_documents_fit_and_do_not_depend_on_the_other_tasks(host, offline):
    from lm_eval.tasks import TaskManager
    from transformers import AutoTokenizer

    names = ["niah_multikey_3", "ruler_fwe"]  # RULER never ends on others: their least text is too long in characters
    loaded = load_tasks(
        TaskManager(include_path=ruler_folder(), include_defaults=False), names, host, LENGTH, 3, seed=5
    )
    tokenizer = AutoTokenizer.from_pretrained(host)
    for name in names:
        documents = list(loaded[name].dataset["test"])
        assert documents == write_documents(name, host, LENGTH, 3, seed=5) and len(documents) == 3
        for document in documents:
            prompt = f"{document['input']} {document['gen_prefix']}"
            assert len(tokenizer(prompt).input_ids) < LENGTH and document["max_length"] == LENGTH
    assert write_documents(names[0], host, LENGTH, 1, seed=6)[0] not in list(loaded[names[0]].dataset["test"])


def test_scores():
    assert scores("a", [0.0, 1.0]) == {"a": 0.5, "a.se": pytest.approx(0.5)}
    assert scores("a", [1.0]) == {"a": 1.0}


def test_means_are_over_tasks_that_the_full_host_does():
    metrics = {"niah_single_1.4k.full.accuracy": 0.9, "ruler_vt.4k.full.accuracy": 0.3,
               "ruler_cwe.4k.full.accuracy": 0.1, "niah_single_1.4k.window.accuracy": 0.2,
               "ruler_vt.4k.window.accuracy": 0.4,
               "ruler_cwe.4k.window.accuracy": 1.0, "niah_single_1.4k.compact32_retrieve2.accuracy": 1.0,
               "niah_single_1.8k.full.accuracy": 0.1}  # fmt: skip
    assert means(metrics) == {
        "mean.4k.full.accuracy": pytest.approx(0.6), "mean.4k.window.accuracy": pytest.approx(0.3), "mean.4k.tasks": 2
    }  # of one arm a task is missing; at 8k the full host does none  # fmt: skip
