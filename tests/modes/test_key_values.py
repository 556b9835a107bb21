"""A compressor of keys, values and captured queries, through the door alone: every step against a slow reference."""

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig
from transformers.generation import CompileConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_crouter import CompressedHistory, InputError, Retrieve
from hf_crouter.hosts.attention import attention_met
from tests import reference
from tests.tiny import VOCAB, prompt, tiny_crouter, tiny_host

from .kept_pairs import CHUNK, KeptPairs
from .reference_pairs import next_logits

FAMILIES = ("llama", "qwen2", "gpt_neox", "gemma3")
WINDOW, PREFIX, BLOCK = 20, 3, 2 * CHUNK
GREEDY = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
torch.set_num_threads(1)


def make_host(family, positions=512, seed=0, sliding_window=12):
    """In float64: which pair is attended to most must not hang on rounding."""
    if family != "gemma3":
        return tiny_host(family, seed, positions).double()
    torch.manual_seed(seed)
    config = Gemma3TextConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=positions, initializer_range=0.3,
        sliding_window=sliding_window,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"], pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    host = Gemma3ForCausalLM(config).eval().double()
    host.generation_config.eos_token_id = None
    return host


def make(host, *more, **options):
    mode = KeptPairs(PREFIX, options.pop("block", BLOCK))
    crouter = tiny_crouter(chunk_length=CHUNK)  # for the length of its chunks alone
    return CompressedHistory(host, crouter, modes=[mode, *more], **{"window": WINDOW, "keep_first": PREFIX, **options})


def run(host, history, ids, mask=None, new=45, **options):
    mask = torch.ones_like(ids) if mask is None else mask
    options = {**GREEDY, "max_new_tokens": new, **options}
    return host.generate(ids, attention_mask=mask, logits_processor=[history], **options)


def assert_exact(host, out, lengths, every=1, logits_of=lambda out, step, i: out.logits[step][i], block=BLOCK):
    width = out.sequences.shape[1] - len(out.logits)
    for i, length in enumerate(lengths):
        for step in range(0, len(out.logits), every):
            row = out.sequences[i, width - length : width + step]
            expected = next_logits(host, row, length, PREFIX, WINDOW, block)
            torch.testing.assert_close(logits_of(out, step, i).double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
class TestExactness:
    def test_greedy(self, family):
        host = make_host(family)
        history = make(host)
        out = run(host, history, *prompt(200))
        report = history.report()
        assert [chunk.slots for chunk in report.chunks] == ([4, 8] if family == "gemma3" else [6, 12]) * 3  # means
        assert_exact(host, out, [200], every=3)

    def test_sampling(self, family):
        host = make_host(family)
        torch.manual_seed(4)
        out = run(host, make(host), *prompt(120), do_sample=True, num_return_sequences=2)
        assert not torch.equal(out.sequences[0], out.sequences[1])
        assert_exact(host, out, [120, 120], every=5)

    def test_beams(self, family):
        host = make_host(family)
        history = make(host)
        out = run(host, history, *prompt(130), num_beams=3, output_scores=True)
        assert len({*out.beam_indices[0].tolist()}) > 1
        path = out.beam_indices[0].tolist()
        assert_exact(host, out, [130], every=4, logits_of=lambda out, step, i: out.logits[step][path[step]])
        assert history.policy.compressor.asked < 3 * len(history.report().chunks)  # equal rows were read once

    def test_padded_batch(self, family):
        host = make_host(family)
        out = run(host, make(host), *prompt(150, 97, 30))
        assert_exact(host, out, [150, 97, 30], every=4)

    def test_prompt_lookup(self, family):
        host = make_host(family)
        ids = prompt(50)[0].repeat(1, 3)
        drafted = run(host, make(host), ids, prompt_lookup_num_tokens=4)
        assert torch.equal(drafted.sequences, run(host, make(host), ids).sequences)
        assert_exact(host, drafted, [150], every=4)

    def test_assistant(self, family):
        host = make_host(family)
        ids, mask = prompt(130)
        # a sliding assistant fails in plain transformers 5.17 too
        drafted = run(host, make(host), ids, mask, assistant_model=make_host("llama"))
        assert torch.equal(drafted.sequences, run(host, make(host), ids, mask).sequences)
        assert_exact(host, drafted, [130], every=6)

    @pytest.mark.parametrize("lengths", [(140,), (140, 60)], ids=str)
    def test_static_cache(self, family, lengths):
        host = make_host(family)
        options = {"cache_implementation": "static", "disable_compile": True}
        out = run(host, make(host), *prompt(*lengths), **options)
        assert_exact(host, out, lengths, every=5)

    def test_score(self, family):
        host = make_host(family)
        ids = prompt(230)[0]
        scores = make(host).score(ids, last=40)[0]
        for step in range(0, 40, 3):
            logits = next_logits(host, ids[0, : 190 + step], 190, PREFIX, WINDOW, BLOCK)
            expected = logits.log_softmax(-1)[ids[0, 190 + step]]
            torch.testing.assert_close(scores[step].double(), expected, atol=1e-5, rtol=0)

    def test_a_later_turn_reads_on(self, family):
        host = make_host(family)
        history = make(host)
        first = run(host, history, *prompt(150), new=10)
        asked = history.policy.compressor.asked
        turn = torch.cat([first.sequences, prompt(60, seed=7)[0]], 1)
        second = run(host, history, turn, new=4, past_key_values=first.past_key_values)
        assert history.policy.compressor.asked - asked == 2  # what was compressed before stays as it was made
        assert len(history.report().chunks) == 6 and second.sequences.shape[1] == turn.shape[1] + 4

    def test_nothing_to_compress_is_bit_identical(self, family):
        host = make_host(family)
        ids, mask = prompt(40, 25)
        plain = host.generate(ids, attention_mask=mask, max_new_tokens=10, **GREEDY)
        ours = run(host, make(host), ids, mask, new=10)
        assert torch.equal(torch.stack(plain.logits), torch.stack(ours.logits))


@pytest.mark.parametrize("block", [CHUNK, 3 * CHUNK, 10 * CHUNK])
def test_any_block(block):
    host = make_host("llama")
    out = run(host, make(host, block=block), *prompt(200), new=3)
    assert_exact(host, out, [200], block=block)


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static", "disable_compile": True}], ids=str)
def test_a_sliding_window_that_reaches_over_entries_sees_none(cache):
    host = make_host("gemma3", sliding_window=70)
    out = run(host, make(host), *prompt(100, 45), new=40, **cache)
    assert_exact(host, out, [100, 45], every=4)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_without_a_prefix(family):
    host = make_host(family)
    mode = KeptPairs(0, BLOCK)
    history = CompressedHistory(host, tiny_crouter(chunk_length=CHUNK), modes=[mode], window=WINDOW, keep_first=0)
    out = run(host, history, *prompt(120), new=40)
    for step in range(0, 40, 4):
        expected = next_logits(host, out.sequences[0, : 120 + step], 120, 0, WINDOW, BLOCK)
        torch.testing.assert_close(out.logits[step][0].double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_pairs_of_a_retrieved_chunk_are_not_read(family):
    host = make_host(family)
    history = make(host, Retrieve(chunks=2, every=1000))
    out = run(host, history, *prompt(200), new=30)
    retrieved = {}
    for record in history.report().retrievals:
        retrieved.setdefault(record.length, []).append(record.chunk)
    for step in range(0, 30, 3):
        raw = retrieved[max(length for length in retrieved if length <= 200 + step)]
        expected = next_logits(host, out.sequences[0, : 200 + step], 200, PREFIX, WINDOW, BLOCK, raw)
        torch.testing.assert_close(out.logits[step][0].double(), expected, atol=1e-6, rtol=0)
    row = history.report().rows[0]
    assert row.retrieved == 2 * CHUNK and row.entries == sum(chunk.slots for chunk in history.report().chunks)


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static", "disable_compile": True}], ids=str)
@pytest.mark.parametrize(("window", "length"), [(1, 70), (2, 90), (32, 140)])
def test_a_prefix_of_one_token(window, length, options):
    """It is read in a forward of one column, as steps are, but is no token of the window."""
    host = make_host("llama")
    crouter = tiny_crouter(chunk_length=CHUNK)
    history = CompressedHistory(host, crouter, modes=[KeptPairs(1, BLOCK)], window=window, keep_first=1)
    out = run(host, history, *prompt(length), new=20, **options)
    for step in range(0, 20, 3):
        row = out.sequences[0, : length + step]
        expected = next_logits(host, row, length, 1, window, BLOCK)
        torch.testing.assert_close(out.logits[step][0].double(), expected, atol=1e-6, rtol=0)


@pytest.mark.slow
def test_compiled_static_cache():
    host = make_host("llama")
    config = CompileConfig(fullgraph=True, backend="eager")
    host.generation_config.compile_config = config
    out = run(host, make(host), *prompt(140), cache_implementation="static")
    assert_exact(host, out, [140], every=6)


def test_the_peak_is_two_blocks():
    host, seen = make_host("llama"), []
    host.model.layers[0].register_forward_hook(
        lambda m, a, k, o: seen.append(k["past_key_values"].get_seq_length()), with_kwargs=True
    )
    history = make(host, block=CHUNK)
    run(host, history, *prompt(480), new=2)
    entries = sum(chunk.slots for chunk in history.report().chunks)
    assert max(seen) <= PREFIX + entries + 2 * CHUNK + WINDOW < 300


def met(host, ids):
    """What the layers showed of a forward, by number."""
    shown = {}
    with attention_met(host, seen=lambda attention: shown.update({attention.layer: attention})):
        logits = host(ids).logits
    return logits, shown


def test_other_calls_keep_their_attention():
    host, other = make_host("llama"), make_host("llama", seed=1)
    ids, shown = prompt(20)[0], []
    plain = other(ids).logits
    with attention_met(host, seen=shown.append):
        assert torch.equal(other(ids).logits, plain) and not shown
        host(ids)
    assert [attention.layer for attention in shown] == [0, 1] and shown[0].queries.shape == (1, 4, 20, 8)
    assert shown[0].keys.shape == (1, 2, 20, 8) and shown[0].scaling == 8**-0.5
    assert not ALL_ATTENTION_FUNCTIONS._local_mapping


def test_a_function_of_the_user_s_own_comes_back(monkeypatch):
    host, ids, called = make_host("llama"), prompt(20)[0], []
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]
    own = lambda *args, **options: called.append(1) or plain(*args, **options)  # noqa: E731
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", own)
    outer, inner = [], []
    with attention_met(host, seen=outer.append):
        with attention_met(host, seen=inner.append):
            host(ids)
        host(ids)
    assert len(called) == 4 and len(outer) == len(inner) == 2
    assert ALL_ATTENTION_FUNCTIONS._local_mapping == {"sdpa": own}


def test_eager_attention_is_met_as_well():
    host = make_host("llama")
    host.set_attn_implementation("eager")
    ids = prompt(20)[0]
    plain = host(ids).logits
    logits, shown = met(host, ids)
    assert torch.equal(logits, plain) and sorted(shown) == [0, 1]


def test_attention_that_hides_its_queries_is_refused():
    host = make_host("llama")
    with pytest.raises(InputError, match="common interface"), attention_met(host, seen=print):
        pass


def test_masks_of_layers_alone_or_stacked_are_what_attention_reads_by():
    host, ids = make_host("llama"), prompt(9)[0]
    causal = torch.ones(9, 9, dtype=torch.bool).tril()[None, None]
    near = causal & ~torch.ones(9, 9, dtype=torch.bool).tril(-3)
    plain = host(ids).logits
    with attention_met(host, lambda layer, keys: near if layer else causal):
        alone = host(ids, attention_mask=causal).logits
        stacked = host(ids, attention_mask=torch.cat([causal, near], 1)).logits
        assert torch.equal(host(ids, attention_mask=torch.cat([causal, causal], 1)).logits, plain)
    assert torch.equal(alone, stacked) and not torch.allclose(alone, plain)


def test_the_reference_reads_plain_text_as_the_host_does():
    for family in FAMILIES:
        host, ids = make_host(family), prompt(40)[0]
        expected = host(ids, use_cache=False).logits[0, -1]
        torch.testing.assert_close(next_logits(host, ids[0], 40, PREFIX, WINDOW, BLOCK), expected, atol=1e-9, rtol=0)
    assert reference.pieces(40, PREFIX, CHUNK, WINDOW)[1] == []
