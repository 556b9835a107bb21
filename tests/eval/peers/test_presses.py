"""With kvpress 0.5.5, and HQQ for the quantised cache; in an environment of their own."""

import importlib.util
import sys

import numpy as np
import pytest
import torch
from transformers import DynamicCache, QuantizedCache

from eval.peers import attention as attention_
from eval.peers.arms import ARMS
from eval.peers.attention import install, shortened
from eval.peers.measure import DocumentResults, measure_block
from eval.peers.presses import Wanted, Words, kvpress_module, options, prefill, press_class, ratio, repeated
from eval.peers.quantised import bytes_a_token, quantised
from eval.peers.reading import read_targets
from tests.eval.peers.tiny_peers import FAMILIES, Tokenizer, context_of, make_host, make_model, make_rows

kvpress = pytest.mark.skipif(importlib.util.find_spec("kvpress") is None, reason="kvpress is not installed")
hqq = pytest.mark.skipif(importlib.util.find_spec("hqq") is None, reason="hqq is not installed")
RANKING = ("snapkv.at8", "expected_attention.at8", "streaming.at8")
REPEATING = ("kvzip", "kvgrad", "kvzip_plus")


def held(layer):
    """Keys of a layer as sets, by row and head."""
    return [[{tuple(key) for key in head.tolist()} for head in row] for row in layer.keys]


@kvpress
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_kept_is_what_each_press_keeps_by_itself(family):
    host, context = make_host(family), context_of(make_rows(2), 4)
    wanted = [Wanted(ARMS[name], 132, 4) for name in RANKING]
    whole, kept = prefill(host.model, context, wanted)
    for w in wanted:
        press, own = press_class(w.arm)(ratio(context.shape[1], w.kept), **options(w)), DynamicCache()
        if family == "gemma3" and w.arm.method == "expected_attention":
            continue  # kvpress does not say which of two rotary embeddings a layer has
        with torch.no_grad(), press(host.model):
            host.model.model(context, past_key_values=own)
        short, valid = shortened(whole, kept[w.arm.name])
        for index, layer in enumerate(own.layers):
            keep = kept[w.arm.name][index]
            if keep is None:
                assert host.slides[index]
                continue
            assert keep.sum(-1).unique().tolist() == [132]
            last = [[{tuple(key.tolist())} for key in row] for row in whole.layers[index].keys[:, :, -1]]
            ours = short.layers[index].keys
            counts = valid[index] if index in valid else torch.ones(ours.shape[:3], dtype=torch.bool)
            for row in range(2):
                for head in range(2):
                    mine = {tuple(key) for key in ours[row, head][counts[row, head]].tolist()}
                    theirs = {tuple(key) for key in layer.keys[row, head].tolist()}
                    assert mine == theirs - last[row][head]
    assert all("rotary_emb" not in layer.self_attn.__dict__ for layer in host.model.model.layers)
    assert "datasets" not in sys.modules


@kvpress
@pytest.mark.parametrize("method", REPEATING)
def test_kvzip_keeps_the_total_it_was_asked_for(method, monkeypatch):
    """As `with press(model)` of kvpress would, which makes its words itself; both budgets of one ranking."""
    host, context = make_host(), context_of(make_rows(1), 4)
    wanted = [Wanted(ARMS[f"{method}.at{t}"], kept, 4) for t, kept in ((8, 132), (32, 160))]
    whole, _ = prefill(host.model, context, [])
    before = [layer.keys.clone() for layer in whole.layers]
    found = repeated(host.model, host.words, context, whole, wanted)
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(whole.layers, before, strict=True))
    module = kvpress_module("presses.kvzip_press")
    tokenizer = type("Plain", (Tokenizer,), {"chat_template": None})
    monkeypatch.setattr(module.AutoTokenizer, "from_pretrained", lambda name: tokenizer())
    assert not any(hasattr(layer.self_attn, "masked_key_indices") for layer in host.model.model.layers)
    for w in wanted:
        kept = torch.stack(found[w.arm.name])
        assert int(kept.sum()) == 3 * 2 * w.kept and kept[..., :4].all()
        assert len(kept.sum(-1).unique()) > 1  # not the same for all layers and heads
        press = press_class(w.arm)(ratio(6 * 228, 6 * w.kept, dropped=True), **options(w))
        with torch.no_grad(), press(host.model):
            host.model(input_ids=context, past_key_values=DynamicCache())
        for index, layer in enumerate(host.model.model.layers):
            own = torch.ones_like(kept[index])
            own[layer.self_attn.masked_key_indices] = False
            del layer.self_attn.masked_key_indices
            assert torch.equal(own, kept[index])


@kvpress
def test_what_kvzip_drops_is_as_with_the_keys_of_kvpress():
    """Decoding one token at a time, where kvpress finds a key that no query of a head heeds."""
    host, context = make_host(), context_of(make_rows(1), 4)
    whole, _ = prefill(host.model, context, [])
    wanted = Wanted(ARMS["kvzip.at8"], 132, 4)
    kept = repeated(host.model, host.words, context, whole, [wanted])["kvzip.at8"]
    last, at = context[:, -1:], context.shape[1] - 1
    short, valid = shortened(whole, kept)
    with torch.no_grad(), host.attention.using(valid):
        ours = host.model(last, past_key_values=short, position_ids=torch.tensor([[at]])).logits
    cut = DynamicCache()
    for index, layer in enumerate(whole.layers):
        cut.update(layer.keys[:, :, :-1], layer.values[:, :, :-1], index)
        dropped = (~kept[index][..., :-1]).nonzero(as_tuple=True)
        host.model.model.layers[index].self_attn.masked_key_indices = dropped
    patch = kvpress_module("attention_patch").attention_patch
    attention_.AttentionInterface.register(attention_.NAME, patch(install()))
    try:
        with torch.no_grad():
            theirs = host.model(last, past_key_values=cut, position_ids=torch.tensor([[at]])).logits
    finally:
        install()
    assert torch.allclose(ours, theirs, atol=1e-4)


@kvpress
def test_the_words_are_those_of_the_chat_template():
    class Chat(Tokenizer):
        chat_template = "yes"

        def apply_chat_template(self, messages, **_):
            return f"<user>{messages[0]['content']}</user><answer>"

    words = Words.of(Chat())
    assert words.before == tuple(Tokenizer().encode("<user>")[0].tolist())
    assert torch.equal(words.after, Tokenizer().encode("</user><answer>"))
    assert Words.of(Tokenizer()).before == ()


@kvpress
def test_documents_are_measured_with_every_press(tmp_path):
    host, rows, results = make_host(), make_rows(2), DocumentResults(tmp_path / "nowhere", {})
    arms = [arm for arm in ARMS.values() if arm.entries in (8, 32) or arm.how.kind == "full"]
    measure_block(host, rows, [1, 0], 4, arms, results)
    for row in results.found.values():
        for arm in arms:
            assert np.isfinite(row[f"n4.{arm.name}.loss"])
            assert row[f"n4.{arm.name}.slots"] == pytest.approx(arm.kept(4, 96, 4, 228), abs=1e-4)


@hqq
def test_keys_are_better_kept_by_channel_where_channels_differ():
    host, context = make_host(), context_of(make_rows(1), 2)
    whole, _ = prefill(host.model, context, [])
    for layer in whole.layers:
        layer.keys = layer.keys + 50 * torch.randn(layer.keys.shape[3])
    errors = []
    for channels in (False, True):
        short = quantised(whole, 4, channels)[0]
        pairs = list(zip(short.layers, whole.layers, strict=True))
        assert all(one.keys.shape[2] == 163 for one in short.layers)
        errors.append(sum((one.keys - layer.keys[:, :, :-1]).abs().mean() for one, layer in pairs))
    assert errors[1] < errors[0] / 4


@hqq
@pytest.mark.parametrize("bits", [4, 2])
def test_a_quantised_cache_is_that_of_transformers(bits):
    host, rows = make_host(), make_rows(2)
    context = context_of(rows, 2)
    whole, _ = prefill(host.model, context, [])
    read = torch.cat([context[:, -1:], context[:, :9]], 1)
    ours = quantised(whole, bits)
    model = make_model("qwen2")
    theirs = QuantizedCache("hqq", model.config, nbits=bits, axis_key=1, axis_value=1)
    with torch.no_grad():
        model(context[:, :-1], past_key_values=theirs)
    for index, layer in enumerate(theirs.layers):
        keys = layer._dequantize(layer._quantized_keys)
        assert torch.allclose(ours[0].layers[index].keys, keys, atol=1e-5)
    lines = np.zeros((2, 9), np.int16)
    at = context.shape[1] - 1
    mine = read_targets(host.model, host.attention, ours, read, lines, at).loss
    other = read_targets(model, host.attention, (theirs, {}), read, lines, at).loss
    assert mine == pytest.approx(other, abs=1e-5)
    full = read_targets(host.model, host.attention, shortened(whole, [None] * 3), read, lines, at).loss
    assert np.abs(mine - full).max() > 1e-4
    assert bytes_a_token(model, bits) == 3 * 2 * 2 * (64 * bits / 8 + 8) < bytes_a_token(model, None)
