"""Ten minutes of random calls of random hosts, with faults injected at random points.

After every call the host must be what it was, memory must be back where it started, and outputs must equal a forward
from scratch. `HF_CROUTER_SOAK_SECONDS` changes how long, `HF_CROUTER_SOAK_SEED` which calls.
"""

import gc
import os
import random
import time
import weakref

import pytest
import torch
from transformers import DynamicCache, StaticCache, StoppingCriteria, StoppingCriteriaList
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_crouter.errors import InputError
from hf_crouter.generation.call import CALLS
from hf_crouter.history import attach
from hf_crouter.modes import Copy, Retrieve, SoftPrompts

from .. import reference
from ..hosts.family_checks import LOOSE
from ..hosts.tiny_families import tiny_family
from ..tiny import prompt, tiny_crouter, tiny_projector

pytestmark = [pytest.mark.soak, pytest.mark.slow]
torch.set_num_threads(1)

SECONDS = float(os.environ.get("HF_CROUTER_SOAK_SECONDS", 600))
SEED = int(os.environ.get("HF_CROUTER_SOAK_SEED", 0))
FAMILIES = ("llama", "qwen2", "gemma3_text", "phi3", "gpt_neox", "gpt2", "bloom", "lfm2", "deepseek_v3", "mistral",
            "gpt_oss", "qwen3_5_text", "granitemoehybrid", "falcon")  # fmt: skip
SLIDING = ("mistral", "phi3")


# what transformers' own generate leaves on a host
OF_TRANSFORMERS = {"_previous_max_cache_length", "_compiled_call", "_last_compile_config"}


class Injected(Exception):
    pass


FAULTS = (Injected, torch.OutOfMemoryError, KeyboardInterrupt)


class Stops(StoppingCriteria):
    """Ends rows at random lengths, or raises."""

    def __init__(self, lengths, fault=None):
        self.lengths, self.fault, self.calls = torch.tensor(lengths), fault, 0

    def __call__(self, input_ids, scores, **kwargs):
        self.calls += 1
        if self.fault is not None and self.calls == 3:
            raise self.fault("injected")
        return (input_ids.shape[1] >= self.lengths)[: len(input_ids)]


class Faulty:
    """A processor that raises at its n-th call."""

    def __init__(self, at, fault):
        self.left, self.fault = at, fault

    def __call__(self, input_ids, scores):
        self.left -= 1
        if not self.left:
            raise self.fault("injected")
        return scores


def fingerprint(host):
    """All that a call must leave as it was."""
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in host.modules())
    weights = sum(float(p.detach().double().sum()) for p in host.parameters())
    names = frozenset(vars(host)) - OF_TRANSFORMERS
    return (type(host), names, hooks, weights, "forward" in vars(host), host.generation_config.to_dict(),
            dict(ALL_ATTENTION_FUNCTIONS._local_mapping), host.training)  # fmt: skip


def live_bytes():
    gc.collect()
    seen = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and not isinstance(thing, torch.nn.Parameter):
            storage = thing.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())


class Soak:
    def __init__(self, seed):
        self.random = random.Random(seed)
        self.crouter = tiny_crouter()
        self.counts = dict.fromkeys(["calls", "faults", "refused", "compared", "plain", "histories"], 0)
        self.hosts, self.refs = {}, []

    def host(self, family):
        if family not in self.hosts:
            changes = {"sliding_window": 12} if family in SLIDING else {}
            host = tiny_family(family, **changes)
            host.generate(prompt(5)[0], max_new_tokens=2)  # what transformers itself keeps from a first call
            self.hosts[family] = host, tiny_projector(host, self.crouter)
        return self.hosts[family]

    def modes(self, projector):
        chosen = []
        if self.random.random() < 0.7:
            chosen.append(SoftPrompts(projector))
        if self.random.random() < 0.4:
            chosen.append(Retrieve(self.random.choice([1, 2]), every=self.random.choice([8, 128])))
        if self.random.random() < 0.4:
            chosen.append(Copy())
        return chosen

    def options(self, family, rows, width):
        draw = self.random
        new = draw.choice([1, 5, 20, 40])
        options = {"max_new_tokens": new, "do_sample": False}
        kind = draw.choice(["greedy", "greedy", "greedy", "sample", "beams", "lookup", "static", "cache", "several"])
        if kind == "sample":
            options["do_sample"] = True
        elif kind == "beams":
            options |= {"num_beams": draw.choice([2, 3])}
        elif kind == "lookup" and rows == 1:
            options |= {"prompt_lookup_num_tokens": 3}
        elif kind == "static":
            options |= {"cache_implementation": "static"}
        elif kind == "cache":
            config = self.host(family)[0].config
            static = StaticCache(config=config, max_cache_len=width + new + 64)
            options |= {"past_key_values": draw.choice([DynamicCache(config=config), static])}
        elif kind == "several":
            options |= {"num_return_sequences": 2, "do_sample": True}
        if draw.random() < 0.25:
            ends = [width + draw.randint(1, new) for _ in range(rows * options.get("num_return_sequences", 1))]
            if "num_beams" not in options and "prompt_lookup_num_tokens" not in options:
                options["stopping_criteria"] = StoppingCriteriaList([Stops(ends)])
                options["pad_token_id"] = 0
                options["eos_token_id"] = 96
        return options

    def fault(self, host, options):
        """Something that goes wrong at a random point; gives what takes it away again."""
        draw = self.random
        kind, error = draw.choice(["forward", "processor", "criteria", "encode"]), draw.choice(FAULTS)
        if kind == "processor":
            options.setdefault("logits_processor", []).insert(0, Faulty(draw.randint(1, 4), error))
            return lambda: None
        if kind == "criteria":
            options["stopping_criteria"] = StoppingCriteriaList([Stops([10**6] * 64, error)])
            options["eos_token_id"], options["pad_token_id"] = 96, 0
            return lambda: None
        modules = list(self.crouter.modules()) if kind == "encode" else list(host.modules())
        module, left = draw.choice(modules), [draw.randint(1, 12)]

        def fail(module, args):
            left[0] -= 1
            if not left[0]:
                raise error("injected")

        return module.register_forward_pre_hook(fail).remove

    def one_call(self):
        draw = self.random
        family = draw.choice(FAMILIES)
        host, projector = self.host(family)
        before = fingerprint(host)
        self.counted_call(family, host, projector)
        after = fingerprint(host)
        assert after == before, (family, [(a, b) for a, b in zip(after, before, strict=True) if a != b])
        assert not CALLS.get()

    def check_memory(self, start):
        """Nothing outlives the calls since then: no tensors, no histories."""
        more = live_bytes() - start
        assert more <= 4096, f"{more} bytes more than before"
        assert not [ref for ref in self.refs if ref() is not None], "a history outlives its block"
        self.refs.clear()

    def counted_call(self, family, host, projector):
        draw = self.random
        rows = draw.choice([1, 1, 2, 3])
        lengths = [draw.choice([5, 20, 45, 90, 140]) + draw.randint(0, 9) for _ in range(rows)]
        ids, mask = prompt(*lengths, seed=draw.randint(0, 10**6))
        window, prefix = draw.choice([4, 8, 30]), draw.choice([0, 3])
        history_options = {"modes": self.modes(projector), "window": window, "keep_first": prefix}
        options = self.options(family, rows, ids.shape[1])
        faulty = draw.random() < 0.3
        always = draw.random() < 0.3
        self.counts["calls"] += 1
        with attach(host, self.crouter, **history_options) as history:
            self.counts["histories"] += 1
            self.refs.append(weakref.ref(history))
            if not always:
                options.setdefault("logits_processor", []).append(history)
            undo = self.fault(host, options) if faulty else lambda: None
            torch.manual_seed(draw.randint(0, 10**6))
            try:
                out = host.generate(
                    ids, attention_mask=mask, return_dict_in_generate=True, output_logits=True, **options
                )
            except FAULTS:
                assert faulty
                self.counts["faults"] += 1
                out = None
            except (InputError, ValueError) as error:
                allowed = "static cache" in str(error) or "stateful" in str(error) or "assisted" in str(error)
                assert allowed, (family, options, error)
                self.counts["refused"] += 1
                out = None
            finally:
                undo()
            if out is not None and "num_beams" not in options:
                self.compare(family, host, history, projector, out, lengths, window, prefix, options)
            del out

    def compare(self, family, host, history, projector, out, lengths, window, prefix, options):
        """The last step's logits of a row that goes on to the end, against a forward from scratch."""
        report = history.report(measure=False)
        width, several = max(lengths), options.get("num_return_sequences", 1)
        number = self.random.randrange(len(out.sequences))
        length = lengths[number // several]
        steps = len(out.logits)
        if not steps:
            return
        sequence = out.sequences[number, width - length :]
        stops = [rule.lengths[number] for rule in options.get("stopping_criteria", ()) if isinstance(rule, Stops)]
        end = min([*stops, 10**6])
        ids = sequence[length:-1]
        if end < out.sequences.shape[1] or (stops and bool((ids == options["eos_token_id"]).any())):
            return  # it ended before the others: nobody reads what it gives after that
        last = [record for record in report.retrievals if record.row == number]
        raw = sorted(record.chunk for record in last if record.length == last[-1].length)
        soft = any(isinstance(mode, SoftPrompts) for mode in history.modes)
        expected = reference.next_logits(
            host, self.crouter, projector if soft else None, sequence[:-1], prefix, window, raw
        )
        found = out.logits[steps - 1][number]
        tolerance = LOOSE.get(host.config.model_type, 5e-4)
        torch.testing.assert_close(
            found, expected, atol=tolerance, rtol=0, msg=lambda text: f"{family} {options} {text}"
        )
        self.counts["compared"] += 1
        self.counts["plain"] += not report.chunks


@pytest.mark.timeout(SECONDS + 300)
def test_soak():
    soak, end = Soak(SEED), time.monotonic() + SECONDS
    for family in FAMILIES:  # all that is made once
        soak.host(family)
    start = live_bytes()
    while time.monotonic() < end:
        for _ in range(20):
            soak.one_call()
        soak.check_memory(start)
    print(f"soak: {soak.counts}")
    assert soak.counts["compared"] > soak.counts["calls"] // 4
