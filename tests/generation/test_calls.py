import threading

import pytest
import torch
from transformers import TextIteratorStreamer
from transformers.generation import CompileConfig

from hf_crouter.history import attach
from hf_crouter.modes import Copy, SoftPrompts

from ..histories import PREFIX, WINDOW, assert_matches_reference, make, run
from ..tiny import CHUNK, VOCAB, prompt, tiny_crouter, tiny_host, tiny_projector

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


class TestModes:
    def test_beams_equal_beams_that_always_start_over(self, host, crouter, history):
        ids, mask = prompt(60, 30)
        out = run(host, ids, mask, new=25, num_beams=3, logits_processor=[history], output_scores=True)
        # every kept hypothesis scored by the independent one-pass score
        rows = out.sequences
        full = torch.cat([mask, torch.ones(2, 25, dtype=torch.long)], 1)
        score = history.score(rows, last=25, attention_mask=full).mean(1)
        torch.testing.assert_close(out.sequences_scores, score, atol=1e-4, rtol=0)

    def test_beams_encode_equal_chunks_once(self, host, crouter):
        history, rows = make(host, crouter), []
        encode = crouter.encode
        crouter.encode = lambda ids, *a, **k: rows.append(len(ids)) or encode(ids, *a, **k)
        run(host, *prompt(PREFIX + 3 * CHUNK + WINDOW), new=2, num_beams=4, logits_processor=[history])
        assert sum(rows) == 3

    @pytest.mark.parametrize("options", [{"num_return_sequences": 3}, {"repetition_penalty": 1.3}], ids=str)
    def test_sampling(self, host, crouter, history, options):
        torch.manual_seed(0)
        out = run(host, *prompt(70), logits_processor=[history], **{"do_sample": True, **options})
        assert_matches_reference(out, [70] * len(out.sequences), host, crouter, history.policy.compressor.projector)

    @pytest.mark.parametrize("length", [59, 60, 61, 62, 63, 70])
    def test_prompt_lookup_equals_greedy(self, host, crouter, history, length):
        ids, _ = prompt(length)
        ids[:, -20:] = ids[:, -40:-20]
        greedy = run(host, ids, new=50, logits_processor=[history])
        drafted = run(host, ids, new=50, logits_processor=[history], prompt_lookup_num_tokens=4)
        assert torch.equal(greedy.sequences, drafted.sequences)
        torch.testing.assert_close(torch.stack(greedy.logits), torch.stack(drafted.logits), atol=1e-4, rtol=0)

    @pytest.mark.parametrize("seed", [0, 3])
    def test_assistant_model_equals_greedy(self, host, history, seed):
        ids, _ = prompt(70)
        greedy = run(host, ids, logits_processor=[history])
        assisted = run(host, ids, logits_processor=[history], assistant_model=tiny_host(seed=seed))
        assert torch.equal(greedy.sequences, assisted.sequences)

    def test_assistant_with_its_own_history(self, host, crouter, history):
        ids, _ = prompt(70)
        options = {"logits_processor": [history], "suppress_tokens": [0]}  # generate would mask a written padding id
        greedy = run(host, ids, **options)
        assistant = tiny_host()
        with attach(
            assistant,
            crouter,
            modes=[SoftPrompts(tiny_projector(assistant, crouter)), Copy()],
            window=WINDOW,
            keep_first=PREFIX,
        ):
            assisted = run(host, ids, assistant_model=assistant, **options)
        assert torch.equal(greedy.sequences, assisted.sequences)

    def test_assisted_on_a_sliding_host(self, crouter):
        host = tiny_host("gemma2")
        history = make(host, crouter)
        ids, _ = prompt(70)
        greedy = run(host, ids, logits_processor=[history])
        assisted = run(host, ids, logits_processor=[history], assistant_model=tiny_host(seed=1))
        assert torch.equal(greedy.sequences, assisted.sequences)

    def test_streaming_in_a_thread(self, host, history):
        class Words:
            def decode(self, ids, **_):
                return " ".join(str(int(i)) for i in torch.as_tensor(ids).flatten())

        ids, mask = prompt(70)
        greedy = run(host, ids, new=12, logits_processor=[history])
        streamer = TextIteratorStreamer(Words(), skip_prompt=True)
        options = {"max_new_tokens": 12, "do_sample": False, "streamer": streamer, "attention_mask": mask}
        thread = threading.Thread(target=host.generate, args=(ids,), kwargs={**options, "logits_processor": [history]})
        thread.start()
        words = "".join(streamer).split()
        thread.join()
        assert words == [str(i) for i in greedy.sequences[0, 70:].tolist()]

    def test_static_cache(self, host, crouter, history):
        ids, mask = prompt(70, 33)
        greedy = run(host, ids, mask, logits_processor=[history])
        static = run(host, ids, mask, logits_processor=[history], cache_implementation="static")
        torch.testing.assert_close(torch.stack(greedy.logits), torch.stack(static.logits), atol=1e-4, rtol=0)
        assert static.past_key_values.layers[0].keys.shape[2] < 109

    def test_static_cache_too_small_to_need_compression_is_left_alone(self, host, history):
        ids, _ = prompt(10)
        plain = run(host, ids, new=8, cache_implementation="static")
        ours = run(host, ids, new=8, cache_implementation="static", logits_processor=[history])
        assert type(ours.past_key_values) is type(plain.past_key_values)
        assert torch.equal(torch.stack(plain.logits), torch.stack(ours.logits))

    def test_compiled_decoding_is_one_graph_across_compactions(self, host, history):
        graphs = []

        def backend(module, example_inputs):
            graphs.append(module)
            return module.forward

        ids, _ = prompt(70)
        greedy = run(host, ids, new=50, logits_processor=[history])
        torch._dynamo.reset()
        config = CompileConfig(backend=backend, fullgraph=True, dynamic=False, mode=None)
        config._compile_all_devices = True
        options = {"cache_implementation": "static", "compile_config": config}
        compiled = run(host, ids, new=50, logits_processor=[history], **options)
        assert torch.equal(greedy.sequences, compiled.sequences)
        assert len(graphs) == 1

    @pytest.mark.parametrize("extra", [0, 3, 25, 150])
    def test_a_later_turn_equals_from_scratch(self, host, crouter, history, extra):
        first = run(host, *prompt(70), new=20, logits_processor=[history])
        turn = torch.cat([first.sequences, prompt(extra + 1, seed=5)[0]], 1)
        cache = first.past_key_values
        again = run(host, turn, new=20, logits_processor=[history], past_key_values=cache)
        scratch = run(host, turn, new=20, logits_processor=[history])
        torch.testing.assert_close(torch.stack(again.logits), torch.stack(scratch.logits), atol=1e-4, rtol=0)
        assert again.past_key_values is cache

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

    def test_bfloat16_host_and_float32_crouter(self, crouter):
        host = tiny_host().to(torch.bfloat16)
        history = make(host, crouter)
        out = run(host, *prompt(70), new=5, logits_processor=[history])
        assert out.sequences.shape[1] == 75 and history.report().kv_bytes_full == 74 * 128
