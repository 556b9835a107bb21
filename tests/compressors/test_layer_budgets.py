"""How slots are divided over layers, and the file that says so."""

import json

import pytest
import torch

from hf_crouter import Compact, CompressedHistory, InputError, MismatchError
from hf_crouter.compressors import layer_budgets
from hf_crouter.compressors.layer_budgets import LayerBudgets, find_layer_budgets
from hf_crouter.hosts.fingerprint import host_architecture, host_fingerprint
from tests.tiny import tiny_host

SLOTS = (2, 8, 32, 128)
FLAT, STEEP = (0.4, 0.1, 0.02, 0.004), (4.0, 1.0, 0.2, 0.04)


def budgets(*losses, **options):
    return LayerBudgets(SLOTS, losses, **options)


class TestCounts:
    def test_equal_layers_keep_equally_many(self):
        assert set(budgets(FLAT, FLAT, FLAT).counts(32)) == {32}

    def test_a_layer_that_loses_more_keeps_more(self):
        few, many = budgets(FLAT, STEEP).counts(32)
        assert few < 32 < many and few + many == pytest.approx(64, abs=1)

    @pytest.mark.parametrize("mean", [1, 2, 8, 33, 64, 128, 300, 512])
    def test_the_mean_is_kept_and_no_layer_starves(self, mean):
        losses = [tuple(loss * 3**n for loss in FLAT) for n in range(12)]
        counts = budgets(*losses).counts(mean)
        assert sum(counts) <= 12 * mean and sum(counts) >= 12 * mean * 0.97
        assert min(counts) >= max(1, mean // 4) and max(counts) <= min(512, 8 * mean)
        assert list(counts) == sorted(counts)

    def test_layers_that_keep_nothing_old_are_left_out(self):
        counts = budgets(FLAT, (), STEEP, ()).counts(16)
        assert counts[1] == counts[3] == 0 and counts[0] + counts[2] == pytest.approx(32, abs=1)

    def test_noise_never_makes_more_slots_cost(self):
        few, many = budgets((0.1, 0.2, 0.05, 0.1), STEEP).counts(32)
        assert few < many

    def test_the_sum_of_losses_is_as_low_as_a_search_finds(self):
        some = budgets(FLAT, STEEP, (1.0, 0.9, 0.8, 0.1))
        counts = some.counts(16)

        def loss(kept):
            return sum(some._loss(layer, count) for layer, count in enumerate(kept))

        found = min(loss((a, b, 48 - a - b)) for a in range(4, 41) for b in range(4, 45 - a) if 48 - a - b >= 4)
        assert loss(counts) <= 1.1 * found


class TestFile:
    def test_round_trip(self, tmp_path):
        some = budgets(FLAT, (), STEEP, host_name="a", training={"documents": 2})
        assert LayerBudgets.load(some.save(tmp_path)) == LayerBudgets.load(tmp_path) == some

    @pytest.mark.parametrize(
        "change", [{"slots": [2]}, {"slots": [8, 2, 32, 128]}, {"losses": [[1.0]]}, {"losses": [[1.0, 2.0, 3, 1e999]]}]
    )
    def test_bad_numbers_are_refused(self, tmp_path, change):
        path = budgets(FLAT).save(tmp_path)
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
        with pytest.raises(InputError, match="layer budgets: expected"):
            LayerBudgets.load(path)

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"slots": [2, 8]}', '{"slots": 1, "losses": []}'])
    def test_damaged_files_are_refused(self, tmp_path, text):
        (tmp_path / layer_budgets.FILE).write_text(text)
        with pytest.raises(InputError, match="expected layer budgets"):
            LayerBudgets.load(tmp_path)

    def test_missing(self, tmp_path):
        with pytest.raises(InputError, match="cannot be read"):
            LayerBudgets.load(tmp_path / "none.json")


class TestHosts:
    def of(self, host, *losses):
        return budgets(*losses, host_name="tiny", host_fingerprint=host_fingerprint(host),
                       host_architecture=host_architecture(host), host_tokenizer="t")  # fmt: skip

    def test_a_history_divides_by_what_was_measured_and_says_so(self, tmp_path):
        host = tiny_host()
        path = self.of(host, FLAT, STEEP).save(tmp_path)
        history = CompressedHistory(host, modes=[Compact(8, budgets=path)])
        few, many = history.policy.compressor.most_by_layer
        assert few < 8 < many and "layer budgets: fitted to this very copy of tiny" in str(history.report().fitted[0])
        history.detach()

    def test_of_another_host_they_are_refused(self, tmp_path):
        path = self.of(tiny_host("qwen2"), FLAT, STEEP).save(tmp_path)
        with pytest.raises(MismatchError, match="hf-crouter budgets"):
            CompressedHistory(tiny_host(), modes=[Compact(8, budgets=path)])

    def test_of_another_number_of_layers_they_are_refused(self):
        with pytest.raises(InputError, match="expected budgets of 2 layers that look back, got 3"):
            CompressedHistory(tiny_host(), modes=[Compact(8, budgets=budgets(FLAT, FLAT, STEEP))])

    def test_shipped_ones_are_found_and_nothing_else(self, tmp_path, monkeypatch):
        monkeypatch.setattr(layer_budgets, "SHIPPED", tmp_path)
        host = tiny_host()
        assert find_layer_budgets(host) is None
        some = self.of(host, FLAT, STEEP)
        some.save(tmp_path / "tiny")
        assert find_layer_budgets(host) == some and find_layer_budgets(tiny_host("qwen2")) is None
        assert CompressedHistory(host, modes=[Compact(8)]).policy.compressor.most_by_layer == some.counts(8)
        equal = CompressedHistory(host, modes=[Compact(8, budgets="equal")])
        assert equal.policy.compressor.most_by_layer == (8, 8) and not equal.report().fitted

    def test_every_shipped_file_is_whole(self):
        for path in layer_budgets.SHIPPED.glob(f"*/{layer_budgets.FILE}"):
            some = LayerBudgets.load(path)
            assert some.host_architecture and some.host_tokenizer and some.host_name == path.parent.name
            assert torch.tensor([one for one in some.losses if one]).min() >= -1e-3
