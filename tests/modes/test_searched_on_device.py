"""The whole path of an accelerator's search, here on the CPU, against the sorted index that a CPU uses."""

import pytest
import torch

from hf_crouter.modes import copy
from hf_crouter.ngram.device_index import DeviceSearch

from ..tiny import tiny_crouter, tiny_host
from .copying import make, repetitive, run

CALLS = {
    "greedy": {},
    "retrieving": {"retrieve": 2, "retrieve_every": 5},
    "generated": {"copy_generated": True},
    "rebuilt": {"copy_source": "rebuilt"},
    "excluded": {"copy_exclude": ((10, 30),)},
    "sampled": {},
    "beams": {},
    "several": {},
    "drafts": {},
}
OPTIONS = {
    "sampled": {"do_sample": True, "top_k": 5},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "several": {"do_sample": True, "num_return_sequences": 2},
    "drafts": {"prompt_lookup_num_tokens": 4},
}


@pytest.fixture(scope="module")
def host():
    return tiny_host()


@pytest.fixture(scope="module")
def crouter():
    return tiny_crouter()


@pytest.mark.parametrize("name", CALLS)
def test_it_writes_and_tells_the_same(host, crouter, name, monkeypatch):
    ids, mask = repetitive(120) if name == "drafts" else repetitive(120, 77)
    found = []
    for there in (False, True):
        monkeypatch.setattr(copy, "searched_there", lambda device, there=there: there)
        history = make(host, crouter, **CALLS[name])
        torch.manual_seed(0)
        out = run(host, ids, mask, logits_processor=[history], **OPTIONS.get(name, {}))
        found.append((out, history.report(measure=False)))
    (one, told), (two, told_there) = found
    assert torch.equal(one.sequences, two.sequences)
    for a, b in zip(one.scores, two.scores, strict=True):
        torch.testing.assert_close(a.log_softmax(-1), b.log_softmax(-1), atol=1e-4, rtol=1e-4)
    assert told.copies == told_there.copies and (told.copied or name in ("beams", "rebuilt"))


def test_a_step_searches_once_and_goes_on_from_the_one_before(host, crouter, monkeypatch):
    searches, anew = [], []
    search, write = DeviceSearch.__call__, copy.DeviceSearch._follow
    monkeypatch.setattr(copy, "searched_there", lambda device: True)
    monkeypatch.setattr(DeviceSearch, "__call__", lambda self, *args: searches.append(1) or search(self, *args))

    def follow(self, archives, rows, input_ids):
        before = self._archives
        write(self, archives, rows, input_ids)
        anew.append(sum(a is not b for a, b in zip(before, archives, strict=False)) if before else len(rows))

    monkeypatch.setattr(DeviceSearch, "_follow", follow)
    history = make(host, crouter)
    out = run(host, *repetitive(120, 77), logits_processor=[history])
    assert len(searches) == len(out.scores)
    compressed = sum(len(row.chunks) for row in out.past_key_values.rows)
    assert anew[0] == 2 and sum(anew[1:]) <= compressed and anew.count(0) > len(anew) // 2
