import numpy as np
import pytest
import torch
from transformers import LogitsProcessorList

from hf_crouter.errors import InputError
from hf_crouter.history import attach
from hf_crouter.modes import Copy, SoftPrompts
from hf_crouter.ngram.archive import Archive
from hf_crouter.ngram.candidates import collect
from hf_crouter.ngram.mixture import mix

from .. import reference
from ..tiny import CHUNK, VOCAB, make_history, tiny_crouter, tiny_host, tiny_projector
from .copying import NEW, PREFIX, WINDOW, eager_gate, evidence, expected_step, gate_of, make, repetitive, run

torch.set_num_threads(1)


@pytest.fixture
def host():
    host = tiny_host()
    host.generation_config.eos_token_id = None  # every call gives all its tokens
    return host


@pytest.fixture
def crouter():
    return tiny_crouter()


class TestMixture:
    @pytest.mark.parametrize("lengths", [(90,), (90, 47, 5)], ids=str)
    def test_every_step_equals_brute_force(self, host, crouter, lengths):
        history = make(host, crouter)
        ids, mask = repetitive(*lengths)
        out = run(host, ids, mask, logits_processor=[history])
        width, changed = ids.shape[1], 0
        for i, length in enumerate(lengths):
            for step in range(NEW):
                row = out.sequences[i, width - length : width + step]
                _, chunks, _ = reference.pieces(len(row), PREFIX, CHUNK, WINDOW)
                archive = [int(row[p]) for chunk in chunks for p in chunk if p < length]
                got = out.scores[step][i].log_softmax(-1)
                wanted = out.logits[step][i].log_softmax(-1)
                if archive:
                    wanted = expected_step(
                        row.tolist(), archive, out.logits[step][i], gate_of(history), start=chunks[-1][-1] + 1
                    )
                torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
                changed += bool((got - out.logits[step][i].log_softmax(-1)).abs().max() > 0.1)
        assert changed > NEW // 2

    def test_score_equals_stepwise_decoding(self, host, crouter):
        history = make(host, crouter)
        ids, mask = repetitive(90, 47)
        out = run(host, ids, mask, logits_processor=[history])
        mask = torch.cat([mask, torch.ones(2, NEW, dtype=torch.long)], 1)
        score, greedy = history.score(out.sequences, last=NEW, attention_mask=mask, greedy=True)
        steps = torch.stack(out.scores, 1).log_softmax(-1).gather(2, out.sequences[:, -NEW:, None])[..., 0]
        torch.testing.assert_close(score, steps, atol=1e-4, rtol=1e-4)
        assert greedy.all()  # the tokens were chosen greedily from the mixture

    def test_probabilities_sum_to_one(self, host, crouter):
        history = make(host, crouter)
        rows = repetitive(90)[0].repeat(VOCAB, 1)
        rows[:, -1] = torch.arange(VOCAB)
        assert history.score(rows, last=1).exp().sum().item() == pytest.approx(1, abs=1e-5)

    def test_a_later_id_changes_no_earlier_score(self, host, crouter):
        history = make(host, crouter, copy_generated=True)
        ids, _ = repetitive(120)
        before = history.score(ids, last=100)
        for position in range(25, 120, 13):
            changed = ids.clone()
            changed[0, position] = 5 + (changed[0, position] - 4) % (VOCAB - 5)
            after = history.score(changed, last=100)
            torch.testing.assert_close(before[:, : position - 20], after[:, : position - 20], atol=1e-5, rtol=0)

    @pytest.mark.parametrize("retrieve", [0, 2])
    def test_rows_with_prompts_of_their_own_score_as_they_do_alone(self, host, crouter, retrieve):
        history = make(host, crouter, retrieve=retrieve)
        ids, mask = repetitive(150, 97)
        lasts = [8, 60]
        together = history.score(ids, lasts, mask)
        for i, (length, last) in enumerate(zip((150, 97), lasts, strict=True)):
            alone = history.score(ids[i : i + 1, 150 - length :], last)
            torch.testing.assert_close(together[i, -last:], alone[0], atol=1e-4, rtol=1e-4)
        with pytest.raises(InputError, match="one for each of 2 rows"):
            history.score(ids, [8], mask)

    def test_a_given_text_is_archived_as_it_is_read(self, host, crouter):
        history = make(host, crouter, copy_gate=eager_gate(bias=-8.0))
        text = torch.from_numpy(np.tile(np.random.default_rng(3).permutation(np.arange(5, 90))[:70], 3))[None]
        said, given = history.score(text, last=200), history.score(text, last=200, archive_scored=True)
        assert torch.equal(said[0, :15], given[0, :15])
        assert given[0, -60:].mean() > said[0, -60:].mean() + 1  # what it repeats is copied
        again = make(host, crouter, copy_gate=eager_gate(bias=-8.0), copy_generated=True).score(text, last=200)
        torch.testing.assert_close(again, given)

    def test_the_mixture_is_a_distribution_whose_parts_agree(self):
        torch.manual_seed(0)
        archive = Archive.empty(VOCAB).extended(repetitive(80)[0][0].numpy())
        suffixes = [repetitive(60, seed=n)[0][0].numpy() for n in range(6)] + [archive.ids[:30].astype(int)]
        scores = torch.randn(len(suffixes), VOCAB)
        mixture = mix(scores, collect([evidence(archive, s) for s in suffixes]), eager_gate())
        whole = mixture.log_probabilities(scores)
        torch.testing.assert_close(whole.exp().sum(-1), torch.ones(len(suffixes)))
        for token in range(0, VOCAB, 5):
            targets = torch.full((len(suffixes),), token)
            torch.testing.assert_close(mixture.of(targets, scores), whole[:, token])
        assert mixture.greedy().tolist() == whole.argmax(-1).tolist()

    @pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
    def test_strength_scales_what_is_copied(self, strength):
        archive = Archive.empty(VOCAB).extended(repetitive(80)[0][0].numpy())
        known = [evidence(archive, archive.ids[20:50])]
        scores = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(0))
        full, part = (mix(scores, collect(known), eager_gate(), s) for s in (1.0, strength))
        assert part.share.item() == pytest.approx(strength * full.share.item(), abs=1e-5)
        assert part.log_probabilities(scores).exp().sum().item() == pytest.approx(1, abs=1e-5)

    def test_a_gate_that_copies_nothing_leaves_the_host(self, host, crouter):
        ids, _ = repetitive(90)
        never = run(host, ids, logits_processor=[make(host, crouter, copy_gate=eager_gate(bias=1e4))])
        off = run(host, ids, logits_processor=[make(host, crouter, copy=False)])
        assert torch.equal(never.sequences, off.sequences)
        assert all(torch.equal(a, b) for a, b in zip(off.scores, off.logits, strict=True))


class TestModes:
    def test_beams(self, host, crouter):
        history = make(host, crouter)
        ids, mask = repetitive(90, 47)
        beams = {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.0, "early_stopping": True}
        out = run(host, ids, mask, logits_processor=[history], **beams)
        mask = torch.cat([mask.repeat_interleave(2, 0), torch.ones(4, NEW, dtype=torch.long)], 1)
        score = history.score(out.sequences, last=NEW, attention_mask=mask).sum(-1)
        torch.testing.assert_close(out.sequences_scores, score, atol=2e-3, rtol=1e-4)

    def test_sampling_draws_from_the_mixture(self, host, crouter):
        history = make(host, crouter)
        ids, _ = repetitive(90)
        torch.manual_seed(0)
        out = run(host, ids, logits_processor=[history], do_sample=True, temperature=1.0, top_k=0)
        score = history.score(out.sequences, last=NEW)
        steps = torch.stack(out.scores, 1).log_softmax(-1).gather(2, out.sequences[:, -NEW:, None])[..., 0]
        torch.testing.assert_close(score, steps, atol=1e-4, rtol=1e-4)

    def test_several_sequences_of_a_prompt(self, host, crouter):
        history = make(host, crouter)
        torch.manual_seed(1)
        out = run(host, repetitive(90)[0], logits_processor=[history], do_sample=True, top_k=0, num_return_sequences=3)
        steps = torch.stack(out.scores, 1).log_softmax(-1).gather(2, out.sequences[:, -NEW:, None])[..., 0]
        torch.testing.assert_close(history.score(out.sequences, last=NEW), steps, atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("generated", [False, True])
    def test_drafts_of_prompt_lookup_change_no_token(self, host, crouter, generated):
        history = make(host, crouter, copy_generated=generated, window=24)
        ids, _ = repetitive(90)
        plain = run(host, ids, logits_processor=[history])
        single = history.report(measure=False)
        assert single.steps == single.generated == plain.sequences.shape[1] - ids.shape[1]
        drafted = run(host, ids, logits_processor=[history], prompt_lookup_num_tokens=4)
        assert torch.equal(plain.sequences, drafted.sequences)
        report = history.report(measure=False)
        assert 1 <= report.steps < report.generated == single.generated
        assert f"{report.generated} tokens in {report.steps} steps of the host, " in str(report)

    def test_an_assistant_that_is_handed_the_processor_ignores_it(self, host, crouter):
        history = make(host, crouter, window=24)
        ids, _ = repetitive(90)
        plain = run(host, ids, logits_processor=[history])
        assistant = tiny_host(seed=3)
        seen = []
        forward = assistant.forward
        assistant.forward = lambda *a, **k: seen.append(1) or forward(*a, **k)
        assisted = run(host, ids, logits_processor=[history], assistant_model=assistant)
        assert seen and torch.equal(plain.sequences, assisted.sequences)

    def test_attach_copies_as_well(self, host, crouter):
        ids, _ = repetitive(90)
        passed = run(host, ids, logits_processor=[make(host, crouter)])
        modes = [SoftPrompts(tiny_projector(host, crouter)), Copy(gate=eager_gate())]
        with attach(host, crouter, modes=modes, window=WINDOW, keep_first=PREFIX):
            attached = run(host, ids)
        assert torch.equal(passed.sequences, attached.sequences)

    def test_without_a_crouter(self, host):
        history = make_history(
            host, None, soft_prompts=False, window=WINDOW, keep_first=PREFIX, copy_gate=eager_gate()
        )
        ids = repetitive(1100)[0] if host.config.max_position_embeddings > 1100 else None
        assert ids is None or run(host, ids, logits_processor=[history])
        assert gate_of(history) is not None


class TestManners:
    def test_nothing_is_copied_before_the_first_compaction(self, host, crouter):
        ids, _ = repetitive(PREFIX + WINDOW + CHUNK - 1 - 5)
        plain = run(host, ids, max_new_tokens=5)
        ours = run(host, ids, max_new_tokens=5, logits_processor=[make(host, crouter)])
        assert torch.equal(plain.sequences, ours.sequences)
        assert all(torch.equal(a, b) for a, b in zip(plain.scores, ours.scores, strict=True))

    def test_forbidden_tokens_stay_forbidden(self, host, crouter):
        history = make(host, crouter)
        ids, _ = repetitive(90)
        often = [[int(t)] for t in torch.bincount(ids[0]).topk(12).indices]
        out = run(host, ids, logits_processor=[history], bad_words_ids=often)
        assert not set(out.sequences[0, 90:].tolist()) & {t for (t,) in often}
        for scores in out.scores:
            assert torch.isneginf(scores[0, [t for (t,) in often]]).all()
            assert scores[0].isfinite().any()

    @pytest.mark.parametrize("kind", ["sequence_bias", "finfo", "-1e4", "bias up", "repetition_penalty"])
    def test_what_was_done_to_a_score_is_done_to_its_copied_share(self, host, crouter, kind):
        history, ids = make(host, crouter), repetitive(90)[0]
        often = torch.bincount(ids[0]).topk(12).indices
        free = run(host, ids, logits_processor=[history])
        assert torch.isin(free.sequences[0, 90:], often).sum() > 5

        class Adds:
            def __init__(self, amount):
                self.amount = amount

            def __call__(self, input_ids, scores):
                scores[:, often] += self.amount  # in place, as some do
                return scores

        class Lowest:
            def __call__(self, input_ids, scores):
                return scores.index_fill(1, often, torch.finfo(scores.dtype).min)

        before, options = [], {}
        if kind == "sequence_bias":
            options = {"sequence_bias": [[[int(token)], -1e9] for token in often]}
        elif kind == "repetition_penalty":
            options = {"repetition_penalty": 1e6}
        else:
            before = [Lowest() if kind == "finfo" else Adds(3.0 if kind == "bias up" else -1e4)]
        out = run(host, ids, logits_processor=[*before, history], **options)
        plain = run(host, ids, logits_processor=[*before], **options)
        if kind not in ("bias up", "repetition_penalty"):
            assert not torch.isin(out.sequences[0, 90:], often).any()
            assert not torch.isin(plain.sequences[0, 90:], often).any()
        end = PREFIX + (90 - PREFIX - WINDOW) // CHUNK * CHUNK
        raw = out.logits[0][0].clone()
        if before and kind != "finfo":
            raw[often] -= before[0].amount  # `generate` keeps what was written into
        done = torch.zeros_like(raw)
        if kind == "repetition_penalty":
            seen = ids[0].unique()
            done[seen] = torch.where(raw[seen] < 0, raw[seen] * 1e6, raw[seen] / 1e6) - raw[seen]
        else:
            done[often] = {"bias up": 3.0}.get(kind, -1e4)
        expected = expected_step(ids[0], ids[0, PREFIX:end], raw, gate_of(history)) + done
        torch.testing.assert_close(out.scores[0][0].softmax(-1), expected.softmax(-1), atol=1e-4, rtol=0)

    def test_allowed_prefixes_and_minimum_length(self, host, crouter):
        ids, _ = repetitive(90)
        allowed = list(range(5, 12))
        history = make(host, crouter)
        out = run(host, ids, logits_processor=[history], prefix_allowed_tokens_fn=lambda batch, row: allowed)
        assert set(out.sequences[0, 90:].tolist()) <= set(allowed)
        host.generation_config.eos_token_id = 2
        out = run(host, ids, logits_processor=[history], min_new_tokens=NEW)
        assert out.sequences.shape[1] == 90 + NEW and 2 not in out.sequences[0, 90:]

    def test_a_call_teaches_nothing(self, host, crouter):
        history = make(host, crouter)
        first = run(host, repetitive(90)[0], logits_processor=[history])
        run(host, repetitive(120, seed=4)[0], logits_processor=[history])
        again = run(host, repetitive(90)[0], logits_processor=[history])
        assert all(torch.equal(a, b) for a, b in zip(first.scores, again.scores, strict=True))

    def test_made_up_scores_and_ids_teach_nothing(self, host, crouter):
        history, ids = make(host, crouter), repetitive(90)[0]
        plain = run(host, ids, logits_processor=[history])

        class Asks:
            def __call__(self, input_ids, scores):
                history(input_ids.flip(1), torch.zeros_like(scores))
                return scores

        asked = run(host, ids, logits_processor=LogitsProcessorList([Asks(), history]))
        assert torch.equal(plain.sequences, asked.sequences)

    def test_special_tokens_are_never_copied(self, host, crouter):
        ids, _ = repetitive(90)
        ids[0, 10::9] = 2  # an end token after every phrase
        history = make(host, crouter, copy_gate=eager_gate(bias=-8.0))
        host.generation_config.eos_token_id = 2
        out = run(host, ids, logits_processor=[history], max_new_tokens=3)
        for logits, scores in zip(out.logits, out.scores, strict=True):
            assert scores.log_softmax(-1)[0, 2] <= logits.log_softmax(-1)[0, 2] + 1e-5

    def test_generated_tokens_are_copied_only_where_asked_for(self, host, crouter):
        ids, _ = repetitive(40)
        longer = torch.cat([ids, repetitive(60, seed=9)[0]], 1)  # the scored part repeats itself
        scores = {kept: make(host, crouter, copy_generated=kept).score(longer, last=60) for kept in (False, True)}
        assert torch.equal(scores[False][0, :19], scores[True][0, :19])
        assert scores[True][0, 40:].mean() > scores[False][0, 40:].mean() + 0.05

    def test_excluded_spans_are_read_but_not_copied(self, host, crouter):
        ids, _ = repetitive(120)
        ids[0, 30:40] = torch.arange(60, 70)  # the secret, said once
        ids[0, -3:] = torch.arange(60, 63)
        shown, hidden = (make(host, crouter, copy_exclude=spans) for spans in ([], [(30, 40)]))
        step = {"max_new_tokens": 1}
        told = run(host, ids, logits_processor=[shown], **step)
        kept = run(host, ids, logits_processor=[hidden], **step)
        assert told.scores[0].log_softmax(-1)[0, 63] > told.logits[0].log_softmax(-1)[0, 63] + 1
        assert kept.scores[0].log_softmax(-1)[0, 63] <= kept.logits[0].log_softmax(-1)[0, 63] + 1e-4
