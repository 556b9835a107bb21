import pytest
import torch

from hf_crouter.errors import CapacityError, InputError, MismatchError
from hf_crouter.history import CompressedHistory
from hf_crouter.modes import SoftPrompts

from . import reference
from .histories import PREFIX, WINDOW, assert_matches_reference, make, run
from .test_chunking import TEXT, byte_tokenizer
from .tiny import CHUNK, FAMILIES, LATENTS, VOCAB, make_history, prompt, tiny_crouter, tiny_host, tiny_projector

torch.set_num_threads(1)


@pytest.fixture
def host():
    return tiny_host()


@pytest.fixture
def crouter():
    return tiny_crouter()


@pytest.fixture
def history(host, crouter):
    return make(host, crouter)


class TestExactness:
    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("lengths", [(70,), (70, 33, 5)], ids=str)
    def test_every_step_equals_a_forward_from_scratch(self, family, lengths, crouter):
        host = tiny_host(family)
        history = make(host, crouter)
        out = run(host, *prompt(*lengths), logits_processor=[history])
        assert history.report().chunks
        assert_matches_reference(out, lengths, host, crouter, history.policy.compressor.projector)

    @pytest.mark.parametrize("window", [1, 5, 16, 33])
    @pytest.mark.parametrize("prefix", [0, 1, 20])
    def test_any_window_and_prefix(self, host, crouter, window, prefix):
        history = make(host, crouter, window=window, keep_first=prefix)
        out = run(host, *prompt(60), new=25, logits_processor=[history])
        assert_matches_reference(out, (60,), host, crouter, history.policy.compressor.projector, window, prefix)

    @pytest.mark.parametrize("lengths", [(10,), (12, 3)], ids=str)
    def test_bit_identical_with_nothing_to_compress(self, host, history, lengths):
        ids, mask = prompt(*lengths)
        new = WINDOW + CHUNK - max(lengths) + PREFIX - 1
        plain = run(host, ids, mask, new=new)
        ours = run(host, ids, mask, new=new, logits_processor=[history])
        assert torch.equal(torch.stack(plain.logits), torch.stack(ours.logits))
        assert not history.report().chunks

    def test_before_the_first_compaction_bit_identical_with_what_follows_it(self, host, history):
        ids, mask = prompt(10)
        plain, ours = run(host, ids, mask), run(host, ids, mask, logits_processor=[history])
        same = WINDOW + CHUNK + PREFIX - 10  # steps that see at most window + chunk - 1 raw tokens after the prefix
        assert torch.equal(torch.stack(plain.logits[:same]), torch.stack(ours.logits[:same]))
        assert not torch.allclose(plain.logits[same], ours.logits[same])

    def test_prefill_and_stepwise_agree_on_chunks(self, host, history):
        out = run(host, *prompt(20), logits_processor=[history], new=60)
        stepwise = history.report()
        run(host, out.sequences[:, :-1], new=1, logits_processor=[history])
        assert [(c.start, c.end) for c in history.report().chunks] == [(c.start, c.end) for c in stepwise.chunks]

    def test_spans_prefix_and_window_cover_the_input_once(self, host, history):
        run(host, *prompt(70, 33, 5), logits_processor=[history])
        report = history.report()
        for i, row in enumerate(report.rows):
            spans = [(c.start, c.end) for c in report.chunks if c.row == i]
            covered = list(range(row.prefix)) + [p for s in spans for p in range(*s)]
            covered += list(range(row.tokens - row.raw, row.tokens))
            assert covered == list(range(row.tokens))

    def test_the_host_sees_the_latents(self, host, crouter, history):
        ids, _ = prompt(70)
        out = run(host, ids, new=1, logits_processor=[history])
        changed = ids.clone()
        changed[0, PREFIX + 2] = (changed[0, PREFIX + 2] + 1) % VOCAB
        other = run(host, changed, new=1, logits_processor=[history])
        assert (out.logits[0] - other.logits[0]).abs().max() > 1e-3

    def test_dropped_chunks(self, host, crouter):
        history = make_history(host, crouter, window=WINDOW, keep_first=PREFIX, soft_prompts=False)
        ids, mask = prompt(70, 33)
        out = run(host, ids, mask, logits_processor=[history])
        assert_matches_reference(out, (70, 33), host, crouter, None)
        assert all(row.entries == 0 for row in history.report().rows)

    def test_dropped_chunks_without_a_crouter(self, host):
        history = make_history(host, None, window=8, soft_prompts=False)
        run(host, *prompt(100), new=3, logits_processor=[history])
        assert not history.report().chunks  # chunks of 512


class TestMemory:
    def test_full_history_never_stands_in_the_cache(self, host, history):
        seen = []
        host.model.layers[0].register_forward_hook(
            lambda m, a, k, o: seen.append(k["past_key_values"].get_seq_length()), with_kwargs=True
        )
        run(host, *prompt(400), logits_processor=[history])
        chunks = len(history.report().chunks)
        bound = PREFIX + LATENTS * chunks + WINDOW + CHUNK - 1
        assert max(seen) <= bound < 100
        assert history.report().peak_slots == max(seen)

    def test_report_bytes(self, host, history):
        run(host, *prompt(70), new=5, logits_processor=[history])
        report = history.report()
        per_slot = 2 * 2 * 2 * 8 * 4  # keys and values, layers, KV heads, head size, float32
        assert report.kv_bytes == report.peak_slots * per_slot
        assert report.kv_bytes_full == 74 * per_slot

    def test_report_without_residuals_rebuilds_nothing(self, host, crouter, history, monkeypatch):
        run(host, *prompt(70), new=5, logits_processor=[history])
        with monkeypatch.context() as patch:
            patch.setattr(type(crouter), "forward", None)  # any call would fail
            quick = history.report(measure=False)
        assert quick.chunks and all(chunk.reconstruction_nll is None for chunk in quick.chunks)
        report = history.report()
        assert (quick.rows, quick.kv_bytes) == (report.rows, report.kv_bytes)
        assert all(chunk.reconstruction_nll is not None for chunk in report.chunks)

    def test_capacity(self, crouter):
        host = tiny_host(positions=40)
        history = make(host, crouter)
        capacity = 9999
        with pytest.raises(CapacityError, match=r"at most (\d+) tokens") as error:
            run(host, *prompt(200), new=1, logits_processor=[history])
        capacity = int(str(error.value).split("at most ")[1].split()[0])
        run(host, *prompt(capacity), new=1, logits_processor=[history])
        with pytest.raises(CapacityError):
            run(host, *prompt(capacity + CHUNK), new=1, logits_processor=[history])
        dropped = make_history(host, crouter, window=WINDOW, keep_first=PREFIX, soft_prompts=False)
        run(host, *prompt(500), new=1, logits_processor=[dropped])


class TestScore:
    def test_equals_stepwise_decoding(self, host, history):
        ids, mask = prompt(70, 33)
        out = run(host, ids, mask, new=50, logits_processor=[history])
        mask = torch.cat([mask, torch.ones(2, 50, dtype=torch.long)], 1)
        score = history.score(out.sequences, last=50, attention_mask=mask)
        steps = torch.stack(out.scores, 1).log_softmax(-1).gather(2, out.sequences[:, -50:, None])[..., 0]
        assert score.dtype == torch.float32
        torch.testing.assert_close(score, steps, atol=1e-4, rtol=0)

    @pytest.mark.parametrize("last", [1, 30, 69])
    def test_any_length(self, host, crouter, last):
        history = make(host, crouter, copy=False)
        ids, _ = prompt(70)
        score = history.score(ids, last=last)
        for k in range(0, last, 7):
            row = ids[0, : 70 - last + k]
            logits = reference.next_logits(host, crouter, history.policy.compressor.projector, row, PREFIX, WINDOW)
            torch.testing.assert_close(score[0, k], logits.log_softmax(-1)[ids[0, 70 - last + k]], atol=1e-4, rtol=0)

    def test_a_later_id_changes_no_earlier_score(self, history):
        ids, _ = prompt(120)
        before = history.score(ids, last=100)
        for position in range(25, 120, 9):
            changed = ids.clone()
            changed[0, position] = (changed[0, position] + 1) % VOCAB
            after = history.score(changed, last=100)
            torch.testing.assert_close(before[:, : position - 20], after[:, : position - 20], atol=1e-5, rtol=0)
            assert (before[:, position - 20] - after[:, position - 20]).abs() > 1e-6

    def test_probabilities_sum_to_one(self, history):
        ids, _ = prompt(90)
        rows = ids.repeat(VOCAB, 1)
        rows[:, -1] = torch.arange(VOCAB)
        assert history.score(rows, last=1).exp().sum().item() == pytest.approx(1, abs=1e-5)

    def test_bounds(self, history):
        with pytest.raises(InputError, match="last"):
            history.score(prompt(20)[0], last=20)


class TestBadInput:
    @pytest.mark.parametrize(
        "options", [{"use_cache": False}, {"prefill_chunk_size": 16}], ids=["no cache", "prefill_chunk_size"]
    )
    def test_ways_to_generate(self, host, history, options):
        with pytest.raises(InputError):
            run(host, *prompt(70), logits_processor=[history], **options)

    def test_masks(self, host, history):
        ids, mask = prompt(70, 60)
        right, hole, empty = mask.flip(1), mask.clone(), mask.clone()
        hole[0, 30], empty[1] = 0, 0
        for bad, word in ((right, "right"), (hole, "holes"), (empty, "right|empty")):
            with pytest.raises(InputError, match=word):
                run(host, ids, bad, logits_processor=[history])

    def test_half_a_conversation_and_foreign_caches(self, host, history):
        plain = run(host, *prompt(70), new=3)
        turn = torch.cat([plain.sequences, prompt(10, seed=5)[0]], 1)
        with pytest.raises(InputError, match="uncompressed"):
            run(host, turn, logits_processor=[history], past_key_values=plain.past_key_values)
        ours = run(host, *prompt(70), new=3, logits_processor=[history])
        with pytest.raises(InputError, match="whole conversation"):
            mask = torch.ones_like(turn)
            run(host, turn[:, -10:], mask, logits_processor=[history], past_key_values=ours.past_key_values)
        with pytest.raises(InputError, match="CompressedHistory"):
            run(host, turn, past_key_values=ours.past_key_values)

    def test_latents_that_are_not_finite(self, host, crouter, history):
        encode = crouter.encode
        crouter.encode = lambda ids, *a, **k: (
            encode(ids, *a, **k) * torch.tensor([1.0, float("nan")])[: len(ids), None, None]
        )
        with pytest.raises(InputError, match=r"chunk 1 of row 0 \(tokens 19 to 35\)"):
            run(host, *prompt(PREFIX + 2 * CHUNK + WINDOW), logits_processor=[history])

    def test_arguments(self, host, crouter):
        for options in ({"window": 0}, {"keep_first": -1}, {"keep_first": "some"}):
            with pytest.raises(InputError):
                make(host, crouter, **options)
        with pytest.raises(InputError, match="decoder"):
            CompressedHistory(torch.nn.Linear(2, 2), crouter)
        with pytest.raises(MismatchError, match="hf-crouter align"):
            CompressedHistory(host, crouter, modes=[SoftPrompts()])

    def test_ids_outside_the_crouters_vocabulary(self, host):
        crouter = tiny_crouter(vocab_size=50)
        with pytest.raises(MismatchError, match="below 50"):
            run(host, *prompt(70), logits_processor=[make(host, crouter)])


class TestReport:
    def test_nothing_compressed_is_said_plainly(self, host, history):
        assert str(history.report()) == "Nothing was read yet."
        run(host, *prompt(10), new=2, logits_processor=[history])
        assert "Nothing was compressed" in str(history.report())

    def test_residuals_are_the_crouters(self, host, crouter, history):
        ids, _ = prompt(70)
        run(host, ids, new=2, logits_processor=[history])
        report = history.report()
        for chunk in report.chunks:
            out = crouter(ids[:, chunk.start : chunk.end])
            assert chunk.reconstruction_nll == pytest.approx(out.reconstruction_nll.item(), abs=1e-4)
            assert chunk.accuracy == pytest.approx(out.reconstruction_accuracy.item())
        assert report.to_dict()["chunks"][0]["end"] == PREFIX + CHUNK
        assert f"{PREFIX}-{PREFIX + CHUNK}" in str(report)


class TestCrossTokenizer:
    def test_spans_are_read_as_the_crouters_own_tokens(self):
        host_tokenizer, crouter_tokenizer = byte_tokenizer(400), byte_tokenizer(300)
        host, crouter = tiny_host(vocab_size=400), tiny_crouter(vocab_size=300)
        tokenizers = {"host_tokenizer": host_tokenizer, "crouter_tokenizer": crouter_tokenizer}
        projector = tiny_projector(host, crouter, **tokenizers)
        ids = torch.tensor([host_tokenizer.encode(TEXT)[:120]])
        with pytest.raises(MismatchError, match="both tokenizers"):
            make(host, crouter, soft_prompts=projector)
        options = {"tokenizer": host_tokenizer, "crouter_tokenizer": crouter_tokenizer, "soft_prompts": projector}
        history = make(host, crouter, **options)
        stepwise = run(host, ids[:, :60], new=60, logits_processor=[history])
        report = history.report()
        assert len(report.chunks) > 3 and report.chunks[0].start == PREFIX
        again = run(host, stepwise.sequences[:, :-1], new=1, logits_processor=[history])
        assert [(c.start, c.end) for c in history.report().chunks] == [(c.start, c.end) for c in report.chunks]
        torch.testing.assert_close(again.logits[0], stepwise.logits[-1], atol=1e-4, rtol=0)

        row, embed, parts = stepwise.sequences[0, :-1], host.get_input_embeddings(), []
        parts.append(embed(row[:PREFIX]))
        for chunk in report.chunks:
            text = host_tokenizer.decode(row[chunk.start : chunk.end])
            piece = torch.tensor([crouter_tokenizer.encode(text)])
            assert piece.shape[1] == chunk.tokens <= CHUNK
            parts.append(projector(crouter.encode(piece))[0])
        parts.append(embed(row[report.chunks[-1].end :]))
        assert len(parts[-1]) >= WINDOW
        logits = host(inputs_embeds=torch.cat(parts)[None], use_cache=False).logits[0, -1]
        torch.testing.assert_close(again.logits[0][0], logits, atol=1e-4, rtol=0)
        score = history.score(stepwise.sequences, last=60)
        steps = torch.stack(stepwise.scores, 1).log_softmax(-1).gather(2, stepwise.sequences[:, -60:, None])[..., 0]
        torch.testing.assert_close(score, steps, atol=1e-4, rtol=0)
