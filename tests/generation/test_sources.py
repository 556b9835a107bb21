"""Receipts: which generated tokens were copied, and where in the prompt what they repeat stands."""

import json
from types import SimpleNamespace

import pytest
import torch

from hf_crouter import CompressedHistory, Copy, SourceStreamer
from hf_crouter.generation.trace import copied_spans
from hf_crouter.hosts.tokenizers import character_spans
from hf_crouter.types import CopiedToken

from ..modes.copying import eager_gate, repetitive, run
from ..test_chunking import byte_tokenizer, metaspace_tokenizer
from ..tiny import CHUNK, tiny_crouter, tiny_host

PREFIX, WINDOW = 3, 8
TEXT = "the cat sat on the mat, the cät sat on the mät; naïve cafés ☕ the cat sat"


@pytest.fixture
def host():
    host = tiny_host()
    host.generation_config.eos_token_id = None
    return host


def make(host, **options):
    gate = eager_gate(bias=-8.0)
    return CompressedHistory(
        host, tiny_crouter(), modes=[Copy(gate=gate, **options)], window=WINDOW, keep_first=PREFIX
    )


def check(copies, sequences, pads, prompt):
    """Every span repeats what stands at its source, in the prompt's compressed part, behind the same token."""
    for copy in copies:
        row = sequences[copy.sequence, pads[copy.row] :].tolist()
        assert copy.end - copy.start == copy.source_end - copy.source_start > 0
        assert row[copy.start : copy.end] == row[copy.source_start : copy.source_end]
        assert row[copy.start - 1] == row[copy.source_start - 1]
        assert PREFIX <= copy.source_start < copy.source_end <= prompt[copy.row] <= copy.start
        assert copy.chunk == (copy.source_start - PREFIX) // CHUNK


class TestTheReport:
    @pytest.mark.parametrize("lengths", [(120,), (200, 140, 33)])
    def test_each_copied_token_stands_where_it_says(self, host, lengths):
        history = make(host)
        ids, mask = repetitive(*lengths)
        out = run(host, ids, mask, logits_processor=[history])
        report = history.report()
        assert report.copies and sum(copy.end - copy.start for copy in report.copies) == report.copied
        check(report.copies, out.sequences, [max(lengths) - n for n in lengths], lengths)
        for chunk in report.chunks:
            own = [c for c in report.copies if (c.row, c.chunk) == (chunk.row, chunk.index)]
            assert bool(own) <= bool(chunk.copied)
        json.dumps(report.to_dict())

    def test_of_several_sequences_each_has_its_own(self, host):
        history = make(host)
        out = run(host, *repetitive(120), logits_processor=[history], do_sample=True, num_return_sequences=3)
        report = history.report()
        assert {copy.sequence for copy in report.copies} == {0, 1, 2}
        check(report.copies, out.sequences, [0] * 3, [120] * 3)

    def test_beams(self, host):
        history = make(host)
        out = run(host, *repetitive(120), logits_processor=[history], num_beams=3)
        assert history.report().copies
        check(history.report().copies, out.sequences, [0], [120])

    def test_what_goes_on_is_one_span(self):
        def token(position, source, sequence=0, chunk=0):
            return CopiedToken(sequence, 0, position, chunk, source)

        spans = copied_spans([token(50, 10), token(51, 11), token(52, 30), token(54, 31), token(55, 32),
                              token(56, 33, sequence=1), token(57, None, 1), token(58, None, 1)])  # fmt: skip
        found = [(s.sequence, s.start, s.end, s.source_start, s.source_end) for s in spans]
        assert found == [(0, 50, 52, 10, 12), (0, 52, 53, 30, 31), (0, 54, 56, 31, 33), (1, 56, 57, 33, 34),
                         (1, 57, 59, None, None)]  # fmt: skip

    def test_without_copying_there_are_none(self, host):
        history = CompressedHistory(host, tiny_crouter(), modes=[], window=WINDOW, keep_first=PREFIX)
        run(host, *repetitive(120), logits_processor=[history])
        assert history.report().copies == ()


class TestCharacters:
    @pytest.mark.parametrize("make_tokenizer", [lambda: byte_tokenizer(300), metaspace_tokenizer])
    def test_spans_of_tokens_are_spans_of_the_text(self, make_tokenizer):
        tokenizer = make_tokenizer()
        ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
        text = tokenizer.decode(ids)
        spans = [(first, end) for first in range(0, len(ids), 3) for end in (first + 1, first + 4) if end <= len(ids)]
        for (first, end), (start, stop) in zip(spans, character_spans(tokenizer, ids, spans), strict=True):
            piece = tokenizer.decode(ids[first:end])
            if "\ufffd" not in piece:
                assert text[start:stop].strip() == piece.strip()

    def test_a_span_that_ends_within_a_character_spoils_no_other(self):
        tokenizer = byte_tokenizer(260)
        ids = tokenizer("aé☕ bé cat", add_special_tokens=False)["input_ids"]
        inside = [n for n in range(len(ids)) if tokenizer.decode(ids[:n]).endswith("\ufffd")]
        whole = [(5, 7), (9, 11), (10, 12)]
        expected = character_spans(tokenizer, ids, [*whole, (0, len(ids))])[:-1]
        assert expected == [(3, 5), (6, 8), (7, 9)] and inside
        for end in inside:
            assert character_spans(tokenizer, ids[:end], [(0, end)])[0][0] == 0
            assert character_spans(tokenizer, ids, [*whole, (0, end)])[:-1] == expected

    def test_ids_that_the_tokenizer_would_not_give(self):
        tokenizer = byte_tokenizer(400)
        ids = [token for letter in "the cat sat" for token in tokenizer(letter, add_special_tokens=False)["input_ids"]]
        assert ids != tokenizer("the cat sat", add_special_tokens=False)["input_ids"]
        assert character_spans(tokenizer, ids, [(4, 7), (0, 3)]) == [(4, 7), (0, 3)]


class Written:
    """Ids as text, so that a model of few words can be streamed."""

    all_special_ids = (0, 1, 2)

    def decode(self, ids, skip_special_tokens=False, **_):
        return "".join(f" {int(n)}" for n in ids if not (skip_special_tokens and int(n) in self.all_special_ids))


class TestTheStreamer:
    def test_pieces_and_places_are_those_of_text_and_report(self, host):
        history, heard = make(host), []
        streamer = SourceStreamer(Written(), history, lambda text, source: heard.append((text, source)))
        for length in (120, 90):  # a streamer serves one call after the other
            heard.clear()
            out = run(host, *repetitive(length), logits_processor=[history], streamer=streamer)
            assert "".join(text for text, _ in heard) == Written().decode(out.sequences[0, length:].tolist(), True)
            copied = [source for _, source in heard if source is not None]
            assert len(copied) == history.report().copied > 0
            assert copied_spans(copied) == list(history.report().copies)

    def test_a_character_of_several_tokens_comes_whole(self):
        tokenizer, heard = byte_tokenizer(260), []
        history = SimpleNamespace(host=object())
        streamer = SourceStreamer(tokenizer, history, lambda text, source: heard.append(text))
        ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
        streamer.put(torch.tensor([ids[:5]]))
        for token in ids[5:]:
            streamer.put(torch.tensor([token]))
        streamer.end()
        assert "".join(heard) == tokenizer.decode(ids)[len(tokenizer.decode(ids[:5])) :] and "☕" in heard

    def test_a_call_that_broke_off_leaves_nothing(self, host):
        history, heard = make(host), []
        streamer = SourceStreamer(Written(), history, lambda text, source: heard.append(text))
        ids = repetitive(120)[0]

        def stop(*_):
            raise KeyboardInterrupt

        handle = host.lm_head.register_forward_hook(lambda *_: stop() if len(heard) > 3 else None)
        with pytest.raises(KeyboardInterrupt):
            run(host, ids, logits_processor=[history], streamer=streamer)
        handle.remove()
        heard.clear()
        out = run(host, ids, logits_processor=[history], streamer=streamer)
        assert "".join(heard) == Written().decode(out.sequences[0, 120:].tolist(), True)

    def test_several_sequences_are_refused(self, host):
        streamer = SourceStreamer(Written(), SimpleNamespace(host=host))
        with pytest.raises(ValueError, match="one sequence, got 2"):
            streamer.put(torch.zeros(2, 4, dtype=torch.long))

    def test_by_default_it_is_printed(self, host, capsys):
        history = make(host)
        out = run(host, *repetitive(120), logits_processor=[history], streamer=SourceStreamer(Written(), history))
        assert capsys.readouterr().out == Written().decode(out.sequences[0, 120:].tolist(), True) + "\n"
