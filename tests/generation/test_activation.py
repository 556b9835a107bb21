import threading

import pytest
import torch
from transformers import LogitsProcessorList

from hf_crouter.errors import InputError
from hf_crouter.history import attach
from hf_crouter.modes import SoftPrompts

from ..histories import PREFIX, WINDOW, assert_matches_reference, make, run
from ..tiny import VOCAB, prompt, tiny_crouter, tiny_host, tiny_projector

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


class TestActivation:
    def plain(self, length=70):
        host = tiny_host()
        return run(host, *prompt(length), new=10)

    def same(self, out):
        return torch.equal(torch.stack(out.logits), torch.stack(self.plain().logits))

    def test_calls_without_the_processor_are_plain(self, host, history):
        assert self.same(run(host, *prompt(70), new=10))
        assert not self.same(run(host, *prompt(70), new=10, logits_processor=[history]))
        assert self.same(run(host, *prompt(70), new=10))

    def test_detach(self, host, history):
        cls = type(tiny_host())
        assert type(host) is not cls
        history.detach()
        assert type(host) is cls
        assert self.same(run(host, *prompt(70), new=10, logits_processor=[history]))

    def test_two_histories_on_one_host(self, host, crouter):
        one, two = make(host, crouter), make(host, crouter, window=20)
        first = run(host, *prompt(70), new=5, logits_processor=[one])
        one.detach()
        assert self.same(run(host, *prompt(70), new=10, logits_processor=[one]))
        second = run(host, *prompt(70), new=5, logits_processor=LogitsProcessorList([two]))
        assert not torch.allclose(torch.stack(first.logits), torch.stack(second.logits))
        two.detach()
        assert type(host) is type(tiny_host())

    def test_attach_restores_after_an_exception(self, host, crouter):
        with (
            pytest.raises(RuntimeError, match="stop"),
            attach(
                host, crouter, modes=[SoftPrompts(tiny_projector(host, crouter))], window=WINDOW, keep_first=PREFIX
            ) as history,
        ):
            assert not self.same(run(host, *prompt(70), new=10))
            assert history.report().chunks
            raise RuntimeError("stop")
        assert self.same(run(host, *prompt(70), new=10))
        assert type(host) is type(tiny_host()) and not [k for k in vars(host) if "crouter" in k]

    def test_attach_blocks_that_overlap(self, host, crouter):
        options = {"window": WINDOW, "keep_first": PREFIX, "modes": [SoftPrompts(tiny_projector(host, crouter))]}
        first, second = attach(host, crouter, **options), attach(host, crouter, **options)
        first.__enter__()
        history = second.__enter__()
        first.__exit__(None, None, None)
        assert not self.same(run(host, *prompt(70), new=10)) and history.report().chunks
        second.__exit__(None, None, None)
        assert self.same(run(host, *prompt(70), new=10))
        assert type(host) is type(tiny_host()) and not [k for k in vars(host) if "crouter" in k]

    def test_a_call_that_fails_has_no_report(self, host, history):
        run(host, *prompt(70), new=3, logits_processor=[history])
        assert history.report().chunks
        with pytest.raises(InputError):
            run(host, *prompt(70), new=3, logits_processor=[history], use_cache=False)
        assert not history.report().chunks

    @pytest.mark.parametrize("call", range(1, 12))
    def test_a_failing_forward_leaves_the_host_plain_and_the_cache_usable(self, host, history, call):
        first = run(host, *prompt(60), new=3, logits_processor=[history])
        turn = torch.cat([first.sequences, prompt(40, seed=5)[0]], 1)
        calls = []

        def fail(module, args):
            calls.append(1)
            if len(calls) == call:
                raise RuntimeError("stop")

        hook = host.model.layers[1].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="stop"):
            run(host, turn, new=20, logits_processor=[history], past_key_values=first.past_key_values)
        hook.remove()
        assert self.same(run(host, *prompt(70), new=10))
        again = run(host, turn, new=10, logits_processor=[history], past_key_values=first.past_key_values)
        scratch = run(host, turn, new=10, logits_processor=[history])
        torch.testing.assert_close(torch.stack(again.logits), torch.stack(scratch.logits), atol=1e-4, rtol=0)

    def test_threads_with_and_without_history(self, host, crouter, history):
        wider = make(host, crouter, window=20)
        arms = {None: [], history: [history], wider: [wider]}
        expected = {arm: run(host, *prompt(70), new=15, logits_processor=p).sequences for arm, p in arms.items()}
        results, threads = [], []

        def work(arm):
            results.append((arm, run(host, *prompt(70), new=15, logits_processor=arms[arm]).sequences))

        for arm in list(arms) * 3:
            threads.append(threading.Thread(target=work, args=(arm,)))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(results) == 9
        assert all(torch.equal(sequences, expected[arm]) for arm, sequences in results)

    def test_the_call_is_pure(self, host, history):
        ids, scores = prompt(20)[0], torch.randn(1, VOCAB)
        assert torch.equal(history(ids, scores.clone()), scores)
        with pytest.raises(InputError, match="skipped"):
            history(torch.zeros(1, 5000, dtype=torch.long), scores)

    def test_a_foreign_host(self, history):
        other = tiny_host(seed=4, positions=4096)
        with pytest.raises(InputError, match="skipped"):
            run(other, *prompt(1200), new=2, logits_processor=[history])

    def test_wrapped_hosts(self, host, crouter):
        peft = pytest.importorskip("peft")
        torch.manual_seed(0)
        wrapped = peft.get_peft_model(tiny_host(), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
        history = make(wrapped.eval(), crouter)
        out = run(wrapped, prompt(70)[0], logits_processor=[history], new=20)
        assert_matches_reference(out, (70,), wrapped.get_base_model(), crouter, history.policy.compressor.projector)
        assert len(history.report().chunks) > 2

        compiled = torch.compile(host, backend="eager")
        history = make(compiled, crouter)
        out = run(compiled, prompt(70)[0], logits_processor=[history], new=5)
        assert_matches_reference(out, (70,), host, crouter, history.policy.compressor.projector)
        with pytest.raises(InputError, match="prompt learning"):
            prefix = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
            make(peft.get_peft_model(tiny_host(), prefix), crouter)
