import numpy as np
import pytest

from eval.reading.bench import PREFIX
from eval.reading.passkeys import (
    QUESTIONS,
    RECORDS,
    STATEMENTS,
    make_sample,
    make_samples,
    records,
    retrieval,
    summary,
    verdict,
)
from tests.tiny import CHUNK


def test_wordings_ask_as_they_state():
    for task in STATEMENTS:
        assert len(STATEMENTS[task]) == len(QUESTIONS[task]) >= 6
        for statement, question in zip(STATEMENTS[task], QUESTIONS[task], strict=True):
            before = statement.split("{value}")[0].rstrip()
            assert question.endswith(before[before.index("{key}") :])
            assert statement.count("{key}") == statement.count("{value}") == 1


@pytest.mark.parametrize("task", ["passkey", "kv"])
def test_records_differ_and_some_nearly_match(task):
    for seed in range(20):
        found = records(task, np.random.default_rng(seed))
        keys, values = [key for key, _ in found], [value for _, value in found]
        assert len(found) == RECORDS[task][0] == len(set(keys)) == len(set(values))
        split = list if task == "passkey" else lambda key: key.split("-")
        near = sum(sum(a != b for a, b in zip(split(keys[0]), split(key), strict=True)) == 1 for key in keys[1:])
        assert near >= RECORDS[task][1]
        assert len({len(v.split("-")) for v in values}) == 1


@pytest.mark.parametrize("task", ["passkey", "kv", "passkey_paraphrased", "kv_paraphrased"])
def test_samples_have_what_they_claim(wide, task):
    length = 1500
    for sample in make_samples(wide, task, length, 6):
        assert sample.ids.shape == (length,)
        assert sample.compressed == PREFIX + CHUNK * ((length - 256 - PREFIX) // CHUNK)
        assert len(sample.spans) == 1 + len(sample.others) and 0 <= sample.depth < 1
        for (key, value), (start, end) in zip([(sample.key, sample.value), *sample.others], sample.spans, strict=True):
            assert start >= PREFIX and end <= sample.compressed
            text = wide.text(sample.ids[start:end])
            assert key in text and value in text
        assert wide.text(sample.ids[-200:]).count(sample.key) and sample.value not in wide.text(sample.ids[-200:])
        assert wide.text(sample.answer) == f" {sample.value}"
        assert sample.aligned or task.endswith("paraphrased")
        assert (sample.statement == sample.question) != task.endswith("paraphrased")


def test_depths_cover_the_compressed_part(wide):
    depths = [sample.depth for sample in make_samples(wide, "passkey", 2500, 40)]
    assert min(depths) < 0.25 and max(depths) > 0.7


def test_too_short_a_prompt_is_refused(wide):
    with pytest.raises(ValueError, match="too few"):
        make_sample(wide, "kv", wide.sets["young"].ids[0], 300, np.random.default_rng(0))


def test_verdicts(wide):
    sample = make_samples(wide, "passkey", 1500, 1)[0]
    others = [wide.encode(f" {value}") for _, value in sample.others]
    assert verdict(sample, [*sample.answer, 7], others) == "right"
    assert verdict(sample, others[1], others) == "distractor"
    assert verdict(sample, sample.answer[:-1], others) == "wrong"
    metrics = summary("kv.32k", "soft_retrieve2_copy", [sample] * 4, ["right", "wrong", "right", "distractor"], 0)
    assert metrics["kv.32k.accuracy"] == metrics["kv.32k.soft_retrieve2_copy.accuracy"] == 0.5
    assert metrics["kv.32k.soft_retrieve2_copy.distractor"] == 0.25
    assert metrics["kv.32k.accuracy.lo"] <= 0.5 <= metrics["kv.32k.accuracy.hi"]


def test_retrieval_runs(wide, tmp_path):
    wide.save = tmp_path
    metrics = retrieval(wide, "passkey", [1024], ["full", "window", "copy"], 2, {"window": 512})
    assert {"passkey.1k.full.accuracy", "passkey.1k.copy.accuracy"} <= metrics.keys()
    assert not any("window" in key for key in metrics)
    assert len((tmp_path / "passkey.jsonl").read_text().splitlines()) == 4
