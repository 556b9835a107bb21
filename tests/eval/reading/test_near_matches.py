import argparse
import json

import numpy as np
import pytest

from eval.reading import near_matches
from eval.reading.bench import PREFIX
from hf_crouter.errors import InputError

from ..tiny_world import make_rows, world
from .conftest import write_these


def test_near_matches_have_a_stale_record(wide):
    hay = np.tile(wide.sets["young"].ids[0].astype(np.int64), 12)
    for form in near_matches.FORMS:
        sample = near_matches.near_match(wide, hay, 1400, form, np.random.default_rng(1))
        assert sample.ids.shape == (1400,) and sample.answer != sample.stale
        start, end = sample.record
        assert start >= PREFIX and end <= wide.compressed_end(1400)
        old, new = wide.text(sample.stale).strip(), wide.text(sample.answer).strip()
        assert old in wide.text(sample.ids[start:end])
        text, window = wide.text(sample.ids), wide.text(sample.ids[wide.compressed_end(1400) :])
        assert new in window and old not in window
        # what is asked for is how the old record goes on, and no record in the window but the corrected one
        beginning = text[text.rindex("\n") + 1 :]
        assert f"{beginning}{old}" in text or f"{beginning} {old}" in text
        others = [city for city in near_matches.CITIES if city in window and city != new]
        assert not others
    with pytest.raises(ValueError, match="too few for the records"):
        near_matches.near_match(wide, hay, 300, "csv", np.random.default_rng(0))


def test_new_and_old_values_are_counted(wide, monkeypatch, tmp_path):
    """Of three prompts one is gone on with by the new value, one by the old one, one by neither."""
    wide.save = tmp_path
    write_these(monkeypatch, wide, near_matches, "near_match", lambda made: [made[0].answer, made[1].stale, (1,)])
    found = near_matches.near_matches(wide, ["copy"], 1400, 3)
    assert found["copy.new"] == found["copy.old"] == pytest.approx(1 / 3)
    assert set(found) == {f"copy.{which}{end}" for which in ("new", "old") for end in ("", ".lo", ".hi")}
    samples = [json.loads(line) for line in (tmp_path / "near_matches.jsonl").read_text().splitlines()]
    assert [(s["new"], s["old"], s["form"]) for s in samples] == [(1, 0, "json"), (0, 1, "csv"), (0, 0, "key")]


def test_the_experiment(tmp_path, monkeypatch, capsys, reader):
    make_rows(reader.tokenizer, 3).save(tmp_path, "young", 0)
    monkeypatch.setenv("CROUTER_RESULTS", str(tmp_path))
    parser = argparse.ArgumentParser()
    near_matches.configure(parser)
    words = ["--data", str(tmp_path), "--host", world().host, "--length", "1600", "--samples", "2"]
    near_matches.run(parser.parse_args([*words, "--crouter", "none", "--arms", "window", "copy", "copy_fitted"]))
    assert "copy_fitted: left out, expected a gate" in capsys.readouterr().out
    result = json.loads((tmp_path / "near-matches-tiny-host.json").read_text())
    assert {"window.new", "copy.old.hi"} <= set(result["metrics"])
    assert not any(key.startswith("copy_fitted") for key in result["metrics"])
    assert result["config"] == {"length": 1600, "samples": 2, "window": 512}
    about = json.loads((tmp_path / "young.json").read_text())
    (tmp_path / "young.json").write_text(json.dumps({**about, "tokenizer": "other"}))
    with pytest.raises(InputError, match="young: expected rows of tokenizer"):
        near_matches.run(parser.parse_args([*words, "--crouter", "none"]))
