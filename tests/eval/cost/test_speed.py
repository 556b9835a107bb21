import json
import math

import pytest
import torch

from eval import run
from eval.cost import speed
from eval.cost.speed import most_rows
from hf_crouter.errors import InputError

from ...tiny import tiny_host

SMALL = ["--ways", "fast_", "fast_copy_", "compact_", "compact_copy_", "--first", "2048x2", "--decode", "2048x2",
         "--batch-length", "2048", "--most-rows", "5", "--batch-ways", "compact_copy_", "--million", "2048", "4096",
         "--steps", "6", "--turns", "1"]  # fmt: skip


class Words:
    """Token ids of words."""

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [5 + hash(word) % 900 for word in text.split()]}


@pytest.fixture
def measured(monkeypatch, tmp_path):
    host = tiny_host(positions=4096, vocab_size=1000)
    monkeypatch.setenv("CROUTER_RESULTS", str(tmp_path))
    monkeypatch.setattr(speed, "load_host", lambda name, device, dtype: (host, Words()))

    def measure(*words):
        assert run.main(["speed", "--host", "some/Tiny-Instruct", *SMALL, *words]) == 0
        result = json.loads((tmp_path / "speed-cpu.json").read_text())
        assert all(math.isfinite(value) for value in result["metrics"].values())
        return result["metrics"]

    return measure


def test_first_tokens_decoding_and_a_profile(measured, capsys):
    metrics = measured("--parts", "first", "decode", "profile")
    key = "tiny.2k.b2."
    for way in ("fast_", "fast_copy_", "compact_"):
        ratio = metrics[f"{key}full_ttft_seconds"] / metrics[f"{key}{way}ttft_seconds"]
        assert metrics[f"{key}{way}ttft_speedup"] == pytest.approx(ratio, rel=1e-3)
        assert metrics[f"{key}{way}decode_ms"] > 0 and metrics[f"{key}{way}decode_mean_ms"] > 0
        for part in ("prepare", "forward", "scores"):
            assert 0 < metrics[f"{key}{way}profile.{part}_ms"] < metrics[f"{key}{way}profile.step_ms"]
    assert metrics[f"{key}compact_kv_ratio"] == pytest.approx(2048 / (2 * 8 + 2048 - 2 * 512), rel=1e-3)
    share = 1 - metrics[f"{key}fast_decode_ms"] / metrics[f"{key}fast_copy_decode_ms"]
    assert metrics[f"{key}fast_copy_copy_share"] == pytest.approx(share, abs=1e-3)
    assert f"{key}fast_copy_copy_share" in capsys.readouterr().out


def test_the_largest_batch(measured, monkeypatch):
    rows = []
    plain = speed.Conversation.repeated

    def repeated(self, count):
        rows.append(count)
        if count > 3:
            raise torch.OutOfMemoryError
        return plain(self, count)

    monkeypatch.setattr(speed.Conversation, "repeated", repeated)
    metrics = measured("--parts", "batch")
    rates = [metrics[f"tiny.2k.b0.{way}tokens_per_second"] for way in ("full_", "compact_copy_")]
    assert metrics["tiny.2k.b0.compact_copy_throughput_ratio"] == pytest.approx(rates[1] / rates[0], rel=1e-3)
    assert metrics["tiny.2k.b0.full_largest"] == metrics["tiny.2k.b0.compact_copy_largest"] == 3


def test_static_caches(measured):
    metrics = measured("--parts", "static", "--static", "1500", "--ways", "fast_copy_", "compact_")
    for way in ("fast_copy_", "compact_"):
        assert metrics[f"tiny.1500.b1.{way}static_speedup"] > 0
        assert metrics[f"tiny.1500.b1.{way}static_graphs"] == 0  # on a CPU nothing is compiled


def test_long_prompts_under_a_limit(measured, capsys):
    metrics = measured("--parts", "million", "--limit-gib", "64")
    for length in (2048, 4096):
        seconds, cost = (metrics[f"tiny.million.{length}.compact_copy_{name}"] for name in ("seconds", "cost_us"))
        assert cost == pytest.approx(1e6 * seconds / length, rel=1e-3)
        assert 0 < metrics[f"tiny.million.{length}.compact_copy_peak_gib"] < 64
    assert run.main(["speed", "--host", "tiny", *SMALL, "--parts", "million", "--limit-gib", "0.01"]) == 2
    assert "expected a peak of at most 0.01 GiB" in capsys.readouterr().err


@pytest.mark.parametrize("fitting", [1, 7, 8, 9, 100, 3000])
def test_the_most_rows_are_found_to_a_sixteenth(fitting):
    asked = []

    def fits(rows):
        asked.append(rows)
        return rows <= fitting

    found = most_rows(fits, 2048)
    assert min(fitting, 2048) * 15 / 16 - 1 <= found <= min(fitting, 2048) and len(asked) < 20


def test_no_row_that_fits_is_said():
    with pytest.raises(InputError, match="expected at least one row"):
        most_rows(lambda rows: False, 64)
