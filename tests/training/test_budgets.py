"""What a layer loses by compaction, on hosts of which it is known."""

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from hf_crouter import Compact, CompressedHistory, InputError
from hf_crouter.data.tokens import TokenArray
from hf_crouter.training.budgets import (
    BudgetArguments,
    WindowShape,
    document_windows,
    measure_budgets,
    measure_losses,
)
from tests.tiny import VOCAB, tiny_crouter, tiny_host

from ..modes.test_key_values import make_host
from .prepared import prepared

SHAPE = WindowShape(prefix=2, chunk=16, chunks=3, window=12, target=10)


def windows(count=3):
    return np.random.default_rng(0).integers(3, VOCAB, (count, SHAPE.length))


class TestLosses:
    def test_a_layer_that_keeps_everything_loses_nothing_and_few_lose_most(self):
        losses = measure_losses(tiny_host().double(), windows(), SHAPE, (1, 4, 16), block=32)
        assert len(losses) == 2
        for few, some, all_pairs in losses:
            assert few > some > 1e-6 and abs(all_pairs) < 1e-9

    def test_a_layer_whose_output_is_nought_loses_nothing(self):
        host = tiny_host().double()
        torch.nn.init.zeros_(host.model.layers[0].self_attn.o_proj.weight)
        first, second = measure_losses(host, windows(), SHAPE, (1, 4), block=32)
        assert max(map(abs, first)) < 1e-9 < min(second)

    def test_batches_change_nothing(self):
        host = tiny_host().double()
        one, three = (measure_losses(host, windows(), SHAPE, (2,), batch_size=size, block=32) for size in (1, 3))
        np.testing.assert_allclose(one, three, rtol=1e-6)

    def test_it_is_the_divergence_of_what_a_history_predicts(self):
        host, rows = tiny_host().double(), windows(1)
        loss = measure_losses(host, rows, SHAPE, (4,), block=32)[1][0]
        ids = torch.from_numpy(rows)
        ours = TestLosses.log_probabilities(host, ids, (16, 4))
        theirs = host(ids[:, :-1]).logits[:, -SHAPE.target :].log_softmax(-1).detach()
        divergence = float((theirs.exp() * (theirs - ours)).sum() / SHAPE.target)
        assert loss == pytest.approx(divergence, rel=1e-4)

    @staticmethod
    def log_probabilities(host, ids, counts):
        """Step by step, by `generate` with every token forced."""
        modes = [Compact(4, budgets="equal", block=32)]
        history = CompressedHistory(host, tiny_crouter(chunk_length=16), modes=modes, window=12, keep_first=2)
        history.policy.compressor.most_by_layer = counts
        start, forced = SHAPE.length - SHAPE.target, iter(ids[0, -SHAPE.target :].tolist())

        def force(input_ids, scores):
            return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([next(forced)]), 0.0)

        out = host.generate(
            ids[:, :start], attention_mask=torch.ones_like(ids[:, :start]), logits_processor=[force, history],
            max_new_tokens=SHAPE.target, do_sample=False, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        history.detach()
        return torch.stack(out.logits, 1).log_softmax(-1)

    def test_layers_that_slide_are_left_out(self):
        losses = measure_losses(make_host("gemma3"), windows(), SHAPE, (2, 4), block=32)
        assert [len(one) for one in losses] == [0, 2, 0]


class TestWindows:
    def tokens(self):
        ids = np.arange(400, dtype=np.uint16)
        return TokenArray(ids, np.array([0, 20, 120, 220, 400]), ("a", "b", "c", "d"), ("x", "x", "y", "x"), 0, 500)

    def test_groups_take_turns_and_short_documents_are_left_out(self):
        found = document_windows(self.tokens(), SHAPE, 2, seed=0)
        assert found.shape == (2, SHAPE.length) and (np.diff(found) == 1).all()
        groups = {"y" if 120 <= row[0] < 220 else "x" for row in found}
        assert groups == {"x", "y"} and len(document_windows(self.tokens(), SHAPE, 9, seed=0)) == 3

    def test_none_is_long_enough(self):
        with pytest.raises(InputError, match="documents of 571 tokens or more, got none"):
            document_windows(self.tokens(), WindowShape(2, 512, 1, 47, 10), 1, seed=0)


@pytest.mark.parametrize("options", [{"slots": [8]}, {"slots": [8, 2]}, {"slots": [2, 300]}, {"documents": 0}])
def test_bad_options_are_named(options):
    with pytest.raises(InputError, match="--" + next(iter(options))):
        BudgetArguments(**options).check()


def test_the_budgets_of_a_host_serve_it(tmp_path):
    data, tokenizer = prepared()
    host = tiny_host(vocab_size=2048, positions=2048)
    arguments = BudgetArguments(data=str(data), documents=2, slots=[2, 8], chunks=1, window=12, target=8, batch_size=2)
    found = measure_budgets(host, AutoTokenizer.from_pretrained(tokenizer), arguments)
    assert len(found.losses) == 2 and found.training["documents"] == 2 and found.host_tokenizer
    path = found.save(tmp_path)
    history = CompressedHistory(host, modes=[Compact(8, budgets=path)])
    assert sum(history.policy.compressor.most_by_layer) in (15, 16)
    history.detach()
