"""The benchmark of compaction on a tiny host: what is timed is what is said, and every figure is there."""

import argparse
import json

import pytest
import torch

from eval.cost import compaction
from hf_crouter.types import Row
from tests.tiny import tiny_host


@pytest.fixture
def host():
    return tiny_host(positions=8192)


def ids(count):
    return torch.randint(5, 90, (count,), generator=torch.Generator().manual_seed(0))


def test_the_stand_in_keeps_as_many_pairs_and_others(host):
    caches = []
    for stand_in in (False, True):
        policy = compaction.policy_of(host, 16, 1024, stand_in)
        cache = compaction.CompressedDynamicCache(config=host.config)
        text = ids(2600)
        cache.start([Row(0, prompt=2600)], text[None], policy.key)
        compaction.pairs_by_reading(host, policy, cache, [policy.extend(Row(0, prompt=2600), text)], [text])
        caches.append(cache)
    chosen, first = (cache.layers[1].keys for cache in caches)
    assert chosen.shape == first.shape == (1, 2, 64, 8) and not torch.allclose(chosen, first)


def test_reading_again_reads_the_same(host):
    policy = compaction.policy_of(host, 16, 1024, False)
    assert compaction.read_pairs(host, policy, ids(2600))() == 4
    one = compaction.read_pairs(host, policy, ids(2600), 2600 - 512)
    assert one() == one() == 1


def test_all_figures(monkeypatch, tmp_path, host):
    monkeypatch.setattr(compaction, "load_host", lambda name, device, dtype: (host, None))
    monkeypatch.setenv("CROUTER_RESULTS", str(tmp_path))
    parser = argparse.ArgumentParser()
    compaction.configure(parser)
    words = ["--host", "tiny", "--lengths", "2048", "3072", "--read", "2600", "--steps", "3", "--turns", "1"]
    compaction.run(parser.parse_args(words))
    metrics = json.loads((tmp_path / "generation-cpu.json").read_text())["metrics"]
    assert {"compact.cost_ratio", "compact.decode_cost_ratio", "tiny.2k.b1.ttft_speedup"} <= set(metrics)
    assert {"tiny.3k.b1.compact_ttft_speedup", "tiny.3k.b1.kv_ratio", "tiny.3k.b1.decode_ms.full"} <= set(metrics)
    assert metrics["tiny.3k.b1.kv_ratio"] == pytest.approx(3072 / (4 + 4 * 64 + 3072 - 4 - 4 * 512), rel=0.01)
    slot = 2 * 2 * 2 * 8 * 4  # keys and values, layers, heads, size, bytes
    bound = slot * (4 * 64 + 2 * 2048 + 3072 - 4 * 512) / 2**30
    assert metrics["tiny.3k.b1.compact_bound_gib"] == pytest.approx(bound, rel=0.01)
