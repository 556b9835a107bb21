"""Rows longer than the host's positions: pairs move to compact ones once; every step against a slow reference."""

import copy

import numpy as np
import pytest
import torch
from transformers import Phi3Config, Phi3ForCausalLM, StaticCache, StoppingCriteria

from hf_crouter import CapacityError, CompressedHistory, Retrieve
from hf_crouter.cache.capacity import capacity
from hf_crouter.compressors.compact import PairSelector
from hf_crouter.hosts.rotation import KeyRotation
from hf_crouter.types import Parts
from tests.tiny import prompt, tiny_crouter, tiny_host

from .kept_pairs import CHUNK, KeptPairs, MostAttended
from .reference_pairs import forward, next_logits, rotated, slides
from .test_key_values import BLOCK, FAMILIES, PREFIX, WINDOW, make, make_host, run

POSITIONS = 192
STATIC = {"cache_implementation": "static", "disable_compile": True}
torch.set_num_threads(1)


def expected(host, row, prompt_length, raw=(), block=BLOCK):
    return next_logits(host, row, prompt_length, PREFIX, WINDOW, block, raw, limit=host.config.max_position_embeddings)


def assert_exact(host, out, lengths, every=1, logits_of=lambda out, step, i: out.logits[step][i], block=BLOCK):
    width = out.sequences.shape[1] - len(out.logits)
    for i, length in enumerate(lengths):
        for step in range(0, len(out.logits), every):
            logits = expected(host, out.sequences[i, width - length : width + step], length, block=block)
            torch.testing.assert_close(logits_of(out, step, i).double(), logits, atol=1e-6, rtol=0)


def compact(out):
    return [row.compact for row in out.past_key_values.rows]


@pytest.mark.parametrize("family", FAMILIES)
class TestExactness:
    def test_a_prompt_that_passes_the_range(self, family):
        host = make_host(family, POSITIONS)
        out = run(host, make(host), *prompt(270), new=40)
        assert_exact(host, out, [270], every=3)
        assert compact(out) == [True]

    def test_decoding_that_passes_the_range(self, family):
        host = make_host(family, POSITIONS)
        out = run(host, make(host), *prompt(170), new=60)
        assert_exact(host, out, [170])
        assert compact(out) == [True]

    def test_rows_of_a_batch_cross_alone(self, family):
        host = make_host(family, POSITIONS)
        out = run(host, make(host), *prompt(160, 120, 240), new=45)
        assert_exact(host, out, [160, 120, 240], every=4)
        assert compact(out) == [True, False, True]

    def test_retrieved_chunks(self, family):
        host = make_host(family, POSITIONS)
        history = make(host, Retrieve(chunks=2, every=8))
        out = run(host, history, *prompt(180), new=50)
        retrieved = {}
        for record in history.report().retrievals:
            retrieved.setdefault(record.length, []).append(record.chunk)
        assert len({tuple(chunks) for length, chunks in retrieved.items() if length > POSITIONS}) > 1
        for step in range(50):
            raw = retrieved[max(length for length in retrieved if length <= 180 + step)]
            logits = expected(host, out.sequences[0, : 180 + step], 180, raw)
            torch.testing.assert_close(out.logits[step][0].double(), logits, atol=1e-6, rtol=0)

    def test_retrieved_chunks_that_change_between_compactions(self, family):
        host = make_host(family, POSITIONS)
        history = make(host, Retrieve(chunks=2, every=4, scorer=Alternating()))
        out = run(host, history, *prompt(185), new=25)
        for step in range(25):
            length = 185 + step
            raw = Alternating.chosen(length - step % 4)
            logits = expected(host, out.sequences[0, :length], 185, raw)
            torch.testing.assert_close(out.logits[step][0].double(), logits, atol=1e-6, rtol=0)

    def test_beams(self, family):
        host = make_host(family, POSITIONS)
        history = make(host)
        out = run(host, history, *prompt(180), num_beams=3, output_scores=True)
        assert len({*out.beam_indices[0].tolist()}) > 1
        path = out.beam_indices[0].tolist()
        assert_exact(host, out, [180], every=3, logits_of=lambda out, step, i: out.logits[step][path[step]])
        assert history.policy.compressor.asked < 3 * len(history.report().chunks)  # equal rows were read once

    def test_prompt_lookup(self, family):
        host = make_host(family, POSITIONS)
        ids = prompt(60)[0].repeat(1, 3)
        drafted = run(host, make(host), ids, prompt_lookup_num_tokens=4)
        assert torch.equal(drafted.sequences, run(host, make(host), ids).sequences)
        assert_exact(host, drafted, [180], every=3)

    @pytest.mark.parametrize("lengths", [(175,), (175, 80), (250, 160)], ids=str)
    def test_static_cache(self, family, lengths):
        host = make_host(family, POSITIONS)
        out = run(host, make(host), *prompt(*lengths), **STATIC)
        assert_exact(host, out, lengths, every=4)

    def test_score(self, family):
        host = make_host(family, POSITIONS)
        ids = prompt(250)[0]
        for last in (100, 30):
            start, scores = 250 - last, make(host).score(ids, last=last)[0]
            for step in range(0, last, 3):
                logits = expected(host, ids[0, : start + step], start)
                wanted = logits.log_softmax(-1)[ids[0, start + step]]
                torch.testing.assert_close(scores[step].double(), wanted, atol=1e-5, rtol=0)

    def test_score_is_what_generate_saw(self, family):
        host = make_host(family, POSITIONS)
        history = make(host, Retrieve(chunks=2, every=1000))
        out = run(host, history, *prompt(180), new=50)
        scores = history.score(out.sequences, last=50)[0]
        logits = torch.stack(out.logits)[:, 0].double().log_softmax(-1)
        torch.testing.assert_close(
            scores.double(), logits.gather(1, out.sequences[0, 180:, None])[:, 0], atol=1e-5, rtol=0
        )

    @pytest.mark.parametrize("cache", [{}, STATIC], ids=str)
    @pytest.mark.parametrize("lengths", [(150, 100), (185, 20), (220, 70)], ids=str)
    def test_a_later_turn(self, family, lengths, cache):
        host = make_host(family, POSITIONS)
        if cache:  # with room for the second turn
            cache = {"past_key_values": StaticCache(config=host.config, max_cache_len=400)}
        history, (length, more) = make(host), lengths
        first = run(host, history, *prompt(length), new=10, **cache)
        turn = torch.cat([first.sequences, prompt(more, seed=7)[0]], 1)
        second = run(host, history, turn, new=20, past_key_values=first.past_key_values)
        for step in range(0, 20, 2):
            steps = (length, length + 9, length + 10 + more)
            logits = expected(host, second.sequences[0, : length + 10 + more + step], steps)
            torch.testing.assert_close(second.logits[step][0].double(), logits, atol=1e-6, rtol=0)
        assert compact(second) == [True]

    def test_an_edited_turn(self, family):
        """What is kept stays where it stands, and the raw part is one forward over it."""
        host = make_host(family, POSITIONS)
        history = make(host, Retrieve(chunks=1, every=1000, scorer=Alternating()))  # the first chunk
        first = run(host, history, *prompt(210), new=40)
        for at, length in ((250, 240), (250, 249), (225, 232), (150, 160)):  # chunks are given up; it would fit again
            edited = first.sequences[:, :length].clone()
            edited[0, at:] = prompt(max(0, length - at) or 1, seed=9)[0][:, : max(0, length - at)]
            cache = copy.deepcopy(first.past_key_values)
            kept = [cache.pairs_of_row(0, n)[0][:, :, :4].clone() for n in full_layers(host)]
            out = run(host, history, edited, new=12, past_key_values=cache)
            assert compact(out) == [True]
            for n, keys in zip(full_layers(host), kept, strict=True):
                assert torch.equal(cache.pairs_of_row(0, n)[0][:, :, :4], keys)
            for step in range(0, 12):  # until a chunk is compressed, all stands as it does at the end
                if len(cache.rows[0].chunks) == max(0, (length + step - PREFIX - WINDOW) // CHUNK):
                    logits = over_what_stands(host, cache, out.sequences[0, : length + step])
                    torch.testing.assert_close(out.logits[step][0].double(), logits, atol=1e-6, rtol=0)
        short = torch.cat([first.sequences[:, :20], prompt(130, seed=9)[0]], 1)  # nothing is kept
        out = run(host, history, short, new=12, past_key_values=first.past_key_values)
        assert compact(out) == [False] and torch.equal(out.sequences, run(host, history, short, new=12).sequences)


class Alternating:
    """The first chunk, and beside it another one every so many tokens."""

    @staticmethod
    def chosen(length):
        return 0, 1 + length // 4 % 4

    def scores(self, index, recent_ids):
        first, second = self.chosen(len(recent_ids))
        return np.array([2.0 * (n == first) + (n == second) for n in range(len(index))])


def full_layers(host):
    kinds = getattr(host.config, "layer_types", None) or ["full_attention"] * host.config.num_hidden_layers
    return [n for n, kind in enumerate(kinds) if kind == "full_attention"]


def over_what_stands(host, cache, row):
    """Logits of the next token by one forward of what is raw over the pairs in a cache."""
    state = cache.rows[0]
    pairs_of = [cache.pairs_of_row(0, n) if n in full_layers(host) else None for n in range(len(cache.layers))]
    columns = max(pairs[0].shape[2] for pairs in pairs_of if pairs)
    given = forward(host, row, [], list(range(PREFIX)))[1]
    for i in range(columns):
        pairs = []
        for n, known in enumerate(pairs_of):
            seen = known and i < known[0].shape[2] and int(cache.places.owners[n][0, i]) not in state.retrieved
            pairs.append(tuple(part[0, :, i] for part in known) if seen else None)
        given.append({"at": 0, "end": 0, "token": False, "pairs": pairs})
    raw = [token for n in state.retrieved for token in range(state.chunks[n].start, state.chunks[n].end)]
    raw += range(state.chunks[-1].end, len(row))
    first = PREFIX + sum(len(chunk.entries) for chunk in state.chunks)
    return forward(host, row, given, raw, [first + i for i in range(len(raw))])[0]


def test_rows_of_the_same_text_that_end_on_both_sides_of_the_range():
    host = make_host("llama", POSITIONS)
    ids, mask = prompt(196, 186)
    ids[1, 10:] = ids[0, :186]
    for order in ([0, 1], [1, 0]):
        out = run(host, make(host), ids[order], mask[order], new=4)
        assert_exact(host, out, [[196, 186][i] for i in order])
        assert compact(out) == [i == 0 for i in order]


class Second(StoppingCriteria):
    """Ends the second row of two."""

    def __call__(self, input_ids, scores, **options):
        return torch.tensor([False, input_ids.shape[1] == 188])


@pytest.mark.parametrize("cache", [{}, STATIC], ids=str)
def test_a_row_that_ended_stays_within_the_positions(cache):
    host, shown = make_host("llama", POSITIONS), []
    ids, mask = prompt(186, 185)
    host.model.register_forward_pre_hook(lambda m, a, k: shown.append(int(k["position_ids"].max())), with_kwargs=True)
    out = run(host, make(host), ids, mask, new=45, stopping_criteria=[Second()], **cache)
    assert len(out.logits) == 45 and out.past_key_values.rows[1].end == 187
    assert max(shown) < POSITIONS and compact(out) == [True, False]
    assert_exact(host, out, [186], every=4)


def test_rotary_factors_that_longer_texts_change():
    torch.manual_seed(0)
    factors = {"short_factor": [1.0, 1.2, 1.4, 1.7], "long_factor": [2.0, 3.5, 6.0, 8.0]}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": POSITIONS, **factors}
    config = Phi3Config(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, original_max_position_embeddings=POSITIONS,
        initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2, rope_parameters=rope,
    )  # fmt: skip
    host = Phi3ForCausalLM(config).eval().double()
    host.generation_config.eos_token_id = None
    for length in (170, 280):
        out = run(host, make(host), *prompt(length), new=50)
        for step in range(0, 50, 3):
            row = out.sequences[0, : length + step]
            logits = next_logits(host, row, length, PREFIX, WINDOW, BLOCK, limit=POSITIONS)
            torch.testing.assert_close(out.logits[step][0].double(), logits, atol=1e-6, rtol=0)


@pytest.mark.parametrize("length", [POSITIONS - 1, POSITIONS, POSITIONS + 1])
def test_the_last_position_is_used(length):
    host, shown = make_host("llama", POSITIONS), []
    host.model.register_forward_pre_hook(lambda m, a, k: shown.append(int(k["position_ids"].max())), with_kwargs=True)
    out = run(host, make(host), *prompt(length), new=1)
    assert_exact(host, out, [length])
    assert compact(out) == [length > POSITIONS]
    assert (max(shown) == length - 1) == (length <= POSITIONS)


@pytest.mark.parametrize("block", [CHUNK, 3 * CHUNK, 10 * CHUNK])
def test_any_block(block):
    host = make_host("llama", POSITIONS)
    out = run(host, make(host, block=block), *prompt(300), new=3)
    assert_exact(host, out, [300], block=block)


def test_the_peak_is_two_blocks():
    host, seen = make_host("llama", 512), []
    host.model.layers[0].register_forward_hook(
        lambda m, a, k, o: seen.append(k["past_key_values"].get_seq_length()), with_kwargs=True
    )
    history = make(host, block=CHUNK)
    out = run(host, history, *prompt(1100), new=2)
    entries = sum(out.past_key_values.places.count(0, layer) for layer in (0,))
    assert max(seen) <= PREFIX + entries + 2 * CHUNK + WINDOW < 600


class Evenly(KeptPairs):
    """Twelve pairs of every chunk and layer."""

    def bind(self, setting):
        return Parts(compressor=PairSelector(tuple(12 * (not slide) for slide in slides(setting.host)), self.block))


class TestCapacity:
    @pytest.mark.parametrize("family, positions, chunks, block", [
        ("llama", 128, 0, BLOCK), ("llama", 192, 2, BLOCK), ("gemma3", 128, 0, 4 * BLOCK), ("qwen2", 160, 1, CHUNK),
    ])  # fmt: skip
    @pytest.mark.parametrize("window", [8, 40])
    def test_all_of_it_is_read_within_the_positions(self, family, positions, chunks, block, window):
        host, shown = make_host(family, positions), []
        retrieve = [Retrieve(chunks=chunks, every=1000)] if chunks else []
        history = CompressedHistory(
            host, tiny_crouter(chunk_length=CHUNK), modes=[Evenly(PREFIX, block), *retrieve], window=window,
            keep_first=PREFIX,
        )  # fmt: skip
        most = capacity(host, history.policy, PREFIX)
        raw = max(chunks * CHUNK + window + CHUNK - 1, 2 * CHUNK, CHUNK + window)
        assert most == PREFIX + window + CHUNK - 1 + CHUNK * ((positions - PREFIX - raw) // 12) > positions
        host.model.register_forward_pre_hook(
            lambda m, a, k: shown.append(int(k["position_ids"].max())), with_kwargs=True
        )
        for new in (2, 30):
            out = run(host, history, *prompt(most + 1 - new), new=new)
            assert len(out.logits) == new and max(shown) < positions
            with pytest.raises(CapacityError, match=f"at most {most} tokens a row"):
                run(host, history, *prompt(most + 2 - new), new=new)
        assert history.score(prompt(most + 1)[0], last=3).isfinite().all()
        with pytest.raises(CapacityError, match=f"at most {most} tokens a row"):
            history.score(prompt(most + 2)[0], last=3)

    def test_a_host_whose_keys_stay(self, monkeypatch):
        host = tiny_host("gpt2", positions=128)
        history = make(host)
        assert capacity(host, history.policy, PREFIX) == 128
        with pytest.raises(CapacityError) as refusal:
            run(host, history, *prompt(140), new=2)
        assert str(refusal.value) == (
            "history: expected at most 128 tokens a row (the host's 128 positions, 3 of them raw prefix, window 20), "
            "got a prompt of 140 and 2 new ones; keys stay at their positions: expected positions that do nothing but "
            "rotate keys, got GPT2LMHeadModel, of which layer 0 caches more that depends on them (as with learned "
            "positions, or an index)"
        )
        run(host, history, *prompt(100), new=29)
        with pytest.raises(CapacityError):
            history.score(prompt(130)[0], last=5)

    def test_rotation_is_found_out_only_beyond_the_range(self, monkeypatch):
        host, asked = make_host("llama", POSITIONS), []
        of = KeyRotation.of
        monkeypatch.setattr(KeyRotation, "of", lambda host: asked.append(1) or of(host))
        run(host, make(host), *prompt(170), new=23)
        make(host).score(prompt(193)[0], last=5)
        assert not asked
        calls = []
        host.model.register_forward_hook(lambda *args: calls.append(len(asked)))
        run(host, make(host), *prompt(170), new=24)
        assert calls[0] == 1  # before anything else is read


class Watching(MostAttended):
    """Notes what the host made of each block, and which places were chosen."""

    def __init__(self, *args):
        super().__init__(*args)
        self.fresh, self.chosen = {}, {}

    def compress(self, read, observed):
        if read.own:
            fresh = read.keys[:, :, read.own[0][0] : read.own[-1][1]].clone()
            self.fresh.setdefault(read.layer, []).append(fresh)
        pairs, observed = super().compress(read, observed)
        if read.chunks:
            self.chosen.setdefault(read.layer, []).append(pairs.places.split(pairs.counts, 2))
        return pairs, observed


def coarse(positions=POSITIONS):
    host = make_host("llama", positions).to(torch.bfloat16)
    history = make(host)
    history.policy.compressor.__class__ = Watching
    history.policy.compressor.fresh, history.policy.compressor.chosen = {}, {}
    return host, history


def ends(first, count, span):
    return first + torch.arange(count) * span // count


class TestOneRotation:
    def test_of_the_stored_copy_when_a_row_crosses(self):
        host, history = coarse()
        out = run(host, history, *prompt(170), new=23)  # 192 tokens are read
        before, cache = copy.deepcopy(out.past_key_values), out.past_key_values
        assert not before.rows[0].compact and len(before.rows[0].chunks) == 5
        out = run(host, history, out.sequences, new=2, past_key_values=cache)
        assert cache.rows[0].compact and len(cache.rows[0].chunks) == 5
        for layer in (0, 1):
            (old, values), (new, same), at, column = before.pairs_of_row(0, layer), cache.pairs_of_row(0, layer), 3, 0
            assert torch.equal(values, same)
            for chunk in cache.rows[0].chunks:
                count, span = chunk.entries.pairs[layer], len(chunk.entries)
                by = ends(at, count, span) - chunk.start - chunk.entries.places[layer]
                some = old[0, :, column : column + count]
                stored = new[0, :, column : column + count]
                assert torch.equal(stored, KeyRotation.of(host).moved(some, by, layer).to(torch.bfloat16))
                exact = torch.stack([rotated(host, layer, some[:, i].double(), by[:, i]) for i in range(count)], 1)
                assert float((stored.double() - exact).norm() / exact.norm()) < 2**-8
                at, column = at + span, column + count

    def test_of_what_the_host_made_where_blocks_moved_up(self):
        host, history = coarse()
        positions = []
        host.model.register_forward_pre_hook(
            lambda m, a, k: positions.append(k["position_ids"][0].tolist()), with_kwargs=True
        )
        KeyRotation.of(host)
        positions.clear()
        out = run(host, history, *prompt(300), new=1)
        row, watching = out.past_key_values.rows[0], history.policy.compressor
        blocks = positions[1 : 1 + len(watching.fresh[0])]
        true = [block[0] == PREFIX + sum(map(len, blocks[:n])) for n, block in enumerate(blocks)]
        assert true.count(True) > 1 and true.count(False) > 1
        for layer in (0, 1):
            keys, at, column = out.past_key_values.pairs_of_row(0, layer)[0], PREFIX, 0
            chunks = iter(row.chunks)
            for block, fresh, chosen in zip(blocks, watching.fresh[layer], watching.chosen[layer], strict=True):
                for n, places in enumerate(chosen):
                    entries = next(chunks).entries
                    count, span = entries.pairs[layer], len(entries)
                    picked = fresh.gather(2, (places + CHUNK * n)[..., None].expand(-1, -1, -1, 8))[0]
                    by = ends(at, count, span) - block[0] - CHUNK * n - places[0]
                    stored = keys[0, :, column : column + count]
                    assert torch.equal(stored, KeyRotation.of(host).moved(picked, by, layer).to(torch.bfloat16))
                    at, column = at + span, column + count

    def test_older_pairs_never_move_again(self):
        host, history = coarse()
        out = run(host, history, *prompt(200), new=2)
        before = [out.past_key_values.pairs_of_row(0, layer)[0].clone() for layer in (0, 1)]
        out = run(host, history, out.sequences, new=80, past_key_values=out.past_key_values)
        assert len(out.past_key_values.rows[0].chunks) == 8
        for layer, keys in enumerate(before):
            after = out.past_key_values.pairs_of_row(0, layer)[0]
            assert after.shape[2] > keys.shape[2] and torch.equal(after[:, :, : keys.shape[2]], keys)

    def test_only_what_may_move_is_remembered(self):
        host = make_host("llama", POSITIONS)
        out = run(host, make(host), *prompt(150), new=70)
        entries = [chunk.entries for chunk in out.past_key_values.rows[0].chunks]
        assert [some.places is not None for some in entries] == [True] * 5 + [False]
        assert entries[1].places[0].shape == (2, 16) and entries[1].places[1].dtype == torch.int32
        host.config.max_position_embeddings = 0
        out = run(host, make(host), *prompt(150), new=70)
        assert all(chunk.entries.places is None for chunk in out.past_key_values.rows[0].chunks)
        assert compact(out) == [False]


def test_float32_hosts_read_as_at_those_positions():
    """Keys of the first layer, moved, are those that the host makes at the compact positions."""
    host = tiny_host("llama", positions=POSITIONS)
    out = run(host, make(host), *prompt(300), new=2)
    row, keys, first, column = out.past_key_values.rows[0], out.past_key_values.pairs_of_row(0, 0)[0], PREFIX, 0
    values = out.past_key_values.pairs_of_row(0, 0)[1]  # by which pairs are found: places are not remembered
    for chunk in row.chunks:
        count, span = chunk.entries.pairs[0], len(chunk.entries)
        tokens = out.sequences[0, chunk.start : chunk.end]
        for i, at in enumerate(ends(first, count, span).tolist()):
            made = forward(host, tokens, [], list(range(CHUNK)), [at] * CHUNK)[2][0]
            for head in (0, 1):
                gap = (made["value"][head] - values[0, head, column + i]).norm(dim=-1)
                key = made["key"][head, gap.argmin()]
                assert gap.min() < 1e-5
                torch.testing.assert_close(keys[0, head, column + i], key, atol=1e-3, rtol=0)
        first, column = first + span, column + count
