import pytest
import torch

from hf_crouter.errors import CapacityError, InputError
from hf_crouter.ngram.scorers import Bm25Scorer, RandomScorer, RecencyScorer

from .. import reference
from ..histories import PREFIX, WINDOW, run
from ..test_chunking import TEXT, byte_tokenizer
from ..tiny import CHUNK, LATENTS, VOCAB, make_history, prompt, tiny_crouter, tiny_host, tiny_projector

K, REFRESH, LAST = 2, 5, 12
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


def make(host, crouter, **options):
    """A history without copying, whose share in the scores has tests of its own."""
    defaults = {"window": WINDOW, "keep_first": PREFIX, "retrieve": K, "retrieve_every": REFRESH, "copy": False}
    options = {**defaults, "retrieve_scorer": Bm25Scorer(LAST), **options}
    if not options["retrieve"]:
        options = {name: value for name, value in options.items() if not name.startswith("retrieve")}
    return make_history(host, crouter, **options)


def expected_logits(history, host, crouter, row, prompt_length, options):
    k, every, last = options.get("retrieve", K), options.get("retrieve_every", REFRESH), options.get("last", LAST)
    raw = reference.retrieved(row.tolist(), prompt_length, PREFIX, CHUNK, WINDOW, k, every, last)
    compressor = history.policy.compressor
    projector = compressor.projector if compressor is not None else None
    return reference.next_logits(host, crouter, projector, row, PREFIX, WINDOW, raw)


def assert_matches_reference(out, lengths, history, host, crouter, **options):
    width = out.sequences.shape[1] - len(out.logits)
    for i, length in enumerate(lengths):
        for step, logits in enumerate(out.logits):
            row = out.sequences[i, width - length : width + step]
            expected = expected_logits(history, host, crouter, row, length, options)
            torch.testing.assert_close(logits[i], expected, atol=1e-4, rtol=0)


def chosen(history, row=0):
    """Choices of a row as (length, chunks)."""
    found = {}
    for record in history.report(measure=False).retrievals:
        if record.row == row:
            found.setdefault(record.length, []).append(record.chunk)
    return sorted(found.items())


class TestExactness:
    @pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gemma2"])
    @pytest.mark.parametrize("lengths", [(70,), (90, 33, 5)], ids=str)
    def test_every_step_equals_a_forward_from_scratch(self, family, lengths, crouter):
        host = tiny_host(family)
        history = make(host, crouter)
        out = run(host, *prompt(*lengths), logits_processor=[history])
        assert len({tuple(chunks) for _, chunks in chosen(history)}) > 2
        assert_matches_reference(out, lengths, history, host, crouter)

    @pytest.mark.parametrize("k", [1, 3, 50])
    @pytest.mark.parametrize("every", [1, 7, 1000])
    def test_any_number_and_any_refresh(self, host, crouter, k, every):
        history = make(host, crouter, retrieve=k, retrieve_every=every)
        out = run(host, *prompt(60), new=25, logits_processor=[history])
        assert_matches_reference(out, (60,), history, host, crouter, retrieve=k, retrieve_every=every)

    def test_without_soft_prompts(self, host, crouter):
        history = make(host, crouter, soft_prompts=False)
        out = run(host, *prompt(70, 33), logits_processor=[history])
        assert_matches_reference(out, (70, 33), history, host, crouter)

    def test_without_a_crouter_chunks_are_512_tokens(self):
        host = tiny_host(positions=4096)
        history = make_history(
            host, None, window=20, keep_first=2, soft_prompts=False, retrieve=1, retrieve_every=64, copy=False
        )
        out = run(host, *prompt(1100), new=3, logits_processor=[history])
        row = history.report().rows[0]
        assert (row.retrieved, row.entries) == (512, 0)
        raw = reference.retrieved(out.sequences[0, :1100].tolist(), 1100, 2, 512, 20, 1, 64, 128)
        start = 2 + 512 * raw[0]
        kept = [*range(2), *range(start, start + 512), *range(2 + 1024, 1100)]
        logits = host(out.sequences[:, kept], use_cache=False).logits[0, -1]
        torch.testing.assert_close(out.logits[0][0], logits, atol=1e-4, rtol=0)

    def test_nothing_retrieved_is_bit_for_bit_what_it_was(self, host, crouter, history):
        none = make(host, crouter, retrieve=0, retrieve_every=1)
        out = run(host, *prompt(70, 33), logits_processor=[none])
        width = out.sequences.shape[1] - len(out.logits)
        for step in (0, 7, 39):
            for i, length in enumerate((70, 33)):
                row = out.sequences[i, width - length : width + step]
                expected = reference.next_logits(host, crouter, none.policy.compressor.projector, row, PREFIX, WINDOW)
                torch.testing.assert_close(out.logits[step][i], expected, atol=1e-4, rtol=0)
        assert not none.report().retrievals and "retrieved" not in str(none.report())
        assert all(row.retrieved == 0 for row in none.report().rows)

    def test_before_anything_is_compressed_bit_identical_to_the_plain_host(self, host, history):
        ids, mask = prompt(10)
        new = WINDOW + CHUNK - 10 + PREFIX - 1
        bare, ours = run(host, ids, mask, new=new), run(host, ids, mask, new=new, logits_processor=[history])
        assert torch.equal(torch.stack(bare.logits), torch.stack(ours.logits))
        assert not history.report().retrievals

    def test_spans_still_cover_the_input_once_and_retrieved_ones_are_among_them(self, host, history):
        out = run(host, *prompt(90, 33, 5), logits_processor=[history])
        report, cache = history.report(), out.past_key_values
        for i, row in enumerate(report.rows):
            spans = [(c.start, c.end) for c in report.chunks if c.row == i]
            covered = list(range(row.prefix)) + [p for s in spans for p in range(*s)]
            covered += list(range(row.tokens - row.raw, row.tokens))
            assert covered == list(range(row.tokens))
            chunks = [cache.rows[i].chunks[n] for n in cache.rows[i].retrieved]
            back = [p for c in chunks for p in range(c.start, c.end)]
            codes = cache.layout[i][cache.layout[i] >= 0].tolist()
            assert codes == [*range(row.prefix), *back, *range(row.tokens - row.raw, row.tokens)]
            assert len(back) == row.retrieved and row.slots == int((cache.layout[i] != -1).sum())
        assert report.rows[0].retrieved == K * CHUNK

    def test_cross_tokenizer_stepwise_prefill_and_score(self):
        host_tokenizer, crouter_tokenizer = byte_tokenizer(400), byte_tokenizer(300)
        host, crouter = tiny_host(vocab_size=400), tiny_crouter(vocab_size=300)
        tokenizers = {"host_tokenizer": host_tokenizer, "crouter_tokenizer": crouter_tokenizer}
        options = {"tokenizer": host_tokenizer, "crouter_tokenizer": crouter_tokenizer, "copy": False, "window": 2}
        options |= {"keep_first": PREFIX, "retrieve": K, "retrieve_every": 9, "retrieve_scorer": Bm25Scorer(6)}
        projector, ids = tiny_projector(host, crouter, **tokenizers), torch.tensor([host_tokenizer.encode(TEXT)[:120]])
        history = make_history(host, crouter, soft_prompts=projector, **options)
        stepwise = run(host, ids[:, :60], new=60, logits_processor=[history])
        steps = chosen(history)
        assert len(steps) > 8
        for length, chunks in steps[1:]:  # the last choice before a prompt's end is the same made there at once
            run(host, stepwise.sequences[:, :length], new=1, logits_processor=[history])
            assert chosen(history) == [(length, chunks)]
        score = history.score(stepwise.sequences, last=60)
        assert chosen(history) == [s for s in steps if s[0] < 120]
        logp = torch.stack(stepwise.logits, 1).log_softmax(-1).gather(2, stepwise.sequences[:, -60:, None])[..., 0]
        torch.testing.assert_close(score, logp, atol=1e-4, rtol=0)
        drafted = run(host, ids[:, :60], new=60, logits_processor=[history], prompt_lookup_num_tokens=4)
        assert torch.equal(stepwise.sequences, drafted.sequences)


class TestModes:
    @pytest.mark.parametrize("options", [{"num_return_sequences": 3}, {"repetition_penalty": 1.3}], ids=str)
    def test_sampling(self, host, crouter, history, options):
        torch.manual_seed(0)
        out = run(host, *prompt(70), logits_processor=[history], **{"do_sample": True, **options})
        assert_matches_reference(out, [70] * len(out.sequences), history, host, crouter)

    def test_beams_equal_beams_that_always_start_over(self, host, crouter, history):
        ids, mask = prompt(60, 30)
        out = run(host, ids, mask, new=25, num_beams=3, logits_processor=[history], output_scores=True)
        full = torch.cat([mask, torch.ones(2, 25, dtype=torch.long)], 1)
        score = history.score(out.sequences, last=25, attention_mask=full)
        torch.testing.assert_close(out.sequences_scores, score.mean(1), atol=1e-4, rtol=0)
        for i, length in enumerate((60, 30)):
            for step in (0, 9, 24):
                row = out.sequences[i, 60 - length : 60 + step]
                logits = expected_logits(history, host, crouter, row, length, {})
                expected = logits.log_softmax(-1)[out.sequences[i, 60 + step]]
                torch.testing.assert_close(score[i, step], expected, atol=1e-4, rtol=0)

    @pytest.mark.parametrize("length", [59, 60, 61, 62, 63, 70])
    def test_prompt_lookup_equals_greedy(self, host, history, length):
        ids, _ = prompt(length)
        ids[:, -20:] = ids[:, -40:-20]
        greedy = run(host, ids, new=50, logits_processor=[history])
        drafted = run(host, ids, new=50, logits_processor=[history], prompt_lookup_num_tokens=4)
        assert torch.equal(greedy.sequences, drafted.sequences)
        torch.testing.assert_close(torch.stack(greedy.logits), torch.stack(drafted.logits), atol=1e-4, rtol=0)

    @pytest.mark.parametrize("family", ["llama", "gemma2"])
    def test_assistant_model_equals_greedy(self, crouter, family):
        host = tiny_host(family)
        history, ids = make(host, crouter), prompt(70)[0]
        greedy = run(host, ids, logits_processor=[history])
        assisted = run(host, ids, logits_processor=[history], assistant_model=tiny_host(seed=3))
        assert torch.equal(greedy.sequences, assisted.sequences)

    @pytest.mark.parametrize("lengths", [(70, 33), (20,), (43,)], ids=str)
    @pytest.mark.parametrize("k", [2, 50])
    def test_static_cache(self, host, crouter, lengths, k):
        history = make(host, crouter, retrieve=k)
        ids, mask = prompt(*lengths)
        greedy = run(host, ids, mask, logits_processor=[history])
        static = run(host, ids, mask, logits_processor=[history], cache_implementation="static")
        torch.testing.assert_close(torch.stack(greedy.logits), torch.stack(static.logits), atol=1e-4, rtol=0)

    @pytest.mark.parametrize("options", [{}, {"soft_prompts": False}, {"soft_prompts": False, "compact": 4}], ids=str)
    def test_many_rows_are_read_in_parts(self, host, crouter, options, monkeypatch):
        prompts, sizes = prompt(90, 64, 77, 90, 33), []
        handle = host.model.register_forward_pre_hook(
            lambda module, args, kwargs: sizes.append(kwargs["position_ids"].numel()), with_kwargs=True
        )
        whole = run(host, *prompts, new=20, logits_processor=[make(host, crouter, **options)])
        most = max(sizes)
        sizes.clear()
        monkeypatch.setattr("hf_crouter.cache.prefill.READ_TOKENS", 100)
        history = make(host, crouter, **options)
        parts = run(host, *prompts, new=20, logits_processor=[history])
        handle.remove()
        torch.testing.assert_close(torch.stack(parts.logits), torch.stack(whole.logits), atol=1e-4, rtol=0)
        if "compact" not in options:  # pairs are made in reads of their own
            assert max(sizes) <= 100 < most
        assert parts.past_key_values.layout.equal(whole.past_key_values.layout)

    def test_rows_of_a_batch_choose_in_the_same_step(self, host, crouter):
        history = make(host, crouter, retrieve_every=7)
        run(host, *prompt(70, 70 - CHUNK), new=30, logits_processor=[history])
        steps = [set(), set()]
        for record in history.report().retrievals:
            steps[record.row].add(record.length - (70, 70 - CHUNK)[record.row])
        assert steps[0] == steps[1] and {0, 7, 14, 21, 28} <= steps[0]

    @pytest.mark.parametrize("extra", [0, 3, 25, 110])
    def test_a_later_turn_equals_from_scratch(self, host, crouter, history, extra):
        first = run(host, *prompt(70), new=20, logits_processor=[history])
        turn = torch.cat([first.sequences, prompt(extra + 1, seed=5)[0]], 1)
        cache = first.past_key_values
        again = run(host, turn, new=20, logits_processor=[history], past_key_values=cache)
        choices = chosen(history)
        scratch = run(host, turn, new=20, logits_processor=[history])
        assert choices == chosen(history)
        torch.testing.assert_close(torch.stack(again.logits), torch.stack(scratch.logits), atol=1e-4, rtol=0)
        assert again.past_key_values is cache
        assert_matches_reference(again, [turn.shape[1]], history, host, crouter)

    @pytest.mark.parametrize("edited", [1, 10, 60, 85])
    def test_an_edited_conversation_on_an_old_cache(self, host, history, edited):
        first = run(host, *prompt(70), new=20, logits_processor=[history])
        turn = first.sequences.clone()
        turn[0, edited] = (turn[0, edited] + 1) % VOCAB
        turn = turn[:, : max(60, edited + 1)]
        again = run(host, turn, new=20, logits_processor=[history], past_key_values=first.past_key_values)
        scratch = run(host, turn, new=20, logits_processor=[history])
        torch.testing.assert_close(torch.stack(again.logits), torch.stack(scratch.logits), atol=1e-4, rtol=0)

    def test_a_later_turn_of_a_padded_batch(self, host, history):
        ids, mask = prompt(70, 33)
        first = run(host, ids, mask, new=20, logits_processor=[history])
        turn = torch.cat([first.sequences, prompt(30, 30, seed=5)[0]], 1)
        mask = torch.cat([mask, torch.ones(2, 50, dtype=torch.long)], 1)
        again = run(host, turn, mask, logits_processor=[history], past_key_values=first.past_key_values)
        scratch = run(host, turn, mask, logits_processor=[history])
        torch.testing.assert_close(torch.stack(again.logits), torch.stack(scratch.logits), atol=1e-4, rtol=0)

    @pytest.mark.parametrize("scorer", [RandomScorer(3), RecencyScorer()], ids=type)
    def test_any_scorer_gives_the_same_in_steps_and_at_once(self, host, crouter, scorer):
        history = make(host, crouter, retrieve_scorer=scorer)
        out = run(host, *prompt(70), logits_processor=[history])
        score = history.score(out.sequences, last=40)
        steps = torch.stack(out.logits, 1).log_softmax(-1).gather(2, out.sequences[:, -40:, None])[..., 0]
        torch.testing.assert_close(score, steps, atol=1e-4, rtol=0)


class TestScore:
    def test_equals_stepwise_decoding(self, host, history):
        ids, mask = prompt(70, 33)
        out = run(host, ids, mask, new=50, logits_processor=[history])
        steps = {i: chosen(history, i) for i in (0, 1)}
        mask = torch.cat([mask, torch.ones(2, 50, dtype=torch.long)], 1)
        score = history.score(out.sequences, last=50, attention_mask=mask)
        assert {i: chosen(history, i) for i in (0, 1)} == steps
        steps = torch.stack(out.logits, 1).log_softmax(-1).gather(2, out.sequences[:, -50:, None])[..., 0]
        torch.testing.assert_close(score, steps, atol=1e-4, rtol=0)

    @pytest.mark.parametrize("last", [1, 30, 69])
    def test_equals_the_reference(self, host, crouter, history, last):
        ids, _ = prompt(90)
        score = history.score(ids, last=last)
        for k in range(0, last, 7):
            row = ids[0, : 90 - last + k]
            logits = expected_logits(history, host, crouter, row, 90 - last, {})
            torch.testing.assert_close(score[0, k], logits.log_softmax(-1)[ids[0, 90 - last + k]], atol=1e-4, rtol=0)

    def test_a_later_id_changes_no_earlier_score(self, history):
        ids, _ = prompt(120)
        before = history.score(ids, last=100)
        for position in range(25, 120, 9):
            changed = ids.clone()
            changed[0, position] = (changed[0, position] + 1) % VOCAB
            after = history.score(changed, last=100)
            torch.testing.assert_close(before[:, : position - 20], after[:, : position - 20], atol=1e-5, rtol=0)

    def test_with_copying(self, host, crouter):
        history = make(host, crouter, copy=True)
        ids, mask = prompt(70, 33)
        ids[:, -20:] = ids[:, -40:-20]
        out = run(host, ids, mask, logits_processor=[history])
        mask = torch.cat([mask, torch.ones(2, 40, dtype=torch.long)], 1)
        score = history.score(out.sequences, last=40, attention_mask=mask)
        steps = torch.stack(out.scores, 1).log_softmax(-1).gather(2, out.sequences[:, -40:, None])[..., 0]
        assert (torch.stack(out.scores) - torch.stack(out.logits).log_softmax(-1)).abs().max() > 1e-3
        torch.testing.assert_close(score, steps, atol=1e-4, rtol=0)


class TestLimits:
    @pytest.mark.parametrize("soft", [True, False])
    @pytest.mark.parametrize("positions", [30, 50, 60, 70, 90])
    def test_capacity(self, crouter, positions, soft):
        host = tiny_host(positions=positions)
        history = make(host, crouter, soft_prompts=soft)
        try:
            run(host, *prompt(PREFIX + WINDOW + 24 * CHUNK - 1), new=1, logits_processor=[history])
            assert not soft and positions >= PREFIX + WINDOW + CHUNK - 1 + K * CHUNK
            return
        except CapacityError as error:
            assert f"{K} retrieved chunks" in str(error)
            capacity = int(str(error).split("at most ")[1].split()[0])
        for length in range(max(1, capacity - 2 * CHUNK), capacity + 1):
            run(host, *prompt(length), new=1, logits_processor=[history])
        refused = 0
        for length in range(capacity + 1, capacity + CHUNK + 1):
            try:
                run(host, *prompt(length), new=1, logits_processor=[history])
            except CapacityError:
                refused += 1
        assert refused

    def test_full_history_never_stands_in_the_cache(self, host, history):
        seen = []
        host.model.layers[0].register_forward_hook(
            lambda m, a, k, o: seen.append(k["past_key_values"].get_seq_length()), with_kwargs=True
        )
        run(host, *prompt(400), logits_processor=[history])
        bound = PREFIX + LATENTS * len(history.report().chunks) + K * CHUNK + WINDOW + CHUNK - 1
        assert max(seen) <= bound
        assert history.report().peak_slots == max(seen)

    def test_a_choice_that_stays_is_not_computed_again(self, host, crouter):
        history, columns = make(host, crouter, retrieve_scorer=RecencyScorer(), retrieve_every=1), []
        host.model.layers[0].register_forward_hook(lambda m, a, o: columns.append(a[0].shape[1]))
        run(host, *prompt(70), new=CHUNK, logits_processor=[history])
        assert sum(count > 1 for count in columns[2:]) == 1  # only at the one compaction


class TestBadInput:
    def test_arguments(self, host, crouter, tmp_path):
        with pytest.raises(InputError, match="chunks=.: expected"):
            make(host, crouter, retrieve=-1)
        with pytest.raises(InputError, match="every=.: expected"):
            make(host, crouter, retrieve_every=0)
        with pytest.raises(InputError, match="scorer=.: expected"):
            make(host, crouter, retrieve_scorer=3)
        with pytest.raises(InputError, match="last: expected"):
            Bm25Scorer(0)

    @pytest.mark.parametrize("value", [[1.0], float("nan")])
    def test_a_scorer_that_gives_no_scores(self, host, crouter, value):
        class Broken:
            def scores(self, index, recent_ids):
                return torch.zeros(len(index)).numpy() + value if isinstance(value, float) else value

        history = make(host, crouter, retrieve_scorer=Broken())
        with pytest.raises(InputError, match="finite scores"):
            run(host, *prompt(70), logits_processor=[history])


class TestReport:
    def test_what_was_retrieved_when_and_why(self, host, crouter):
        history = make(host, crouter, retrieve_scorer=Bm25Scorer(LAST, recency=0.5))
        out = run(host, *prompt(70), new=20, logits_processor=[history])
        report = history.report()
        record = report.retrievals[0]
        assert record.length == 70 and record.reason.startswith("bm25 ") and ", recency " in record.reason
        ids = out.sequences[0, :70].tolist()
        chunks = [[ids[p] for p in c] for c in reference.pieces(70, PREFIX, CHUNK, WINDOW)[1]]
        expected = reference.bm25(chunks, ids[-LAST:])
        assert record.scores["bm25"] == pytest.approx(expected[record.chunk])
        assert record.scores["recency"] == pytest.approx(max(expected) * 0.5 / (len(chunks) - record.chunk))
        text = str(report)
        assert (
            f"{K * CHUNK} retrieved" in text
            and "retrieved at 85 tokens: chunks" in text
            and len(text.splitlines()) < 12
        )
        assert report.to_dict()["retrievals"][0]["length"] == 70

    def test_a_later_call_reports_its_own_choices(self, host, history):
        first = run(host, *prompt(70), new=20, logits_processor=[history])
        run(host, first.sequences, new=3, logits_processor=[history], past_key_values=first.past_key_values)
        assert [length for length, _ in chosen(history)][0] == 90
