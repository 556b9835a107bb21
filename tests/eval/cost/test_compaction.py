import json
import math
from dataclasses import replace

import pytest
import torch

from eval import run
from eval.cost import compaction
from eval.cost.compaction import FirstPairs, reading
from eval.cost.timing import in_turns
from hf_crouter import Compact, CompressedHistory
from hf_crouter.types import LayerRead
from hf_crouter.utils.progress import Progress

from ...tiny import tiny_host

SMALL = ["--read", "1024", "--history", "1024", "--turns", "1"]


@pytest.fixture
def host():
    return tiny_host(positions=2048, vocab_size=50_000)


def ids(count):
    return torch.randint(5, 90, (count,), generator=torch.Generator().manual_seed(0))


def layer_read(slots, chunks):
    keys, values, queries = torch.randn(3, 1, 2, slots, 8)
    return LayerRead(1, keys, values, queries, 0.3, None, None, chunks, ())


def test_the_stand_in_keeps_as_many_pairs_and_asks_nothing():
    stand_in = FirstPairs((8, 5), 64)
    read = layer_read(60, ((10, 30), (30, 33)))
    pairs, observed = stand_in.compress(read, None)
    assert observed is None
    assert pairs.counts == (5, 3)
    slots = [10, 11, 12, 13, 14, 30, 31, 32]
    assert torch.equal(pairs.keys, read.keys[:, :, slots]) and torch.equal(pairs.values, read.values[:, :, slots])
    assert pairs.places.tolist() == [[[0, 1, 2, 3, 4, 0, 1, 2]] * 2]


def test_what_is_timed_reads_the_chunks_that_were_not_known(host):
    history = CompressedHistory(host, modes=[Compact(16)], window=512, keep_first=4)
    text, policy = ids(4 + 3 * 512 + 512), history.policy
    whole, one = reading(host, policy, text), reading(host, policy, text, len(text) - 512)
    rows = [whole()(), one()(), one()()]
    for row in rows:
        assert [chunk.end for chunk in row.chunks] == [516, 1028, 1540]
        assert all(chunk.entries is not None and len(chunk.entries) == 16 for chunk in row.chunks)
    # what was known stays: of the second only the last chunk was read, each time
    assert [a.entries is b.entries for a, b in zip(rows[1].chunks, rows[2].chunks, strict=True)] == [True, True, False]


def test_every_turn_reads_over_the_same_past(host):
    slots = []

    class Noted(FirstPairs):
        def compress(self, read, observed):
            if read.chunks:
                slots.append(read.keys.shape[2])
            return super().compress(read, observed)

    history = CompressedHistory(host, modes=[Compact(16)], window=512, keep_first=4)
    one = reading(host, replace(history.policy, compressor=Noted((16, 16), 2048)), ids(4 + 3 * 512 + 512), 1540)
    slots.clear()
    one()(), one()(), one()()
    assert slots == [4 + 2 * 16 + 512 + 512] * 6  # prefix, pairs, chunk and window in two layers, three times


def test_the_ways_take_turns_and_the_first_is_not_timed():
    calls = []

    def way(name):
        def ready():
            calls.append(f"ready {name}")
            return lambda: calls.append(name)

        return ready

    times, _ = in_turns({"a": way("a"), "b": way("b")}, 2, Progress(enabled=False))
    assert calls == ["ready a", "a", "ready b", "b"] * 3 and {len(some) for some in times.values()} == {2}


def test_every_figure_is_written(host, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("CROUTER_RESULTS", str(tmp_path))
    monkeypatch.setattr(compaction, "load_host", lambda name, device, dtype: (host, None))
    assert run.main(["compaction", "--host", "some/Tiny-Instruct", *SMALL]) == 0
    result = json.loads((tmp_path / "compaction-cpu.json").read_text())
    metrics, shown = result["metrics"], capsys.readouterr().out
    for key in ("compact.read_ms", "compact.plain_ms", "compact.decode_read_ms"):
        assert metrics[key] > 0
    assert metrics["compact.cost_ratio"] == pytest.approx(metrics["compact.ms"] / metrics["compact.read_ms"], rel=1e-3)
    assert "compact.decode_cost_ratio" in metrics
    assert all(key in shown for key in metrics) and all(math.isfinite(value) for value in metrics.values())
