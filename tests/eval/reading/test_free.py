import argparse
import json
import math

import numpy as np
import pytest

from eval.reading import free

from ..tiny_world import make_rows, world
from .conftest import SHAPE


def test_names_are_looked_up_in_the_prompt():
    prompt = "def read_rows(path):\n    rowCount = 3\nand then Anna met Robert"
    assert free.exactness("read_rows(rowCount)", prompt) == 1.0
    assert free.exactness("read_rows(row_count) + read_rows", prompt) == 0.5, "each name once"
    assert free.exactness("_read_rows(rowCount)", prompt) == 0.5, "a leading underscore is part of the name"
    assert free.exactness("he saw Anna and Rupert there", prompt) == 0.5
    assert math.isnan(free.exactness("a + b < 3", prompt)) and math.isnan(free.exactness("The end", prompt))


def test_a_reading_is_held_against_the_same_without_copying(bench, monkeypatch):
    same = np.arange(40, 60)
    texts = {"window": same, "copy": np.tile(same[:4], 5), "retrieve2": same, "retrieve2_copy": same}
    monkeypatch.setattr(bench, "generate", lambda arm, ids, count: np.tile(texts[arm][:count], (len(ids), 1)))
    found = free.free(bench, SHAPE, list(texts), 3, 20)
    for name in ("young", "prose"):
        assert found[f"{name}.window.repetition"] == 0 and found[f"{name}.retrieve2_copy.repetition"] == 0
        assert (
            found[f"{name}.copy.repetition"] == found[f"{name}.copy.repetition.minus_plain"] == pytest.approx(14 / 18)
        )
        assert found[f"{name}.retrieve2_copy.repetition.minus_plain"] == 0
        assert f"{name}.window.repetition.minus_plain" not in found


def test_the_experiment(tmp_path, monkeypatch):
    tokenizer = world().reader().tokenizer
    for name in ("young", "prose"):
        make_rows(tokenizer, 2).save(tmp_path, name, 0)
    monkeypatch.setenv("CROUTER_RESULTS", str(tmp_path))
    parser = argparse.ArgumentParser()
    free.configure(parser)
    words = ["--data", str(tmp_path), "--host", world().host, "--crouter", "none", "--documents", "2", "--tokens", "4"]
    free.run(parser.parse_args([*words, "--arms", "window", "copy"]))
    result = json.loads((tmp_path / "free-tiny-host.json").read_text())
    assert {"young.window.repetition", "prose.copy.repetition.minus_plain.hi"} <= set(result["metrics"])
    assert result["config"]["tokens"] == 4
