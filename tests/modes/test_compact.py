"""Compact: pairs against a slow reference of the same reads, all ways to call, memory, and the command line."""

import gc

import pytest
import torch

from hf_crouter import Compact, CompressedHistory, Copy, InputError, Retrieve, SoftPrompts
from tests.tiny import prompt, tiny_crouter, tiny_host

from .reference_pairs import forward, slides
from .test_key_values import FAMILIES, GREEDY, make_host

CHUNK, WINDOW, PREFIX, BLOCK, FAR = 32, 20, 3, 64, 256
torch.set_num_threads(1)


def make(host, *more, slots=6, block=BLOCK, **options):
    crouter = tiny_crouter(chunk_length=CHUNK)  # for the length of its chunks alone
    modes = [Compact(slots, budgets="equal", block=block), *more]
    return CompressedHistory(host, crouter, modes=modes, **{"window": WINDOW, "keep_first": PREFIX, **options})


def run(host, history, ids, mask=None, new=8, **options):
    mask = torch.ones_like(ids) if mask is None else mask
    return host.generate(
        ids, attention_mask=mask, logits_processor=[history], **{**GREEDY, "max_new_tokens": new, **options}
    )


def squares(given, read, block, layer, far=0):
    """Sums of squared shares that a piece's queries give some slots, which stand last of `given` or are the piece."""
    some = [slot for slot in given if slot["pairs"][layer] is not None]
    keys = torch.cat([torch.stack([slot["pairs"][layer][0] for slot in some], 1), read["key"]], 1)
    asked, count = read["query"].shape[1], keys.shape[1]
    scores = read["query"] @ keys.repeat_interleave(read["query"].shape[0] // len(keys), 0).transpose(1, 2)
    order = torch.arange(count)
    scores = (scores * read["scaling"]).masked_fill(order > torch.arange(count - asked, count)[:, None], -torch.inf)
    shares = scores.softmax(-1)
    shares = shares * (torch.arange(count - asked, count)[:, None] - order >= far)
    first = count - asked - block if not far else count - block
    return shares[..., first : first + block].square().unflatten(0, (len(keys), -1)).sum((1, 2))


def reference(host, row, length, prompt_length, slots, block, far):
    """Known slots of the prefix and pairs of the chunks, for a row of so many decided tokens."""
    known = forward(host, row, [], list(range(PREFIX)))[1]
    made, done = [], 0
    for now in range(min(prompt_length, length), length + 1):
        count = max(0, (now - PREFIX - WINDOW) // CHUNK)
        if count == done:
            continue
        starts = [PREFIX + CHUNK * n for n in range(done, count)]
        size = block // CHUNK
        blocks = [starts[i : i + size] for i in range(0, len(starts), size)]
        pieces = [list(range(some[0], some[-1] + CHUNK)) for some in blocks]
        pieces.append(list(range(pieces[-1][-1] + 1, pieces[-1][-1] + 1 + WINDOW)))
        raw, own, waiting = [], None, []
        for number, piece in enumerate(pieces):
            given = [*known, *made, *raw]
            _, fresh, layers = forward(host, row, given, piece)
            if waiting:
                made = [*made, *chosen(host, given, raw, layers, own, waiting, slots)]
            own = [
                None if slides(host)[n] else squares(given, read, len(piece), n, far) for n, read in enumerate(layers)
            ]
            raw, waiting = (fresh, blocks[number]) if number < len(blocks) else ([], [])
        done = count
    return [*known, *made], done


def chosen(host, given, raw, layers, own, starts, slots):
    found = []
    for start in starts:
        picked = []
        for n, read in enumerate(layers):
            if slides(host)[n]:
                picked.append(None)
                continue
            keys = torch.stack([slot["pairs"][n][0] for slot in raw], 1)
            values = torch.stack([slot["pairs"][n][1] for slot in raw], 1)
            worth = (squares(given, read, len(raw), n) + own[n]) * values.square().sum(-1)
            first = start - raw[0]["at"]
            top = worth[:, first : first + CHUNK].topk(slots).indices.sort(-1).values + first
            heads = torch.arange(len(keys))
            picked.append([(keys[heads, top[:, i]], values[heads, top[:, i]]) for i in range(slots)])
        found += [{"at": start + CHUNK - 1, "end": start + CHUNK, "token": False,
                   "pairs": [layer and layer[i] for layer in picked]} for i in range(slots)]  # fmt: skip
    return found


def expected_logits(host, row, prompt_length, slots=6, block=BLOCK, far=FAR):
    known, done = reference(host, row, len(row), prompt_length, slots, block, far)
    return forward(host, row, known, list(range(PREFIX + CHUNK * done, len(row))))[0]


@pytest.mark.parametrize("family", FAMILIES)
class TestExactness:
    def test_every_step_reads_over_the_pairs_that_a_slow_reference_makes(self, family):
        host = make_host(family)
        out = run(host, make(host), *prompt(170), new=40)
        for step in range(0, 40, 5):
            row = out.sequences[0, : 170 + step]
            expected = expected_logits(host, row, 170)
            torch.testing.assert_close(out.logits[step][0].double(), expected, atol=1e-6, rtol=0)

    def test_far_queries_of_the_block_count(self, family, monkeypatch):
        host = make_host(family)
        history = make(host, block=4 * CHUNK)
        history.policy.compressor.far = 40
        out = run(host, history, *prompt(170), new=2)
        expected = expected_logits(host, out.sequences[0, :171], 170, block=4 * CHUNK, far=40)
        torch.testing.assert_close(out.logits[1][0].double(), expected, atol=1e-6, rtol=0)
        other = expected_logits(host, out.sequences[0, :171], 170, block=4 * CHUNK)
        assert not torch.allclose(expected, other, atol=1e-3)

    def test_as_many_slots_as_tokens_are_the_whole_text(self, family):
        host = make_host(family)
        if family == "gemma3":
            pytest.skip("its sliding layers read the window anew, over nothing older")
        ids, mask = prompt(150, 97)
        plain = host.generate(ids, attention_mask=mask, max_new_tokens=6, **GREEDY)
        ours = run(host, make(host, slots=CHUNK), ids, mask, new=6)
        torch.testing.assert_close(torch.stack(ours.logits), torch.stack(plain.logits), atol=1e-9, rtol=0)


class TestTogether:
    def test_with_retrieved_chunks_and_copying(self):
        host = make_host("llama")
        history = make(host, Retrieve(chunks=2), Copy())
        out = run(host, history, *prompt(200), new=30)
        report = history.report()
        assert out.sequences.shape[1] == 230 and report.rows[0].retrieved == 2 * CHUNK
        assert report.rows[0].entries == 6 * len(report.chunks) and report.archive_tokens == CHUNK * len(report.chunks)

    def test_padded_beams_sampling_and_streams(self):
        host = make_host("qwen2")
        ids, mask = prompt(150, 97, 30)
        alone = [run(host, make(host), *prompt(150), new=30).sequences[0, -30:]]
        assert torch.equal(run(host, make(host), ids, mask, new=30).sequences[0, -30:], alone[0])
        beams = run(host, make(host), ids, mask, new=30, num_beams=3, num_return_sequences=2)
        assert beams.sequences.shape == (6, 180)

    def test_unequal_layers(self):
        host = make_host("llama")
        history = make(host)
        history.policy.compressor.most_by_layer = (2, 10)
        out = run(host, history, *prompt(150), new=30)
        cache = out.past_key_values
        chunks = len(history.report().chunks)
        assert [cache.places.width(layer) for layer in (0, 1)] == [2 * chunks, 10 * chunks]
        raw = cache.layout.shape[1]
        assert [layer.keys.shape[2] for layer in cache.layers] == [2 * chunks + raw, 10 * chunks + raw]
        assert history.report().rows[0].entries == 6 * chunks
        static = run(
            host, make_unequal(host), *prompt(150), new=30, cache_implementation="static", disable_compile=True
        )
        assert torch.equal(static.sequences, out.sequences)

    def test_soft_prompts_beside_pairs_are_refused(self):
        with pytest.raises(InputError, match="one that gives entries, got Compact and SoftPrompts"):
            CompressedHistory(tiny_host(), tiny_crouter(), modes=[Compact(), SoftPrompts()])

    def test_an_interrupted_call_leaves_no_trace(self):
        host, stop = make_host("llama"), RuntimeError("stop")
        ids, mask = prompt(150)
        history = make(host)

        def interrupt(input_ids, scores):
            if input_ids.shape[1] > 185:
                raise stop
            return scores

        with pytest.raises(RuntimeError, match="stop"):
            host.generate(ids, attention_mask=mask, max_new_tokens=60, logits_processor=[history, interrupt], **GREEDY)
        plain = host.generate(ids, attention_mask=mask, max_new_tokens=4, **GREEDY)
        again = run(host, history, ids, mask, new=4)
        assert torch.equal(again.sequences, run(host, make(host), ids, mask, new=4).sequences)
        history.detach()
        assert torch.equal(
            host.generate(ids, attention_mask=mask, max_new_tokens=4, **GREEDY).sequences, plain.sequences
        )


def make_unequal(host):
    history = make(host)
    history.policy.compressor.most_by_layer = (2, 10)
    return history


@pytest.mark.parametrize("options", [{"slots": 0}, {"slots": "8"}, {"block": 0}, {"budgets": 3}])
def test_bad_options_are_named(options):
    with pytest.raises(InputError, match=rf"Compact\({next(iter(options))}=\): expected"):
        Compact(**options)


def test_the_peak_is_pairs_two_blocks_and_the_raw_part():
    """Of all keys and values that are alive whenever a layer attends, in a prompt's blocks and while decoding."""
    host, peak = tiny_host(positions=4096), 0
    heads, size, layers = host.config.num_key_value_heads, 8, host.config.num_hidden_layers

    def alive():
        found = (thing for thing in gc.get_objects() if type(thing) is torch.Tensor and thing.ndim == 4)
        return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                for t in found if t.shape[1] == heads and t.shape[3] == size}  # fmt: skip

    gc.collect()
    before = alive()  # of other tests

    def measure(*_):
        nonlocal peak
        peak = max(peak, sum(count for storage, count in alive().items() if storage not in before))

    for layer in host.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(measure)
    history = make(host, slots=4, block=2 * CHUNK)
    run(host, history, *prompt(1500), new=2)
    slot = 2 * heads * size * 4 * layers
    chunks = len(history.report().chunks)
    pairs, blocks, raw = 4 * chunks, 2 * 2 * CHUNK, PREFIX + WINDOW + CHUNK
    one_layer = (pairs + blocks + raw) / layers  # joined while it attends
    assert chunks > 40 and peak <= slot * (pairs + blocks + raw + one_layer) < slot * 1500 / 2
