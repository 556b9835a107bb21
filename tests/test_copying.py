import json

import numpy as np
import pytest
import torch
from tokenizers import AddedToken
from transformers import LogitsProcessorList

from hf_crouter.errors import InputError, MismatchError
from hf_crouter.history import attach
from hf_crouter.hosts.fingerprint import host_fingerprint
from hf_crouter.hosts.tokenizers import special_ids
from hf_crouter.modes import Copy, SoftPrompts
from hf_crouter.ngram.archive import ORDERS, Archive, Matches
from hf_crouter.ngram.gate import Gate, GateConfig, find_gate
from hf_crouter.ngram.mixture import collect, gate_features, mix, view_host
from hf_crouter.ngram.row_archive import Archives
from hf_crouter.types import Chunk, Row

from . import reference
from .ngram.reference import SlowArchive
from .tiny import CHUNK, VOCAB, make_history, tiny_crouter, tiny_host, tiny_projector

WINDOW, PREFIX = 8, 3
NEW = 30
OPTIONS = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True, "output_scores": True,
           "max_new_tokens": NEW, "pad_token_id": 0}  # fmt: skip
torch.set_num_threads(1)


def eager_gate(bias=-1.0, **config):
    """A gate that copies a lot, and differently in each place."""
    torch.manual_seed(5)
    gate = Gate(GateConfig(**config))
    torch.nn.init.normal_(gate.down.weight, std=0.5)
    with torch.no_grad():
        gate.down.bias[0] = bias
    return gate.eval()


def repetitive(*lengths, seed=0):
    """Left-padded rows that say the same things again and again, with variations; no special tokens."""
    drawn = np.random.default_rng(seed)
    rows = []
    for length in lengths:
        phrases = [drawn.integers(5, VOCAB, 7) for _ in range(4)]
        row = np.concatenate([phrases[i] for i in drawn.integers(0, 4, length // 7 + 1)])[:length]
        row[drawn.random(length) < 0.1] = drawn.integers(5, VOCAB)
        rows.append(row)
    width = max(lengths)
    ids = np.stack([np.pad(row, (width - len(row), 0)) for row in rows])
    mask = np.stack([np.arange(width) >= width - len(row) for row in rows])
    return torch.from_numpy(ids), torch.from_numpy(mask).long()


@pytest.fixture
def host():
    host = tiny_host()
    host.generation_config.eos_token_id = None  # every call gives all its tokens
    return host


@pytest.fixture
def crouter():
    return tiny_crouter()


def gate_of(history):
    return next(mode.gate for mode in history.modes if isinstance(mode, Copy))


def make(host, crouter, **options):
    defaults = {"window": WINDOW, "keep_first": PREFIX}
    if options.get("copy", True):
        defaults["copy_gate"] = eager_gate()
    return make_history(host, crouter, **{**defaults, **options})


def run(host, ids, mask=None, **options):
    mask = torch.ones_like(ids) if mask is None else mask
    return host.generate(ids, attention_mask=mask, **{**OPTIONS, **options})


def expected_step(row, archive, logits, gate, stop=(0, 1, 2)):
    """The mixture by brute force: slow matches, a loop over every candidate."""
    slow = SlowArchive(frozenset(stop)).extended(archive)
    length, positions, followers, counts = slow.match(row[-64:], ORDERS, 64)
    match = Matches(length, np.array(positions), tuple(np.array(list(f), np.int64) for f in followers),
                    tuple(np.array(list(f.values()), np.float32) for f in followers), tuple(counts))  # fmt: skip
    candidates = collect([match])
    view, _ = view_host(logits[None], candidates)
    weights = gate(gate_features(candidates, view), candidates.available)[0].exp()
    total = weights[0] * logits.softmax(-1)
    for k in range(len(ORDERS)):
        if k < len(match.tokens) and len(match.tokens[k]):
            share = match.weights[k] / match.weights[k].sum()
            for token, part in zip(match.tokens[k].tolist(), share.tolist(), strict=True):
                total[token] = total[token] + weights[k + 1] * part
    return total.log()


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
                    wanted = expected_step(row.tolist(), archive, out.logits[step][i], gate_of(history))
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
        mixture = mix(scores, collect([archive.match(s) for s in suffixes]), eager_gate())
        whole = mixture.log_probabilities(scores)
        torch.testing.assert_close(whole.exp().sum(-1), torch.ones(len(suffixes)))
        for token in range(0, VOCAB, 5):
            targets = torch.full((len(suffixes),), token)
            torch.testing.assert_close(mixture.of(targets, scores), whole[:, token])
        assert mixture.greedy().tolist() == whole.argmax(-1).tolist()

    @pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
    def test_strength_scales_what_is_copied(self, strength):
        archive = Archive.empty(VOCAB).extended(repetitive(80)[0][0].numpy())
        matches = [archive.match(archive.ids[20:50].astype(int))]
        scores = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(0))
        full, part = (mix(scores, collect(matches), eager_gate(), s) for s in (1.0, strength))
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


class TestSources:
    def test_rebuilt_archives_hold_what_the_decoder_makes_of_the_latents(self, host, crouter):
        history = make(host, crouter, copy="rebuilt")
        ids, _ = repetitive(90)
        out = run(host, ids, logits_processor=[history])
        chunks = history.report().chunks
        rebuilt, weights = [], []
        for chunk in chunks:
            if chunk.start < 90:
                made = crouter.reconstruct(crouter.encode(out.sequences[:, chunk.start : chunk.end]))
                rebuilt += made.input_ids[0].tolist()[: 90 - chunk.start]
                weights += made.confidence[0].tolist()[: 90 - chunk.start]
        archive = Archive.empty(VOCAB, (0, 1, 2)).extended(np.array(rebuilt), weights)
        last = archive.match(out.sequences[0, :-1].numpy())
        mixture = mix(out.logits[-1], collect([last]), gate_of(history))
        torch.testing.assert_close(
            out.scores[-1].log_softmax(-1), mixture.log_probabilities(out.logits[-1]), atol=1e-3, rtol=1e-3
        )

    def test_the_report_counts_what_was_copied_and_where_from(self, host, crouter):
        history = make(host, crouter, copy_gate=eager_gate(bias=-8.0))
        out = run(host, repetitive(120)[0], logits_processor=[history])
        report = history.report()
        moved = sum(
            bool(a.argmax() != b.argmax()) for a, b in zip(out.scores, out.logits, strict=True)
        )  # fmt: skip
        assert 0 < moved <= report.copied <= NEW
        assert sum(chunk.copied for chunk in report.chunks) == report.copied
        assert report.archive_tokens >= len(report.chunks) * CHUNK - NEW and report.archive_bytes > 0
        assert "tokens came from an archive" in str(report)
        off = make(host, crouter, copy=False)
        run(host, repetitive(120)[0], logits_processor=[off])
        assert off.report().copied == off.report().archive_tokens == 0

    def test_a_long_prompt_is_archived_at_once_and_for_all_equal_rows(self, host, crouter, monkeypatch):
        calls, extended = [], Archive.extended
        monkeypatch.setattr(Archive, "extended", lambda *a, **k: calls.append(1) or extended(*a, **k))
        history = make(host, crouter, copy_generated=False)
        run(host, repetitive(120)[0], logits_processor=[history], do_sample=True, top_k=0, num_return_sequences=4,
            max_new_tokens=1)  # fmt: skip
        assert len(calls) == 1
        assert history.report().archive_tokens == (120 - PREFIX - WINDOW) // CHUNK * CHUNK

    def test_rows_that_end_alike_count_for_themselves(self, host, crouter):
        history = make(host, crouter, copy_gate=eager_gate(bias=-8.0))
        ids, _ = repetitive(200)
        other, _ = repetitive(200, seed=8)
        other[:, -70:] = ids[:, -70:]
        both = torch.cat([ids, other])
        run(host, both, logits_processor=[history])
        together = history.report()
        counts = [sum(c.copied for c in together.chunks if c.row == row) for row in (0, 1)]
        alone = []
        for row in (0, 1):
            run(host, both[row : row + 1], logits_processor=[history])
            alone.append(history.report().copied)
        assert counts == alone

    def test_runs_of_spaces_are_no_special_tokens(self, host):
        class Tokenizer:
            all_special_ids = [2]
            added_tokens_decoder = {
                2: AddedToken("<end>", special=True),
                50: AddedToken("    ", special=False),
                51: AddedToken("<think>", special=False),
                52: AddedToken("[INST]", special=False),
            }

        assert special_ids(Tokenizer(), host) == {2, 51, 52}
        assert special_ids(None, host) == {0, 1, 2}  # as the host's configuration names them

    def test_a_secret_is_not_repeated_where_places_are_not_known(self):
        class Rebuild:
            aligned = False

            def __call__(self, chunks):
                return [(np.arange(10, 26), np.ones(16)) for _ in chunks]

        chunks = tuple(Chunk(k * 16, k * 16 + 16, torch.arange(16), torch.arange(16)) for k in range(3))
        archives = Archives(VOCAB, (), [(20, 22)], Rebuild())
        (found,) = archives.rows([Row(0, 0, chunks)], torch.zeros(1, 60, dtype=torch.long), [40])
        assert len(found.archive) == 32  # the third chunk reaches behind the prompt
        flags = [found.archive.match(np.arange(10, k)).length > 0 for k in (12, 14)]
        assert all(flags) and found.archive.match(np.array([25, 10])).length == 1  # only the first chunk is proposed

    def test_a_cache_of_another_crouter_is_refused(self, host, crouter):
        first = make(host, crouter)
        out = run(host, repetitive(90)[0], logits_processor=[first], max_new_tokens=2)
        other = tiny_crouter(seed=7) if "seed" in tiny_crouter.__code__.co_varnames else None
        other = other or type(crouter)(crouter.config)
        second = make(host, other, soft_prompts=tiny_projector(host, other))
        with pytest.raises(InputError, match="another crouter, projector or experts"):
            run(host, out.sequences, logits_processor=[second], past_key_values=out.past_key_values)


class TestGates:
    def test_the_gate_of_a_host_is_found_beside_the_crouter(self, host, crouter, tmp_path):
        gate = eager_gate(host_name="tiny", host_fingerprint=host_fingerprint(host))
        crouter.save_pretrained(tmp_path)
        gate.save(tmp_path / "gates" / "tiny")
        crouter.config._name_or_path = str(tmp_path)
        found = find_gate(crouter, host)
        assert found.config.host_name == "tiny"
        assert all(
            torch.equal(a, b) for a, b in zip(gate.state_dict().values(), found.state_dict().values(), strict=True)
        )
        assert not find_gate(crouter, tiny_host(seed=9)).config.sees_host  # the generic one
        with pytest.raises(MismatchError, match="fingerprint"):
            find_gate(crouter, tiny_host(seed=9), tmp_path / "gates" / "tiny")

    def test_damaged_gates_are_refused_in_one_line(self, tmp_path):
        eager_gate().save(tmp_path)
        weights, description = tmp_path / "gate.safetensors", tmp_path / "gate.json"
        data, text = weights.read_bytes(), description.read_text()

        def refused(match):
            with pytest.raises(InputError, match=match) as caught:
                Gate.load(tmp_path)
            assert "\n" not in str(caught.value)

        weights.write_bytes(data[:-4])
        refused("truncated or altered")
        weights.write_bytes(data)
        description.write_text(json.dumps({**json.loads(text), "orders": [1, 2]}))
        refused("expected a gate of orders")
        description.write_text(text[: len(text) // 2])
        refused("not a gate's description")
        description.unlink()
        refused("No such file")

    @pytest.mark.parametrize(
        ("options", "match"),
        [({"copy": "latents"}, "source=.: expected"), ({"copy_strength": 1.5}, "strength=.: expected 0 to 1"),
         ({"copy_exclude": [(5, 2)]}, "exclude=.: expected spans")],
    )  # fmt: skip
    def test_arguments(self, host, crouter, options, match):
        with pytest.raises(InputError, match=match):
            make(host, crouter, **options)

    def test_rebuilding_needs_a_crouter(self, host):
        with pytest.raises(InputError, match="Copy: expected a crouter"):
            make_history(host, None, soft_prompts=False, copy="rebuilt")
