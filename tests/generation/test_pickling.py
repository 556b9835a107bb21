"""A host that is copied, pickled or saved while a history reads it is the plain host; nothing stays behind."""

import copy
import gc
import io
import pickle
import threading

import pytest
import torch
from transformers import LlamaForCausalLM

from ..histories import make, run
from ..tiny import prompt, tiny_crouter, tiny_host

torch.set_num_threads(1)

WAYS = {
    "pickle": lambda host: pickle.loads(pickle.dumps(host)),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "torch.save": lambda host: _through_torch(host),
}


def _through_torch(host):
    file = io.BytesIO()
    torch.save(host, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def is_plain(host):
    return type(host) is LlamaForCausalLM and not [key for key in vars(host) if "crouter" in key]


@pytest.mark.parametrize("way", WAYS)
class TestCopies:
    def test_while_a_history_lives(self, way):
        host = tiny_host()
        history = make(host, tiny_crouter())
        other = WAYS[way](host)
        assert is_plain(other) and not is_plain(host)
        expected = run(tiny_host(), *prompt(70), new=5).sequences
        assert torch.equal(run(other, *prompt(70), new=5).sequences, expected)
        assert run(host, *prompt(70), new=5, logits_processor=[history]) and history.report().chunks

    def test_after_it_was_dropped(self, way):
        host = tiny_host()
        make(host, tiny_crouter())
        gc.collect()
        assert is_plain(host) and is_plain(WAYS[way](host))


def test_a_saved_host_is_the_plain_one(tmp_path):
    host = tiny_host()
    history = make(host, tiny_crouter())
    host.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.architectures == ["LlamaForCausalLM"] and history.attached
    names = {name: weight for name, weight in loaded.named_parameters()}
    assert all(torch.equal(weight, names[name]) for name, weight in host.named_parameters())


def test_histories_dropped_in_any_order_and_thread():
    host, histories = tiny_host(), []
    for _ in range(6):
        histories.append(make(host, tiny_crouter()))
    histories[3].detach()
    threads = [threading.Thread(target=histories.pop) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gc.collect()
    assert not is_plain(host)
    histories[0].detach()
    histories[0].detach()
    assert not is_plain(host)
    histories.clear()
    gc.collect()
    assert is_plain(host)


def test_a_host_outlives_its_histories():
    host = tiny_host()
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in host.modules())
    for _ in range(3):
        history = make(host, tiny_crouter())
        run(host, *prompt(70), new=3, logits_processor=[history])
        del history
    gc.collect()
    assert is_plain(host)
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in host.modules())
