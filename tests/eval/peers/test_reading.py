"""Against one masked pass; no press of kvpress is needed."""

import numpy as np
import pytest
import torch

from eval.peers import host as host_
from eval.peers import presses
from eval.peers.arms import ARMS
from eval.peers.attention import shortened
from eval.peers.presses import Wanted, prefill, ratio
from eval.peers.reading import answer, read_targets
from tests.eval.peers.tiny_peers import FAMILIES, LAYOUT, context_of, loss_of, make_host, make_model, make_rows, plain


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny products: several threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class KeepEnds:
    """A press like StreamingLLM, for where kvpress is not installed."""

    def __init__(self, ratio):
        self.ratio = ratio

    def score(self, attention, hidden, keys, values, weights, kwargs):
        kept = int(keys.shape[2] * (1 - self.ratio))
        scores = torch.zeros_like(keys[..., 0])
        scores[:, :, :4] = scores[:, :, keys.shape[2] - kept + 4 :] = 1
        return scores


def measured(host, rows, count, wanted):
    """Loss `[D]` of every arm, and its slots."""
    context = context_of(rows, count)
    target = torch.from_numpy(rows.ids[:, -LAYOUT.target :].astype(np.int64))
    read = torch.cat([context[:, -1:], target], 1)
    out = {}
    for short in host.shorten(context, wanted):
        cache = (short.cache, short.valid)
        told = read_targets(host.model, host.attention, cache, read, rows.lines, context.shape[1] - 1)
        out[short.name] = (told, short.slots)
    return out


@pytest.mark.parametrize("length", [5, 1540, 4612])
def test_ratio_keeps_exactly_the_budget(length):
    kept = range(1, length + 1)
    assert [int(length * (1 - ratio(length, k))) for k in kept] == list(kept)  # as presses that prune count
    assert [length - int(length * ratio(length, k, dropped=True)) for k in kept] == list(kept)  # as those that mask


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_cache_is_a_plain_pass(family):
    host, rows = make_host(family), make_rows()
    told, slots = measured(host, rows, 4, [Wanted(ARMS["full_peers"], 228, 4)])["full_peers"]
    expected = plain(make_model(family, "eager"), rows, 4)
    assert told.loss == pytest.approx(loss_of(expected, rows), abs=1e-4) and slots.tolist() == [228.0] * 3
    best = expected.argmax(-1) == rows.ids[:, -LAYOUT.target :]
    assert told.right.tolist() == best.sum(1).tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_press_drops_has_no_influence(family, monkeypatch):
    monkeypatch.setattr(presses, "press_class", lambda arm: KeepEnds)
    monkeypatch.setattr(presses, "options", lambda wanted: {})
    host, rows, kept = make_host(family), make_rows(), 108
    told, slots = measured(host, rows, 4, [Wanted(ARMS["streaming.at8"], kept, 4)])["streaming.at8"]
    assert slots.tolist() == [kept] * 3
    if family == "gemma3":  # its sliding layers keep all that they see, which one mask for all layers does not say
        return
    length = context_of(rows, 4).shape[1]
    mask = torch.ones(length + LAYOUT.target - 1, length + LAYOUT.target - 1, dtype=torch.bool).tril()
    mask[length - 1 :, 4 : length - (kept - 4)] = False
    expected = loss_of(plain(make_model(family, "sdpa"), rows, 4, mask), rows)
    assert told.loss == pytest.approx(expected, abs=1e-4)
    assert np.abs(expected - loss_of(plain(make_model(family, "sdpa"), rows, 4), rows)).min() > 1e-3  # would notice


def test_heads_that_keep_unequally_see_only_what_they_keep():
    """Keys and values that are not kept can be anything."""
    host, rows = make_host(), make_rows(2)
    context = context_of(rows, 2)
    whole, _ = prefill(host.model, context, [])
    torch.manual_seed(1)
    kept = [
        torch.rand(layer.keys.shape[:3]) < share for layer, share in zip(whole.layers, (0.2, 0.5, 0.9), strict=True)
    ]
    read = torch.cat([context[:, -1:], context[:, :9]], 1)
    lines = np.zeros((2, 9), np.int16)

    def loss(cache):
        short = shortened(cache, kept)
        assert sorted(short[1]) == [0, 1, 2]
        for index, keep in enumerate(kept):
            assert torch.equal(short[1][index].sum(-1), keep[..., :-1].sum(-1))
        return read_targets(host.model, host.attention, short, read, lines, context.shape[1] - 1).loss

    before = loss(whole)
    for layer, keep in zip(whole.layers, kept, strict=True):
        layer.keys = torch.where(keep[..., None], layer.keys, torch.full_like(layer.keys, 50.0))
        layer.values = torch.where(keep[..., None], layer.values, torch.full_like(layer.values, -1e4))
    assert np.array_equal(loss(whole), before)
    for layer, keep in zip(whole.layers, kept, strict=True):
        layer.values = torch.where(keep[..., None], layer.values + 0.1, layer.values)
    assert not np.allclose(loss(whole), before)


def test_rows_do_not_depend_on_each_other(monkeypatch):
    monkeypatch.setattr(presses, "press_class", lambda arm: KeepEnds)
    monkeypatch.setattr(presses, "options", lambda wanted: {})
    host, rows = make_host(), make_rows()
    wanted = [Wanted(ARMS["snapkv.at8"], 100, 4), Wanted(ARMS["full_peers"], 164, 4)]
    together = measured(host, rows, 2, wanted)
    for i in range(3):
        one = type(rows)(rows.ids[i : i + 1], rows.lines[i : i + 1], rows.names[i : i + 1], LAYOUT)
        for name, (told, _) in measured(host, one, 2, wanted).items():
            assert told.loss[0] == pytest.approx(together[name][0].loss[i], abs=1e-5)


def test_answers_are_greedy_and_stop():
    host, rows = make_host(), make_rows(1)
    context = context_of(rows, 2)
    plain_model, ids = make_model("qwen2", "sdpa"), context
    with torch.no_grad():
        for _ in range(6):
            ids = torch.cat([ids, plain_model(ids).logits[:, -1:].argmax(-1)], 1)
    expected = ids[0, context.shape[1] :].tolist()

    def generated(most, stop):
        short = next(iter(host.shorten(context, [Wanted(ARMS["full_peers"], context.shape[1], 4)])))
        last = int(context[0, -1])
        args = (host.model, host.attention, (short.cache, short.valid), last, context.shape[1] - 1)
        return answer(*args, most, stop)

    assert generated(6, ()) == expected
    assert generated(3, ()) == expected[:3]
    end = expected[2]
    assert generated(6, {end}) == expected[: expected.index(end)]


def test_hosts_with_sliding_windows_have_no_kvzip():
    assert make_host().can(ARMS["kvzip.at8"]) and not make_host("gemma3").can(ARMS["kvgrad.at8"])
    assert make_host("gemma3").can(ARMS["snapkv.at8"]) and host_.slides
