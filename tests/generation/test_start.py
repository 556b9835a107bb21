"""A call is read compressed, left to its host bit for bit, or refused before any forward, with the true reason."""

import pytest
import torch
from transformers import DynamicCache, GenerationMixin, StaticCache

from hf_crouter.errors import CapacityError, InputError
from hf_crouter.history import attach
from hf_crouter.modes import Retrieve

from ..histories import PREFIX, WINDOW, make, run
from ..hosts.tiny_families import tiny_family
from ..tiny import CHUNK, prompt, tiny_crouter, tiny_host

torch.set_num_threads(1)
SHORT, LONG = 12, 70  # tokens of prompts; only the second is ever compressed


@pytest.fixture
def host():
    return tiny_host()


@pytest.fixture
def history(host):
    return make(host, tiny_crouter())


def counted(host):
    """Forwards of the host's layers so far, in a list that grows."""
    calls = []
    host.model.layers[0].register_forward_pre_hook(lambda module, args: calls.append(1))
    return calls


def embeddings(host, length):
    return {"inputs_embeds": host.get_input_embeddings()(prompt(length)[0]).detach()}


def right_padded(length):
    ids, mask = prompt(length, length - 3)
    return {"input_ids": ids.flip(1), "attention_mask": mask.flip(1)}


def with_hole(length):
    ids, mask = prompt(length)
    mask[:, length // 2] = 0
    return {"input_ids": ids, "attention_mask": mask}


def with_pad_token(length):
    ids = prompt(length)[0]
    ids[:, length // 2] = 0
    return {"input_ids": ids}


def plain_call(length, **options):
    ids, mask = prompt(length)
    return {"input_ids": ids, "attention_mask": mask, **options}


class Mine(DynamicCache):
    pass


def always(host):
    return attach(host, tiny_crouter(), modes=["copy"], window=WINDOW, keep_first=PREFIX)


ODD = {
    "embeddings": (lambda host, n: embeddings(host, n), "inputs_embeds: expected input_ids"),
    "right padding": (lambda host, n: right_padded(n), "padding at the right"),
    "a hole": (lambda host, n: with_hole(n), "got holes"),
    "a pad token and no mask": (lambda host, n: with_pad_token(n), "the prompt holds the pad token"),
    "no cache": (lambda host, n: plain_call(n, use_cache=False), "use_cache: expected True"),
    "a cache class of one's own": (lambda host, n: plain_call(n, past_key_values=Mine()), "got Mine"),
    "positions of one's own": (
        lambda host, n: plain_call(n, position_ids=torch.arange(5, n + 5)[None]),
        "position_ids: expected none",
    ),
    "prefill in pieces": (lambda host, n: plain_call(n, prefill_chunk_size=4), "prefill_chunk_size"),
}


@pytest.mark.parametrize("kind", ODD)
class TestOddCalls:
    def call(self, host, kind, length, **options):
        inputs = ODD[kind][0](host, length)
        return host.generate(**inputs, max_new_tokens=5, do_sample=False, **options)

    def test_short_ones_are_the_plain_hosts(self, host, history, kind):
        expected = self.call(tiny_host(), kind, SHORT)
        assert torch.equal(self.call(host, kind, SHORT, logits_processor=[history]), expected)
        assert "Nothing was compressed" in str(history.report())

    def test_long_ones_are_refused_before_any_forward(self, host, history, kind):
        calls = counted(host)
        with pytest.raises(InputError, match=ODD[kind][1]):
            self.call(host, kind, LONG, logits_processor=[history])
        assert not calls

    def test_what_could_become_long_is_refused_as_well(self, host, history, kind):
        inputs = ODD[kind][0](host, SHORT)
        with pytest.raises(InputError, match=ODD[kind][1]):
            host.generate(**inputs, max_new_tokens=LONG, logits_processor=[history])

    def test_always_on(self, host, kind):
        with always(host), pytest.raises(InputError, match=ODD[kind][1]):
            self.call(host, kind, LONG)


class TestCaches:
    def test_a_dynamic_cache_of_the_caller_is_filled(self, host, history):
        cache = DynamicCache()
        out = run(host, *prompt(LONG), new=10, logits_processor=[history], past_key_values=cache)
        assert out.past_key_values is cache
        assert cache.get_seq_length() == history.report().slots < LONG
        turn = torch.cat([out.sequences, prompt(30, seed=4)[0]], 1)
        again = run(host, turn, new=10, logits_processor=[history], past_key_values=cache)
        scratch = run(host, turn, new=10, logits_processor=[history])
        torch.testing.assert_close(torch.stack(again.logits), torch.stack(scratch.logits), atol=1e-4, rtol=0)

    def test_a_short_call_fills_it_as_the_plain_host_does(self, host, history):
        cache, plain = DynamicCache(), DynamicCache()
        run(host, *prompt(SHORT), new=5, logits_processor=[history], past_key_values=cache)
        run(tiny_host(), *prompt(SHORT), new=5, past_key_values=plain)
        assert all(torch.equal(a.keys, b.keys) for a, b in zip(cache.layers, plain.layers, strict=True))

    def test_a_compressed_one_is_not_read_on_without_its_history(self, host, history):
        out = run(host, *prompt(LONG), new=5, logits_processor=[history])
        with pytest.raises(InputError, match="pass its CompressedHistory"):
            run(host, out.sequences, new=5, past_key_values=out.past_key_values)

    def test_a_static_cache_of_the_caller_is_filled(self, host, history):
        cache = StaticCache(config=host.config, max_cache_len=LONG + 9)
        out = run(host, *prompt(LONG), new=10, logits_processor=[history], past_key_values=cache)
        assert out.past_key_values is cache and int(cache.get_seq_length()) == history.report().slots
        assert torch.equal(out.sequences, run(host, *prompt(LONG), new=10, logits_processor=[history]).sequences)

    def test_one_that_is_too_small_is_refused(self, host, history):
        cache, calls = StaticCache(config=host.config, max_cache_len=20), counted(host)
        with pytest.raises(InputError, match="static cache of at least 79 slots, got 20"):
            run(host, *prompt(LONG), new=10, logits_processor=[history], past_key_values=cache)
        assert not calls

    def test_a_filled_plain_cache(self, host, history):
        first = run(tiny_host(), *prompt(SHORT), new=2)
        turn = torch.cat([first.sequences, prompt(4, seed=4)[0]], 1)
        expected = run(tiny_host(), turn, new=3)
        out = run(host, turn, new=3, logits_processor=[history], past_key_values=first.past_key_values)
        torch.testing.assert_close(torch.stack(out.logits), torch.stack(expected.logits), atol=1e-5, rtol=0)
        calls = counted(host)
        with pytest.raises(InputError, match="uncompressed history"):
            run(host, turn, new=LONG, logits_processor=[history], past_key_values=first.past_key_values)
        assert not calls

    def test_a_conversation_that_becomes_long(self, host, history):
        first = run(host, *prompt(SHORT), new=4, logits_processor=[history])
        turn = torch.cat([first.sequences, prompt(60, seed=4)[0]], 1)
        again = run(host, turn, new=9, logits_processor=[history], past_key_values=first.past_key_values)
        scratch = run(host, turn, new=9, logits_processor=[history])
        torch.testing.assert_close(torch.stack(again.logits), torch.stack(scratch.logits), atol=1e-4, rtol=0)

    def test_one_that_does_not_know_a_hosts_layers(self):
        host = tiny_family("lfm2")
        history = make(host, tiny_crouter())
        with pytest.raises(InputError, match=r"expected DynamicCache\(config=host.config\)"):
            run(host, *prompt(LONG), new=5, logits_processor=[history], past_key_values=DynamicCache())
        cache = DynamicCache(config=host.config)
        run(host, *prompt(LONG), new=5, logits_processor=[history], past_key_values=cache)
        assert cache.get_seq_length() == history.report().slots

    def test_quantised(self, host, history):
        with pytest.raises(InputError, match="cache_implementation: expected a dynamic or static one"):
            run(host, *prompt(LONG), new=5, logits_processor=[history], cache_implementation="quantized")

    @pytest.mark.parametrize("family", ["mistral", "phi3"])
    def test_a_static_cache_whose_layers_all_slide(self, family):
        host = tiny_family(family, sliding_window=12)
        history = make(host, tiny_crouter())
        out = run(host, *prompt(LONG), new=30, logits_processor=[history], cache_implementation="static")
        expected = run(host, *prompt(LONG), new=30, logits_processor=[history])
        assert torch.equal(out.sequences, expected.sequences) and history.report().chunks
        torch.testing.assert_close(torch.stack(out.logits), torch.stack(expected.logits), atol=1e-4, rtol=0)


class TestCapacity:
    @pytest.mark.parametrize("length, new, window", [(250, 200, WINDOW), (40, 200, 100)])
    def test_is_known_at_the_start(self, length, new, window):
        host = tiny_host(positions=64)
        history, calls = make(host, tiny_crouter(), window=window), counted(host)
        with pytest.raises(CapacityError, match=f"got a prompt of {length} and {new} new ones"):
            run(host, *prompt(length), new=new, logits_processor=[history])
        assert not calls

    def test_all_that_it_names_can_be_read(self):
        host = tiny_host(positions=64)
        history = make(host, tiny_crouter())
        with pytest.raises(CapacityError) as error:
            run(host, *prompt(250), new=200, logits_processor=[history])
        most = int(str(error.value).split("at most ")[1].split()[0])
        run(host, *prompt(250), new=most - 249, logits_processor=[history])
        assert history.report().peak_slots <= 64
        with pytest.raises(CapacityError):
            run(host, *prompt(250), new=most - 248, logits_processor=[history])

    def test_calls_that_compress_nothing_are_left_alone(self):
        host = tiny_host(positions=64)
        history = make(host, tiny_crouter(), window=100)
        expected = run(tiny_host(positions=64), *prompt(40), new=60)
        out = run(host, *prompt(40), new=60, logits_processor=[history])
        assert torch.equal(torch.stack(out.logits), torch.stack(expected.logits))

    def test_score(self):
        host = tiny_host(positions=64)
        history, calls = make(host, tiny_crouter()), counted(host)
        with pytest.raises(CapacityError, match="got a prompt of 349 and 51 new ones"):
            history.score(prompt(400)[0], 51)
        assert not calls


class TestWaysToGenerate:
    def test_batches_of_continuous_batching(self, host):
        long, short = prompt(LONG)[0][0].tolist(), prompt(SHORT)[0][0].tolist()
        with always(host):
            with pytest.raises(InputError, match="continuous batching"):
                host.generate_batch([short, long], max_new_tokens=3)
            with pytest.raises(InputError, match="continuous batching"):
                host.init_continuous_batching()
            with pytest.raises(InputError, match="continuous batching"):
                host.generate(prompt(LONG)[0], cache_implementation="paged", max_new_tokens=3)

    def test_a_custom_function_that_prepares_its_inputs_is_served(self, host, history):
        def sample(model, input_ids, **options):
            return GenerationMixin._sample(model, input_ids, **options)

        out = run(host, *prompt(LONG), new=5, logits_processor=[history], custom_generate=sample)
        assert torch.equal(out.sequences, run(host, *prompt(LONG), new=5, logits_processor=[history]).sequences)

    def test_one_that_reads_by_itself_is_refused(self, host, history):
        def read(model, input_ids, **options):
            model(input_ids)
            return input_ids

        calls = counted(host)
        with pytest.raises(InputError, match="compression was skipped"):
            run(host, *prompt(LONG), new=5, logits_processor=[history], custom_generate=read)
        assert not calls and not host._forward_pre_hooks
        assert torch.equal(
            run(host, *prompt(SHORT), new=5, logits_processor=[history], custom_generate=read), prompt(SHORT)[0]
        )

    @pytest.mark.parametrize(
        "options, words",
        [
            ({"penalty_alpha": 0.5, "top_k": 4, "trust_remote_code": True}, "got contrastive search"),
            ({"dola_layers": "low", "trust_remote_code": True}, "got dola generation"),
            ({"num_beams": 4, "num_beam_groups": 2, "trust_remote_code": True}, "got group beam search"),
            ({"assistant_early_exit": 1}, "assistant_early_exit"),
            ({"guidance_scale": 1.5}, "guidance_scale: expected none, got one; its second context of 31 tokens"),
        ],
    )
    def test_others_are_refused_where_something_would_be_compressed(self, host, history, options, words):
        calls = counted(host)
        with pytest.raises(InputError, match=words):
            run(host, *prompt(LONG), new=30, logits_processor=[history], **options)
        assert not calls

    def test_guidance_with_a_short_second_context_is_served(self, host, history):
        out = run(host, *prompt(LONG), new=6, logits_processor=[history], guidance_scale=1.5)
        assert out.sequences.shape == (1, LONG + 6) and history.report().chunks

    def test_images(self, host, history):
        with pytest.raises((InputError, ValueError), match="pixel_values"):
            run(host, *prompt(LONG), new=5, logits_processor=[history], pixel_values=torch.zeros(1, 3, 8, 8))

    def test_placeholders_of_images(self, host, history):
        host.config.image_token_id = 50
        ids = prompt(LONG)[0]
        ids[:, 60] = 50
        with pytest.raises(InputError, match="image_token_id 50"):
            run(host, ids, new=5, logits_processor=[history])
        short = prompt(SHORT)[0]
        short[:, 3] = 50
        assert torch.equal(
            run(host, short, new=3, logits_processor=[history]).sequences, run(tiny_host(), short, new=3).sequences
        )


class TestOtherHosts:
    def test_a_copy_of_the_host(self, host, history):
        import copy

        other = copy.deepcopy(host)
        with pytest.raises(InputError, match="compression was skipped"):
            run(other, *prompt(LONG), new=2, logits_processor=[history])
        least = WINDOW + CHUNK + PREFIX
        with pytest.raises(InputError, match="compression was skipped"):
            run(other, *prompt(least), new=1, logits_processor=[history])
        expected = run(tiny_host(), *prompt(least - 1), new=1)
        assert torch.equal(run(other, *prompt(least - 1), new=1, logits_processor=[history]).sequences,
                           expected.sequences)  # fmt: skip

    def test_padding_does_not_count(self, host, history):
        ids, mask = prompt(SHORT)
        pad = torch.zeros(1, LONG, dtype=torch.long)
        run(tiny_host(), torch.cat([pad, ids], 1), torch.cat([pad, mask], 1), new=2, logits_processor=[history])


def test_a_long_first_turn_is_told_in_the_report(host):
    history = make(host, tiny_crouter(), keep_first=200)
    run(host, *prompt(120), new=3, logits_processor=[history])
    assert "behind the first 122 tokens, which stay raw" in str(history.report())


def test_a_retrieving_history_without_a_crouter_checks_as_well(host):
    history = make(host, None, copy=False, retrieve=1)
    assert any(isinstance(mode, Retrieve) for mode in history.modes)
    with pytest.raises(InputError, match="use_cache"):
        run(host, *prompt(600), new=600, logits_processor=[history], use_cache=False)
