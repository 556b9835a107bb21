import argparse
import json

import numpy as np
import pytest

from eval.reading import updates
from eval.reading.bench import PREFIX
from hf_crouter.errors import InputError

from ..tiny_world import make_rows, world
from .conftest import write_these


@pytest.mark.parametrize("form", updates.FORMS)
@pytest.mark.parametrize("count", [1, 5])
def test_the_answer_is_the_latest_value_and_nothing_of_it_stands_in_the_window(wide, form, count):
    hay = np.tile(wide.sets["young"].ids[0].astype(np.int64), 24)
    sample = updates.updated(wide, hay, 3000, count, form, np.random.default_rng(1))
    assert sample.ids.shape == (3000,) and len(sample.stale) == count - 1 and sample.answer not in sample.stale
    start, end = sample.records
    assert PREFIX <= start < end <= wide.compressed_end(3000)
    records, window = wide.text(sample.ids[start:end]), wide.text(sample.ids[wide.compressed_end(3000) :])
    asked = window[window.rindex("\n") + 1 :]  # how every update of the key begins
    values = [wide.text(ids).strip() for ids in (*sample.stale, sample.answer)]
    # in their order, the latest last, and each once
    places = [
        records.index(f"{asked} {value}" if f"{asked} {value}" in records else asked + value) for value in values
    ]
    assert places == sorted(places) and len(set(values)) == count == records.count(asked)
    assert not any(value in window for value in values)
    assert len(records.strip().splitlines()) == updates.KEYS * count


def test_a_prompt_that_is_too_short_is_refused(wide):
    hay = np.tile(wide.sets["young"].ids[0].astype(np.int64), 24)
    with pytest.raises(InputError, match="expected prompts that hold"):
        updates.updated(wide, hay, 600, 30, "log", np.random.default_rng(1))
    for count in (0, 901):
        with pytest.raises(InputError, match=f"updates: expected 1 to 900 of a key, got {count}"):
            updates.updated(wide, hay, 6000, count, "log", np.random.default_rng(1))


def test_all_prompts_are_made_before_any_is_read(wide, monkeypatch):
    monkeypatch.setattr(wide, "generate", lambda *args: pytest.fail("read"))
    with pytest.raises(InputError, match="expected prompts that hold"):
        updates.measured(wide, ["copy"], 1400, [1, 200], 2)


def test_latest_and_older_values_are_counted(wide, monkeypatch, tmp_path):
    """Of three prompts one is gone on with by the latest value, one by an older one, one by neither."""
    wide.save = tmp_path
    write_these(monkeypatch, wide, updates, "updated", lambda made: [made[0].answer, made[1].stale[1], (1,)])
    found = updates.measured(wide, ["copy"], 3000, [4], 3)
    assert found["u4.copy.new"] == found["u4.copy.old"] == pytest.approx(1 / 3)
    samples = [json.loads(line) for line in (tmp_path / "updates.jsonl").read_text().splitlines()]
    assert [(s["new"], s["old"], s["updates"]) for s in samples] == [(1, 0, 4), (0, 1, 4), (0, 0, 4)]
    assert [s["form"] for s in samples] == list(updates.FORMS)[:3]


def test_the_experiment(tmp_path, monkeypatch, reader):
    make_rows(reader.tokenizer, 3).save(tmp_path, "young", 0)
    monkeypatch.setenv("CROUTER_RESULTS", str(tmp_path))
    parser = argparse.ArgumentParser()
    updates.configure(parser)
    words = ["--data", str(tmp_path), "--host", world().host, "--length", "1600", "--samples", "2", "--updates", "2"]
    updates.run(parser.parse_args([*words, "--crouter", "none", "--arms", "window", "copy"]))
    result = json.loads((tmp_path / "updates-tiny-host.json").read_text())
    assert {"u2.window.new", "u2.copy.old.hi"} <= set(result["metrics"])
    assert result["config"] == {"length": 1600, "samples": 2, "window": 512, "keys": 4}
