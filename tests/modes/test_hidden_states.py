"""A compressor that works from the host's hidden states of a chunk read on its own, through the door alone."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from hf_crouter import CompressedHistory, Copy, InputError, Retrieve
from hf_crouter.modes import MODES, register_mode
from hf_crouter.types import Entries, Parts
from tests import reference
from tests.tiny import CHUNK, prompt, tiny_crouter, tiny_host

WINDOW, PREFIX = 8, 3
GREEDY = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
torch.set_num_threads(1)


@dataclass(frozen=True)
class MeanStates:
    """Means of the last hidden states, as many as asked for; where `ragged`, of the second half of chunks one more."""

    name: ClassVar[str] = "mean_states"
    gives: ClassVar[tuple[str, ...]] = ("entries",)
    needs_crouter: ClassVar[bool] = False

    slots: int = 2
    ragged: bool = False

    def bind(self, setting):
        return Parts(compressor=States(setting.host, self.slots, self.ragged))


class States:
    key, beside_raw, ids_decide, reads = "mean_states", True, True, False

    def __init__(self, host, slots, ragged):
        self.host, self.slots, self.ragged, self.most, self.asked = host, slots, ragged, slots + ragged, 0

    def encode(self, chunks):
        self.asked += len(chunks)
        return [Entries(embeddings=self.states(chunk.host_ids)) for chunk in chunks]

    def states(self, ids):
        hidden = self.host.base_model(input_ids=ids[None], use_cache=False).last_hidden_state[0]
        more = self.ragged and int(ids.sum()) % 2
        return torch.stack([part.mean(0) for part in hidden.chunk(self.slots + more)])


def make(host, *more, ragged=False):
    modes = [MeanStates(ragged=ragged), *more]
    return CompressedHistory(host, tiny_crouter(), modes=modes, window=WINDOW, keep_first=PREFIX)


def assert_exact(host, history, out, lengths, raw=()):
    states = history.policy.compressor.states
    alone = SimpleNamespace(encode=lambda ids: ids, config=SimpleNamespace(chunk_length=CHUNK))
    width = out.sequences.shape[1] - len(out.logits)
    for i, length in enumerate(lengths):
        for step, logits in enumerate(out.logits):
            row = out.sequences[i, width - length : width + step]
            expected = reference.next_logits(host, alone, lambda ids: states(ids[0])[None], row, PREFIX, WINDOW, raw)
            torch.testing.assert_close(logits[i], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2"])
def test_every_step_equals_a_forward_from_scratch(family, ragged):
    host = tiny_host(family)
    history = make(host, ragged=ragged)
    ids, mask = prompt(90, 40)
    out = host.generate(ids, attention_mask=mask, max_new_tokens=30, logits_processor=[history], **GREEDY)
    assert len({chunk.slots for chunk in history.report().chunks}) == 1 + ragged
    assert_exact(host, history, out, (90, 40))


def test_equal_chunks_are_made_once():
    host = tiny_host()
    history = make(host)
    ids = torch.cat([prompt(PREFIX)[0], *([prompt(CHUNK, seed=3)[0]] * 3), prompt(WINDOW, seed=4)[0]], 1)
    host.generate(ids.repeat(2, 1), max_new_tokens=1, num_beams=2, logits_processor=[history], do_sample=False)
    assert history.policy.compressor.asked == 1


def test_beside_retrieval_and_copying():
    host = tiny_host()
    history = make(host, Retrieve(chunks=1, every=1000), Copy(strength=0.5))
    out = host.generate(prompt(70)[0], max_new_tokens=1, logits_processor=[history], **GREEDY)
    assert_exact(host, history, out, (70,), raw=[record.chunk for record in history.report().retrievals])


def test_a_registered_mode_is_found_by_its_name(monkeypatch):
    monkeypatch.setattr("hf_crouter.modes.registry.MODES", dict(MODES))
    register_mode(MeanStates)
    history = CompressedHistory(tiny_host(), modes=["mean_states", "retrieve"])
    assert [type(mode) for mode in history.modes] == [MeanStates, Retrieve]
    with pytest.raises(InputError, match="MeanStates"):
        register_mode(dataclass(frozen=True)(type("Other", (), {"name": "mean_states", "bind": None})))
