"""Rows that end early: what stands behind an end is padding, and is never cut, encoded, routed or counted."""

import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from hf_crouter.modes import Retrieve

from ..histories import WINDOW, make, run
from ..tiny import CHUNK, VOCAB, make_history, prompt, tiny_crouter, tiny_host

torch.set_num_threads(1)
LENGTHS = (70, 50, 60)
PAD = VOCAB + 2  # outside the crouter's vocabulary


class AtLengths(StoppingCriteria):
    """Ends each row at a length of its own, without an end token, as stop words do."""

    def __init__(self, lengths):
        self.lengths = torch.tensor(lengths)

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.shape[1] >= self.lengths


def wide_host():
    """A host with more ids than the crouter, of which it generates none."""
    host = tiny_host(vocab_size=VOCAB + 8, positions=512)
    host.generation_config.suppress_tokens = list(range(VOCAB, VOCAB + 8))
    return host


def host_and_history(**options):
    host = wide_host()
    return host, make(host, tiny_crouter(), **options)


def ending_tokens(host, history):
    """Tokens with which rows 0 and 1 go on after some steps."""
    out = run(host, *prompt(*LENGTHS), new=60, logits_processor=[history])
    return [int(out.sequences[0, 75]), int(out.sequences[1, 90])]


def alone(host, history, number, **options):
    ids = prompt(*LENGTHS)[0][number : number + 1, -LENGTHS[number] :]
    return run(host, ids, logits_processor=[history], pad_token_id=PAD, **options).sequences[0]


class TestRowsThatEndEarly:
    def test_each_row_is_what_it_is_alone(self):
        host, history = host_and_history()
        ends = ending_tokens(host, history)
        out = run(host, *prompt(*LENGTHS), new=120, logits_processor=[history], eos_token_id=ends, pad_token_id=PAD)
        report = history.report()
        assert out.sequences.shape[1] > 100
        for i, length in enumerate(LENGTHS):
            row = out.sequences[i, 70 - length :]
            expected = alone(host, history, i, new=120, eos_token_id=ends)
            assert torch.equal(row[: len(expected)], expected) and bool((row[len(expected) :] == PAD).all())
            tokens = min(len(expected), len(row) - 1)  # a call's last token is never read
            assert report.rows[i].tokens == tokens
            spans = [(chunk.start, chunk.end) for chunk in report.chunks if chunk.row == i]
            assert spans == [(3 + CHUNK * k, 3 + CHUNK * (k + 1)) for k in range((tokens - 3 - WINDOW) // CHUNK)]

    def test_slots_do_not_grow_behind_an_end(self):
        host, history = host_and_history()
        ends = ending_tokens(host, history)[:1]
        run(host, *prompt(*LENGTHS), new=300, logits_processor=[history], eos_token_id=ends, pad_token_id=PAD)
        chunks = (370 - 3 - WINDOW) // CHUNK
        assert history.report().peak_slots <= 3 + 2 * chunks + WINDOW + CHUNK - 1 + CHUNK

    def test_ends_without_an_end_token(self):
        host, history = host_and_history()
        stop = StoppingCriteriaList([AtLengths([80, 100, 130])])
        ids, mask = prompt(*LENGTHS)
        out = host.generate(
            ids, attention_mask=mask, max_new_tokens=90, do_sample=False, logits_processor=[history],
            stopping_criteria=stop, pad_token_id=PAD, eos_token_id=VOCAB + 7,
        )  # fmt: skip
        for i, (length, end) in enumerate(zip(LENGTHS, (80, 100, 130), strict=True)):
            expected = alone(host, history, i, new=end - 70)
            assert torch.equal(out[i, 70 - length : end], expected)
            assert bool((out[i, end:] == PAD).all())

    def test_several_sequences_of_a_prompt(self):
        host, history = host_and_history()
        ends = ending_tokens(host, history)
        torch.manual_seed(0)
        out = run(
            host, *prompt(70), new=100, logits_processor=[history], eos_token_id=ends, pad_token_id=PAD,
            do_sample=True, num_return_sequences=4,
        )  # fmt: skip
        for i, row in enumerate(out.sequences):
            after = (torch.isin(row, torch.tensor(ends)) & (torch.arange(len(row)) >= 70)).nonzero()
            end = int(after[0]) + 1 if len(after) else len(row)
            assert history.report().rows[i].tokens == min(end, len(row) - 1)

    def test_retrieval(self):
        host = wide_host()
        history = make_history(host, tiny_crouter(), window=WINDOW, keep_first=3, extra=[Retrieve(2, every=16)])
        ends = ending_tokens(host, history)
        out = run(host, *prompt(*LENGTHS), new=120, logits_processor=[history], eos_token_id=ends, pad_token_id=PAD)
        for i, length in enumerate(LENGTHS):
            expected = alone(host, history, i, new=120, eos_token_id=ends)
            assert torch.equal(out.sequences[i, 70 - length :][: len(expected)], expected)

    def test_a_later_turn(self):
        host, history = host_and_history()
        ends = ending_tokens(host, history)
        first = run(host, *prompt(*LENGTHS), new=120, logits_processor=[history], eos_token_id=ends, pad_token_id=PAD)
        rows = []
        for i, length in enumerate(LENGTHS):
            row = first.sequences[i, 70 - length :]
            rows.append(torch.cat([row[row != PAD], prompt(30, seed=7 + i)[0][0]]))
        width = max(len(row) for row in rows)
        turn = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0)) for row in rows])
        mask = torch.stack([(torch.arange(width) >= width - len(row)).long() for row in rows])
        options = {"new": 10, "logits_processor": [history]}
        again = run(host, turn, mask, past_key_values=first.past_key_values, **options)
        scratch = run(host, turn, mask, **options)
        torch.testing.assert_close(torch.stack(again.logits), torch.stack(scratch.logits), atol=1e-4, rtol=0)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 2, "do_sample": True}])
def test_beams_end_as_without_a_history(options):
    host, history = host_and_history(window=300)
    plain = wide_host()
    torch.manual_seed(1)
    expected = run(plain, *prompt(20, 12), new=20, eos_token_id=9, pad_token_id=PAD, **options).sequences
    torch.manual_seed(1)
    out = run(host, *prompt(20, 12), new=20, eos_token_id=9, pad_token_id=PAD, logits_processor=[history], **options)
    assert torch.equal(out.sequences, expected)
