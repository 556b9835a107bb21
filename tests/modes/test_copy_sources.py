import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import AddedToken

from hf_crouter import CompressedHistory
from hf_crouter.errors import InputError, MismatchError
from hf_crouter.hosts.fingerprint import host_fingerprint
from hf_crouter.hosts.tokenizers import special_ids
from hf_crouter.modes import Copy, Retrieve
from hf_crouter.modes.copy import Copier
from hf_crouter.ngram.archive import Archive
from hf_crouter.ngram.candidates import Evidence, collect
from hf_crouter.ngram.gate import Gate, find_gate
from hf_crouter.ngram.mixture import mix
from hf_crouter.ngram.raw_text import RawText
from hf_crouter.ngram.row_archive import Archives
from hf_crouter.types import Chunk, Row

from ..ngram.reference import slow_raw
from ..tiny import CHUNK, VOCAB, make_history, tiny_crouter, tiny_host, tiny_projector
from .copying import NEW, PREFIX, WINDOW, eager_gate, evidence, gate_of, make, repetitive, run

torch.set_num_threads(1)


@pytest.fixture
def host():
    host = tiny_host()
    host.generation_config.eos_token_id = None  # every call gives all its tokens
    return host


@pytest.fixture
def crouter():
    return tiny_crouter()


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
        ids = out.sequences[0, :-1].numpy()
        end = chunks[-1].end
        raw = RawText([ids[:PREFIX]], ids[end:])
        found = raw.match(archive.pattern(ids[-64:], 64), len(ids) - end)
        last = Evidence(archive.match(ids), len(archive), found, raw.upto(len(ids) - end))
        mixture = mix(out.logits[-1], collect([last]), gate_of(history))
        torch.testing.assert_close(
            out.scores[-1].log_softmax(-1), mixture.log_probabilities(out.logits[-1]), atol=1e-3, rtol=1e-3
        )

    def test_what_is_uncertain_is_copied_less(self):
        ids, scores = np.array([5, 6, 7, 9, 5, 6, 8, 9]), torch.randn(1, 97)
        gate, shares = eager_gate(), []
        for confidence in (1.0, 0.8, 0.4, 0.2):
            archive = Archive.empty(97).extended(ids, [confidence] * len(ids))
            candidates = collect([evidence(archive, [5, 6])])
            shares.append(mix(scores, candidates, gate).share.item())
        assert shares == pytest.approx([shares[0] * part for part in (1.0, 0.8, 0.4, 0.2)], rel=0.01)
        archive = Archive.empty(97).extended(ids, [1, 1, 1, 1, 1, 1, 0, 1])
        candidates = collect([evidence(archive, [5, 6])])
        assert not candidates.available[0, -1], "the latest is not believed at all"
        assert mix(scores, candidates, gate).copied(torch.tensor([8])).item() == 0

    def test_a_forbidden_token_leaves_its_probability_to_what_is_believed(self):
        ids, scores, gate = np.array([5, 6, 7, 9, 5, 6, 8, 9]), torch.randn(1, 97), eager_gate()
        believed, doubted = (
            collect([evidence(Archive.empty(97).extended(ids, [1, 1, 1, 1, 1, 1, weight, 1]), [5, 6])])
            for weight in (1, 0)
        )
        torch.testing.assert_close(believed.allowed(believed.tokens > 0).probabilities, believed.probabilities)
        scores[0, 7] = -torch.inf
        mixture = mix(scores, believed, gate)
        assert mixture.copied(torch.tensor([8])).item() == pytest.approx(mixture.share.item())
        for candidates in (believed, doubted):  # 8 is no candidate of the latter: its occurrence is not believed
            whole = mix(scores, candidates, gate).log_probabilities(scores).exp()
            assert whole.sum().item() == pytest.approx(1) and whole[0, 7] == 0
        rare = replace(believed, probabilities=torch.where(believed.tokens == 7, 1 - 1e-9, 1e-9))
        beside = (rare.tokens == 8) & torch.isin(rare.sources, rare.sources[rare.tokens == 7])
        shares = rare.allowed(rare.tokens != 7).probabilities[beside]
        assert len(shares) and shares.tolist() == pytest.approx([1.0] * len(shares))

    def test_what_stands_raw_is_looked_for_where_the_host_reads_it(self, host, crouter, monkeypatch):
        seen, look = [], Copier.look

        def spied(copier, cache, input_ids, columns):
            found = look(copier, cache, input_ids, columns)
            for i, row in enumerate(cache.rows):
                ids = input_ids[i, row.pad :].tolist()
                chunks = [ids[row.chunks[n].start : row.chunks[n].end] for n in row.retrieved]
                for n, column in enumerate(columns):
                    known, end = found[i * len(columns) + n], column - row.pad
                    if known.matches.length:
                        parts = [ids[: row.prefix], *chunks, ids[row.raw_start : end]]
                        wanted = slow_raw(parts, ids[:end], copier.archives.empty.archive.stop_ids)
                        got = (known.raw.length, known.raw.token, known.raw.occurrences, known.raw.share)
                        assert got == pytest.approx(wanted)
                        seen.append(len(chunks))
            return found

        monkeypatch.setattr(Copier, "look", spied)
        history = CompressedHistory(
            host, crouter, modes=[Retrieve(2), Copy(gate=eager_gate(bias=-8.0))], window=WINDOW, keep_first=PREFIX
        )
        ids, mask = repetitive(110, 70)
        run(host, ids, mask, logits_processor=[history])
        history.score(ids, last=40, attention_mask=mask)
        assert len(seen) > 50 and max(seen) == 2

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
        assert find_gate(crouter, tiny_host(seed=9)).config.host_name == ""  # the general one
        # one of another version that is another host's disturbs nobody; the host's own is refused
        other = json.loads((tmp_path / "gates/tiny/gate.json").read_text())
        folder = tmp_path / "gates" / "old"
        shutil.copytree(tmp_path / "gates" / "tiny", folder)
        old = {key: value for key, value in other.items() if key != "features"} | {"host_fingerprint": "elsewhere"}
        (folder / "gate.json").write_text(json.dumps({**old, "host_architecture": "", "host_tokenizer": ""}))
        assert find_gate(crouter, host).config.host_name == "tiny"
        assert find_gate(crouter, tiny_host(seed=9)).config.host_name == ""
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
        refused("expected a gate of 9 orders and 76 features, got 2 and 76")
        old = {key: value for key, value in json.loads(text).items() if key != "features"}
        description.write_text(json.dumps(old))
        refused("got 9 and those of an earlier version: fit it anew")
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
