import importlib.util
import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from eval.hgr import kvpress_arms
from eval.hgr.kvpress_arms import FULL, Layout, Measurement, chosen, losses_path, prefill, ratio

VOCAB = 97
LAYOUT = Layout(prefix=4, chunk=32, chunks=4, window=96, target=16, latents=2)
COUNTS = [2, 4]
INSTALLED = importlib.util.find_spec("kvpress") is not None


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny products: several threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class KeepEnds:
    """A press like StreamingLLM, for where kvpress is not installed."""

    def __init__(self, kept):
        self.kept = kept

    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        ends = [*range(4), *range(keys.shape[2] - self.kept + 4, keys.shape[2])]
        return keys[:, :, ends], values[:, :, ends]


def make_host():
    torch.manual_seed(0)
    shape = {"hidden_size": 36, "intermediate_size": 48, "num_attention_heads": 9, "num_key_value_heads": 3}
    config = LlamaConfig(vocab_size=VOCAB, num_hidden_layers=2, initializer_range=0.3, **shape)
    config._attn_implementation = "sdpa"
    return LlamaForCausalLM(config).eval()


def make_rows(count=3):
    generator = np.random.default_rng(0)
    return generator.integers(3, VOCAB, (count, LAYOUT.length)).astype(np.uint16)


def plain_losses(host, rows, count, mask=None):
    """One pass without a cache, `[D]`."""
    context = LAYOUT.context(rows, count)
    target = rows[:, -LAYOUT.target :].astype(np.int64)
    ids = torch.from_numpy(np.concatenate([context, target[:, :-1]], axis=1).astype(np.int64))
    if mask is not None:
        mask = mask.expand(len(rows), 1, *mask.shape)
    with torch.no_grad():
        logits = host(ids, attention_mask=mask, use_cache=False).logits[:, -LAYOUT.target :]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), torch.from_numpy(target), reduction="none")
    return losses.mean(1).numpy()


def streaming_mask(count, kept):
    """What each position sees if the target sees the first four and the latest of the context."""
    length = LAYOUT.prefix + count * LAYOUT.chunk + LAYOUT.window
    mask = torch.ones(length + LAYOUT.target - 1, length + LAYOUT.target - 1, dtype=torch.bool).tril()
    mask[length:, 4 : length - (kept - 4)] = False
    return mask


@pytest.fixture
def fake_presses(monkeypatch):
    def make(length, budgets):
        return {method + e: KeepEnds(k) for method in kvpress_arms.PRESSES for e, k in budgets.items()}

    monkeypatch.setattr(kvpress_arms, "make_presses", make)


@pytest.mark.parametrize("length", [5, 1540, 2564, 4612])
def test_ratio_keeps_exactly_the_budget(length):
    kept = range(1, length)
    assert [int(length * (1 - ratio(length, k))) for k in kept] == list(kept)  # as kvpress counts
    for wrong in (0, length):
        with pytest.raises(kvpress_arms.BadInput, match=f"1 to {length - 1} positions, got {wrong}"):
            ratio(length, wrong)


def test_budgets_are_the_slots_of_soft_prompts_and_retrieval():
    assert Layout().kept(8) == {".at8": 4 + 64 + 512, ".at8_retrieve2": 4 + 64 + 1024 + 512}
    assert Layout().kept(2) == {".at8": 4 + 16 + 512}  # two retrieved chunks of two are the full history


@pytest.mark.skipif(INSTALLED, reason="hf_crouter takes another transformers than kvpress")
def test_layout_order_and_budgets_are_those_of_hgr():
    from eval import arrays
    from eval.documents import EVALUATION, Record
    from eval.hgr import arms

    theirs, layout, row = arms.Layout(), Layout(), np.arange(Layout().length)
    assert {key: getattr(theirs, key) for key in vars(layout)} == vars(layout)
    assert EVALUATION == kvpress_arms.SETS
    for count in (2, 4, 8):
        raw = theirs.prefix + theirs.window
        slots = {".at8": raw + theirs.extra("soft", count), ".at8_retrieve2": raw + theirs.extra("retrieve", count)}
        assert layout.kept(count).items() <= slots.items()
        read = np.concatenate([row[: theirs.prefix], theirs.raw(row, theirs.extra("full", count))])
        assert np.array_equal(np.concatenate([layout.context(row[None], count)[0], row[theirs.split : -1]]), read)
    names = [f"package/{i}.py" for i in range(20)]
    records = [Record(name, "package", "code", 0.1) for name in names]
    assert np.array_equal(chosen(names, 7, 3), arrays.chosen(records, 7, 3))


def test_file_of_a_shard(tmp_path):
    assert losses_path(tmp_path, "young", 1, 2) == tmp_path / "losses" / "young.kvpress.1of2.safetensors"


def test_losses_are_those_of_one_masked_pass(fake_presses):
    host, rows = make_host(), make_rows()
    found = Measurement(host, LAYOUT, COUNTS)(rows)
    names = {f"n{n}.{m}.at8" for n in COUNTS for m in kvpress_arms.PRESSES} | {f"n{n}.{FULL}" for n in COUNTS}
    assert set(found) == names | {f"n4.{m}.at8_retrieve2" for m in kvpress_arms.PRESSES}
    for count in COUNTS:
        assert found[f"n{count}.{FULL}"] == pytest.approx(plain_losses(host, rows, count), abs=1e-5)
        for ending, kept in LAYOUT.kept(count).items():
            expected = plain_losses(host, rows, count, streaming_mask(count, kept))
            assert found[f"n{count}.knorm{ending}"] == pytest.approx(expected, abs=1e-5)
            assert np.abs(expected - found[f"n{count}.{FULL}"]).min() > 1e-4  # the test would notice


def test_a_press_that_keeps_too_much_is_noticed(fake_presses, monkeypatch):
    monkeypatch.setattr(KeepEnds, "compress", lambda self, module, hidden, keys, values, *rest: (keys, values))
    with pytest.raises(AssertionError, match=r"expected 108 positions in every layer, got \[228\]"):
        Measurement(make_host(), LAYOUT, [4])(make_rows())


def test_shards_are_written_and_found_again(fake_presses, tmp_path, capsys, monkeypatch):
    rows = make_rows(5)
    monkeypatch.setattr(kvpress_arms.importlib.metadata, "version", lambda package: "0")
    save_file({"ids": rows}, tmp_path / "young.safetensors")
    about = {"documents": [{"name": f"package/{i}.py"} for i in range(5)]}
    (tmp_path / "young.json").write_text(json.dumps(about))
    measurement = Measurement(make_host(), LAYOUT, [2])
    for shard in (0, 1):
        args = SimpleNamespace(
            data=tmp_path, save=tmp_path, documents=None, seed=0, chunks=[2], shard=(shard, 2), block=2
        )
        kvpress_arms.measure_set(measurement, args, "young")
    files = [load_file(losses_path(tmp_path, "young", shard, 2)) for shard in (0, 1)]
    assert sorted(np.concatenate([file["documents"] for file in files])) == list(range(5))
    assert files[0][f"n2.{FULL}"].dtype == np.float32 and math.isfinite(files[0]["n2.snapkv.at8"].sum())
    whole = measurement(rows)
    for file in files:
        assert file["n2.knorm.at8"] == pytest.approx(whole["n2.knorm.at8"][file["documents"]], abs=1e-5)
    assert "young: 3/3 documents" in capsys.readouterr().out
    kvpress_arms.measure_set(measurement, args, "young")
    assert capsys.readouterr().out == "young: done before\n"
    assert len(list((tmp_path / "losses").iterdir())) == 2  # no temporary files


def test_bad_input_is_one_line_and_exit_status_2(tmp_path, capsys, monkeypatch):
    arguments = ["--data", str(tmp_path), "--host", str(tmp_path), "--save", str(tmp_path / "S")]
    if not INSTALLED:
        assert kvpress_arms.main(arguments) == 2
        assert "needs kvpress: pip install kvpress==0.5.5" in capsys.readouterr().err
    monkeypatch.setattr(kvpress_arms, "kvpress_module", lambda name: None)
    assert kvpress_arms.main(arguments) == 2
    assert "expected the folder of a model, found no config.json" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{}")
    assert kvpress_arms.main(arguments) == 2
    error = capsys.readouterr().err
    assert "young.json: expected a file of eval.documents" in error and error.count("\n") == 1


@pytest.mark.skipif(not INSTALLED, reason="kvpress is not installed")
def test_presses_of_kvpress():
    host, rows = make_host(), make_rows()
    found = Measurement(host, LAYOUT, COUNTS)(rows)
    single = [Measurement(host, LAYOUT, COUNTS)(row[None]) for row in rows]
    for key, losses in found.items():  # rows do not depend on each other
        assert losses == pytest.approx(np.concatenate([one[key] for one in single]), abs=1e-5)
    for count in COUNTS:
        budgets = LAYOUT.kept(count)
        for ending, kept in budgets.items():
            expected = plain_losses(host, rows, count, streaming_mask(count, kept))
            assert found[f"n{count}.streaming{ending}"] == pytest.approx(expected, abs=1e-5)
        context = torch.from_numpy(LAYOUT.context(rows, count).astype(np.int64))
        presses = kvpress_arms.make_presses(context.shape[1], budgets)
        caches = prefill(host, context, presses)[1]
        for name, press in presses.items():  # each alone, as kvpress itself runs it
            own = kvpress_arms.DynamicCache()
            with torch.no_grad(), press(host):
                host(context, past_key_values=own, use_cache=True)
            for one, other in zip(own.layers, caches[name].layers, strict=True):
                assert torch.equal(one.keys, other.keys) and torch.equal(one.values, other.values)
    assert "datasets" not in sys.modules
