"""Experts in generation: every step equals one forward in which each position has its own adapter."""

import gc
import math
import threading
from dataclasses import dataclass

import pytest
import torch
from peft import PeftModel
from transformers.generation import CompileConfig

from hf_crouter.cache.kv_cache import CompressedCache
from hf_crouter.cache.layout import common_columns
from hf_crouter.cache.policy import ContextPolicy
from hf_crouter.chunking import make_chunker
from hf_crouter.errors import InputError
from hf_crouter.history import CompressedHistory
from hf_crouter.routing.adapters import AdapterStack, Lora
from hf_crouter.types import Parts, Route

from .. import reference
from ..histories import PREFIX, WINDOW, make, run
from ..routing.test_adapters import save_adapter
from ..routing.trained_experts import trained_set
from ..test_chunking import TEXT, byte_tokenizer
from ..tiny import VOCAB, tiny_crouter, tiny_host
from .kept_pairs import KeptPairs

TARGETS = {"gpt_neox": ["query_key_value", "dense_4h_to_h"]}
NAMES = ("low", "high")
torch.set_num_threads(1)


class ByMean:
    """Low ids belong to the first expert, high ones to the second, those between to neither."""

    names, fewest = NAMES, 1

    def __init__(self):
        self.asked = 0

    def remove(self):
        pass

    def reconstruction_nlls(self, pieces):
        self.asked += len(pieces)
        means = torch.stack([piece.float().mean() / VOCAB for piece in pieces])
        return torch.stack([means, 1 - means], dim=1)

    def decide(self, nats, tokens, previous=None):
        number = int(nats.argmin()) if nats.min() < 0.46 else -1
        return Route(NAMES[number] if number >= 0 else None, number, "known" if number >= 0 else "unknown",
                     dict(zip(NAMES, nats.tolist(), strict=True)), float((nats[0] - nats[1]).abs()))  # fmt: skip

    def __call__(self, ids):
        return self.decide(self.reconstruction_nlls([torch.tensor(ids)])[0], len(ids)).number


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("routing")
    made = {}
    for family in ("llama", "gemma2", "gpt_neox"):
        targets = TARGETS.get(family, ["q_proj", "v_proj", "down_proj"])
        made[family] = [
            save_adapter(base / f"{family}{n}", n, make=lambda f=family: tiny_host(f), targets=targets)
            for n in range(2)
        ]
    return made


@pytest.fixture
def host():
    return tiny_host()


@pytest.fixture
def crouter():
    return tiny_crouter()


@dataclass(frozen=True)
class MountedByMean:
    """Two adapters of the host, told apart by the mean of a chunk's ids."""

    name = "mounted_by_mean"
    gives = ("adapters",)
    needs_crouter = False

    folders: tuple = ()

    def bind(self, setting):
        loras = dict(zip(NAMES, map(Lora.load, self.folders), strict=True))
        stack = AdapterStack(setting.host, loras)
        return Parts(router=ByMean(), adapters=stack, adapters_key=NAMES, close=stack.remove)


def routed(host, crouter, folders, family="llama", **options):
    return make(host, crouter, copy=False, extra=[MountedByMean(tuple(folders[family]))], **options)


def mixed(*lengths, seed=3):
    """Left-padded rows whose ids are low for a while, then high, then anything."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids, mask = torch.zeros(len(lengths), width, dtype=torch.long), torch.zeros(len(lengths), width, dtype=torch.long)
    for i, length in enumerate(lengths):
        bounds = [(3, VOCAB // 3), (2 * VOCAB // 3, VOCAB), (3, VOCAB)]
        order = bounds[i % 2 :] + bounds[: i % 2]
        parts = [torch.randint(*order[n % 3], (20,), generator=generator) for n in range(-(-length // 20))]
        ids[i, width - length :], mask[i, width - length :] = torch.cat(parts)[:length], 1
    return ids, mask


def deltas_of(folders, family="llama"):
    loras = [Lora.load(folder) for folder in folders[family]]
    return [{path: lora.up[path] @ lora.down[path] for path in lora.down} for lora in loras]


def assert_matches(out, lengths, host, history, folders, family="llama", atol=2e-4, raw=()):
    width = out.sequences.shape[1] - len(out.logits)
    with history.policy.serving(torch.full((1, 1), -1)):  # PEFT's own adapters rest
        for i, length in enumerate(lengths):
            for step, logits in enumerate(out.logits):
                row = out.sequences[i, width - length : width + step]
                expected = reference.routed_logits(
                    host, history.crouter, history.policy.compressor.projector, row, length, PREFIX, WINDOW,
                    deltas_of(folders, family), ByMean(), raw,
                )  # fmt: skip
                torch.testing.assert_close(logits[i], expected, atol=atol, rtol=0)


class TestExactness:
    @pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
    @pytest.mark.parametrize("lengths", [(70,), (70, 33, 5)], ids=str)
    def test_every_step_equals_a_forward_with_each_positions_adapter(self, family, lengths, folders, crouter):
        host = tiny_host(family)
        history = routed(host, crouter, folders, family)
        out = run(host, *mixed(*lengths), logits_processor=[history])
        assert_matches(out, lengths, host, history, folders, family)
        report = history.report()
        assert {chunk.expert for chunk in report.chunks} >= {"low", "high"}
        if family == "llama":
            assert len({route.expert for route in report.routes}) > 1, "the window's route never changed"

    def test_keys_made_under_another_adapter_are_seen(self, folders, host, crouter, monkeypatch):
        """A fault that this file is there to catch: keys of an adapter that no longer serves."""
        history = routed(host, crouter, folders)

        def stale(policy, experts):
            return policy.adapters.using(None if experts is None else torch.full_like(experts, 0))

        monkeypatch.setattr("hf_crouter.cache.policy.ContextPolicy.serving", stale)
        out = run(host, *mixed(70), logits_processor=[history])
        monkeypatch.undo()
        with pytest.raises(AssertionError, match="not close"):
            assert_matches(out, (70,), host, history, folders)

    @pytest.mark.parametrize("forgets", [False, True])
    def test_a_prefix_read_under_another_adapter_is_read_anew(self, forgets, folders, host, crouter, monkeypatch):
        """Before the first compaction it is the window's, then the first chunk's."""
        low, high = mixed(20)[0][0], mixed(40)[0][0, 20:]
        ids = torch.cat([low[:18], high[:8]])[None]
        if forgets:
            monkeypatch.setattr("hf_crouter.cache.prefill.common_columns", lambda a, b: common_columns(a[:1], b[:1]))
        history = routed(host, crouter, folders)
        out = run(host, ids, new=6, logits_processor=[history])
        report = history.report()
        assert report.routes[0].expert != report.chunks[0].expert
        if forgets:
            with pytest.raises(AssertionError, match="not close"):
                assert_matches(out, (26,), host, history, folders)
        else:
            assert_matches(out, (26,), host, history, folders)

    def test_scores_are_those_of_generate(self, folders, host, crouter):
        history = routed(host, crouter, folders)
        ids, mask = mixed(70, 50)
        out = run(host, ids, mask, logits_processor=[history])
        wide = torch.cat([mask, torch.ones(2, len(out.logits), dtype=torch.long)], dim=1)
        scores = history.score(out.sequences, last=len(out.logits), attention_mask=wide)
        steps = torch.stack(out.logits, dim=1).float().log_softmax(-1)
        expected = steps.gather(2, out.sequences[:, ids.shape[1] :, None])[..., 0]
        torch.testing.assert_close(scores, expected, atol=2e-4, rtol=0)

    def test_scores_do_not_depend_on_batchmates_prompts(self, folders, host, crouter):
        history = routed(host, crouter, folders, retrieve=1, retrieve_every=8)
        ids, mask = mixed(90, 90)
        both = history.score(ids, last=[40, 12], attention_mask=mask)
        alone = history.score(ids[1:], last=12)
        torch.testing.assert_close(both[1:, -12:], alone, atol=2e-4, rtol=0)

    def test_beams(self, folders, host, crouter):
        options = {"num_beams": 3, "num_return_sequences": 3, "output_scores": True, "new": 30}
        history = routed(host, crouter, folders)
        out = run(host, *mixed(60), logits_processor=[history], **options)
        for i in range(3):
            row = out.sequences[i]
            total = history.score(row[None], last=30).sum()
            assert total.item() / 30 == pytest.approx(out.sequences_scores[i].item(), abs=1e-4)

    def test_recalled_chunks_are_served_by_their_own_expert(self, folders, host, crouter):
        history = routed(host, crouter, folders, retrieve=1, retrieve_every=1000)
        out = run(host, *mixed(70), new=3, logits_processor=[history])
        retrieved = [record.chunk for record in history.report().retrievals]
        assert len(retrieved) == 1
        assert_matches(out, (70,), host, history, folders, raw=retrieved)

    def test_static_cache_one_graph(self, folders, host, crouter):
        graphs = []

        def backend(graph, inputs):
            graphs.append(graph)
            return graph.forward

        config = CompileConfig(backend=backend, fullgraph=True, mode=None)
        config._compile_all_devices = True
        plain = make(host, crouter, copy=False)  # its graph must not serve the experts
        static = {"cache_implementation": "static", "compile_config": config, "disable_compile": False}
        run(host, *mixed(70), logits_processor=[plain], **static)
        before = len(graphs)
        history = routed(host, crouter, folders)
        out = run(host, *mixed(70), logits_processor=[history], **static)
        assert before == 1 and len(graphs) == 2
        assert_matches(out, (70,), host, history, folders)

    def test_a_static_cache_for_a_short_prompt(self, folders, host, crouter):
        ids = mixed(12)
        dynamic = run(host, *ids, new=5, logits_processor=[routed(host, crouter, folders)])
        static = run(host, *ids, new=5, logits_processor=[routed(host, crouter, folders)],
                     cache_implementation="static")  # fmt: skip
        torch.testing.assert_close(torch.stack(static.logits), torch.stack(dynamic.logits), atol=2e-4, rtol=0)

    def test_key_value_pairs_are_read_under_their_chunk_s_adapter(self, folders):
        """Entries made by reading: a padded batch, beams' score and one-pass scores agree, and adapters matter."""
        host = tiny_host().double()
        crouter = tiny_crouter(chunk_length=32)

        def history(*more):
            modes = [KeptPairs(PREFIX), *more]
            return CompressedHistory(host, crouter, modes=modes, window=WINDOW, keep_first=PREFIX)

        mounted = history(MountedByMean(tuple(folders["llama"])))
        out = run(host, *mixed(120, 90), new=40, logits_processor=[mounted])
        assert {chunk.expert for chunk in mounted.report().chunks} >= {"low", "high"}
        alone = run(host, out.sequences[1:, 30:120], new=40, logits_processor=[mounted])
        torch.testing.assert_close(torch.stack(out.logits)[:, 1:], torch.stack(alone.logits), atol=1e-5, rtol=0)
        scores = mounted.score(out.sequences[:1], last=40)
        expected = torch.stack(out.logits, 1)[:1].log_softmax(-1).gather(2, out.sequences[:1, 120:, None])[..., 0]
        torch.testing.assert_close(scores.double(), expected.double(), atol=1e-5, rtol=0)
        mounted.detach()
        plain = history().score(out.sequences[:1], last=40)
        assert (plain - scores).abs().max() > 1e-3

    def test_guidance_with_a_padded_batch(self, folders, host, crouter):
        history = routed(host, crouter, folders)
        out = run(host, *mixed(70, 33, 5), new=6, logits_processor=[history], guidance_scale=1.5)
        assert out.sequences.shape == (3, 76)

    def test_threads_do_not_see_each_others_adapters(self, folders, host, crouter):
        plain = run(host, *mixed(40), new=20)
        history = routed(host, crouter, folders)
        expected = run(host, *mixed(70), new=20, logits_processor=[history])
        found = {}

        def work(name, *words, **options):
            found[name] = [run(host, *words, new=20, **options).sequences for _ in range(3)]

        threads = [threading.Thread(target=work, args=("plain", *mixed(40)))]
        threads.append(
            threading.Thread(target=work, args=("routed", *mixed(70)), kwargs={"logits_processor": [history]})
        )
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(torch.equal(ids, plain.sequences) for ids in found["plain"])
        assert all(torch.equal(ids, expected.sequences) for ids in found["routed"])


class TestAround:
    def test_the_host_is_bit_for_bit_itself_afterwards(self, folders, host, crouter):
        plain = run(host, *mixed(40), new=5)
        history = routed(host, crouter, folders)
        run(host, *mixed(70), logits_processor=[history])
        again = run(host, *mixed(40), new=5)
        assert torch.equal(torch.stack(plain.logits), torch.stack(again.logits))
        history.detach()
        assert not any(module._forward_hooks for module in host.modules())

    @pytest.mark.parametrize("native", [True, False])
    def test_adapters_that_peft_has_mounted(self, native, folders, crouter):
        host = tiny_host()
        if native:
            host.load_adapter(str(folders["llama"][0]), adapter_name="low")
            host.load_adapter(str(folders["llama"][1]), adapter_name="high")
            outer = host
        else:
            outer = PeftModel.from_pretrained(host, str(folders["llama"][0]), adapter_name="low")
            outer.load_adapter(str(folders["llama"][1]), adapter_name="high")
        history = routed(host, crouter, folders)
        before = run(outer, *mixed(40), new=5)
        out = run(outer, *mixed(70), logits_processor=[history])
        plain = tiny_host()
        expected = run(plain, *mixed(70), logits_processor=[routed(plain, crouter, folders)])
        assert torch.equal(out.sequences, expected.sequences)
        torch.testing.assert_close(torch.stack(out.logits), torch.stack(expected.logits), atol=2e-4, rtol=0)
        assert torch.equal(torch.stack(run(outer, *mixed(40), new=5).logits), torch.stack(before.logits))

    def test_chunks_and_windows_are_looked_at_once(self, folders, host, crouter):
        history = routed(host, crouter, folders)
        run(host, *mixed(70), new=40, logits_processor=[history], num_beams=3)
        report = history.report()
        first = [chunk for chunk in report.chunks if chunk.row == 0]
        assert history.policy.router.asked <= len(report.rows) * (2 * len(first) + 1)

    def test_a_second_turn_keeps_the_routes_of_its_chunks(self, folders, host, crouter):
        history = routed(host, crouter, folders)
        first = run(host, *mixed(70), new=10, logits_processor=[history])
        longer = torch.cat([first.sequences, mixed(20)[0]], dim=1)
        asked = history.policy.router.asked
        out = run(host, longer, new=10, logits_processor=[history], past_key_values=first.past_key_values)
        assert isinstance(out.past_key_values, CompressedCache) and history.policy.router.asked - asked <= 4
        assert_matches(out, (longer.shape[1],), host, history, folders)

    def test_a_cache_of_other_experts_is_refused(self, folders, host, crouter):
        out = run(host, *mixed(70), new=2, logits_processor=[routed(host, crouter, folders)])
        other = make(host, crouter, copy=False)
        with pytest.raises(InputError, match="experts"):
            run(host, out.sequences, new=2, logits_processor=[other], past_key_values=out.past_key_values)

    def test_a_short_cache_made_under_adapters_is_not_taken_for_a_plain_one(self, folders, host, crouter):
        out = run(host, *mixed(12), new=2, logits_processor=[routed(host, crouter, folders)])
        for processors in ([], [make(host, crouter, copy=False)]):
            with pytest.raises(InputError, match="past_key_values"):
                run(host, out.sequences, new=2, logits_processor=processors, past_key_values=out.past_key_values)

    def test_a_dropped_history_leaves_nothing_behind(self, host, crouter):
        make(host, crouter, experts=trained_set())
        with pytest.raises(InputError):
            make(host, crouter, experts=trained_set(), retrieve_scorer="/nowhere")
        gc.collect()
        assert not any(m._forward_hooks for model in (host, crouter) for m in model.modules())

    def test_scores_after_detaching(self, host, crouter):
        history = make(host, crouter, experts=trained_set())
        history.detach()
        with pytest.raises(InputError, match="detached"):
            history.score(mixed(70)[0], last=4)

    def test_report(self, folders, host, crouter):
        history = routed(host, crouter, folders)
        run(host, *mixed(70), logits_processor=[history])
        report = history.report()
        text = str(report)
        assert "window from 70 tokens on" in text and "expert" in text and "low (known)" in text
        assert report.to_dict()["routes"][0]["expert"] in ("low", "high", None)
        assert all(math.isfinite(chunk.margin) for chunk in report.chunks)


def test_the_window_of_a_host_with_other_tokens_is_judged_by_its_rest_too():
    host_tokenizer, crouter_tokenizer = byte_tokenizer(300), byte_tokenizer(400)
    reader = ContextPolicy(8, make_chunker(64, host_tokenizer, crouter_tokenizer), lambda ids: 0)
    short, long = (torch.tensor(host_tokenizer.encode(TEXT[:size])) for size in (40, 2000))
    assert reader._evidence(short).tolist() == crouter_tokenizer.encode(TEXT[:40])
    assert len(reader._evidence(long[-128:])) > 32
