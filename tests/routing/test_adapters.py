"""Stacked adapters against PEFT's own, one pass each."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from hf_crouter.errors import InputError, MismatchError
from hf_crouter.routing.adapters import AdapterStack, Lora
from hf_crouter.types import BASE

from ..tiny import VOCAB, tiny_crouter, tiny_host

TARGETS = ["q_proj", "v_proj", "down_proj"]


def save_adapter(folder, seed, *, rank=4, targets=TARGETS, make=tiny_host, **options):
    """A PEFT adapter with weights that do something."""
    model = get_peft_model(make(), LoraConfig(r=rank, lora_alpha=3 * rank, target_modules=targets, **options))
    torch.manual_seed(seed)
    for name, value in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(value, std=0.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("adapters")
    return [
        save_adapter(base / "a", 1),
        save_adapter(base / "b", 2, rank=2, targets=["q_proj", "up_proj"], use_rslora=True),
    ]


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def by_peft(folder, ids):
    return logits(PeftModel.from_pretrained(tiny_host(), str(folder)).eval(), ids)


def ids_of(rows=3, tokens=10):
    return torch.randint(3, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(0))


def test_rows_differ_and_each_is_what_peft_computes(folders):
    host, ids = tiny_host(), ids_of()
    stack = AdapterStack(host, {name: Lora.load(folder) for name, folder in zip("ab", folders, strict=True)})
    with stack.using([0, BASE, 1]):
        found = logits(host, ids)
    expected = torch.cat([by_peft(folders[0], ids[:1]), logits(tiny_host(), ids[1:2]), by_peft(folders[1], ids[2:])])
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found[0], logits(tiny_host(), ids[:1])[0], atol=1e-2)


@pytest.mark.parametrize("number", [0, 1])
def test_one_adapter_for_all(folders, number):
    host, ids = tiny_host(), ids_of()
    stack = AdapterStack(host, {name: Lora.load(folder) for name, folder in zip("ab", folders, strict=True)})
    with stack.using([number] * 3):
        assert torch.allclose(logits(host, ids), by_peft(folders[number], ids), atol=1e-5)


def test_positions_differ(folders):
    """A causal model's first positions do not see the later ones' adapter, which reads them as they were made."""
    host, ids = tiny_host(), ids_of(1)
    stack = AdapterStack(host, {"a": Lora.load(folders[0])})
    numbers = torch.tensor([[BASE] * 4 + [0] * 6])
    with stack.using(numbers):
        found = logits(host, ids)
    assert torch.allclose(found[:, :4], logits(tiny_host(), ids)[:, :4], atol=1e-5)
    peft = PeftModel.from_pretrained(tiny_host(), str(folders[0])).eval()
    with torch.no_grad():
        with peft.disable_adapter():
            cache = peft(ids[:, :4], use_cache=True).past_key_values
        rest = peft(ids[:, 4:], past_key_values=cache).logits
    assert torch.allclose(found[:, 4:], rest, atol=1e-5)


def test_outside_a_block_the_model_is_bit_for_bit_plain(folders):
    host, ids = tiny_host(), ids_of()
    before = logits(host, ids)
    stack = AdapterStack(host, {"a": Lora.load(folders[0])})
    with stack.using([0, 0, 0]):
        logits(host, ids)
    assert torch.equal(logits(host, ids), before)
    stack.remove()
    with stack.using([0, 0, 0]):
        assert torch.equal(logits(host, ids), before)


def test_a_compressor_takes_adapters_as_well(tmp_path):
    crouter = tiny_crouter()
    plain = crouter(ids_of(2, 8)).reconstruction_nll
    stack = AdapterStack(crouter, {"a": Lora.load(save_adapter(tmp_path, 3, make=tiny_crouter))})
    with torch.no_grad(), stack.using([BASE, 0]):
        found = crouter(ids_of(2, 8)).reconstruction_nll
    assert torch.allclose(found[0], plain[0], atol=1e-5) and not torch.allclose(found[1], plain[1], atol=1e-3)


@pytest.mark.parametrize("native", [True, False])
def test_adapters_that_peft_holds(folders, native):
    """Active or not, they rest while the stack serves, and serve again afterwards."""
    host, ids = tiny_host(), ids_of()
    if native:
        host.load_adapter(str(folders[0]), adapter_name="a")
    else:
        host = PeftModel.from_pretrained(host, str(folders[0]), adapter_name="a").base_model.model
    active = logits(host, ids)
    assert torch.allclose(active, by_peft(folders[0], ids), atol=1e-5)
    found, loaded = Lora.from_model(host, "a"), Lora.load(folders[0])
    assert Lora.from_model(host, "b") is None
    assert found.down.keys() == loaded.down.keys()
    assert all(torch.allclose(found.up[path], loaded.up[path]) for path in loaded.up)
    stack = AdapterStack(host, {"a": found})
    with stack.using([0, BASE, 0]):
        mixed = logits(host, ids)
        with stack.using([BASE] * 3):
            assert torch.allclose(logits(host, ids), logits(tiny_host(), ids), atol=1e-5)
        assert torch.equal(logits(host, ids), mixed)
    assert torch.allclose(mixed[[0, 2]], by_peft(folders[0], ids[[0, 2]]), atol=1e-5)
    assert torch.allclose(mixed[1], logits(tiny_host(), ids)[1], atol=1e-5)
    assert torch.equal(logits(host, ids), active)


def test_one_graph_for_all_switches(folders):
    host, ids = tiny_host(), ids_of()
    stack = AdapterStack(host, {name: Lora.load(folder) for name, folder in zip("ab", folders, strict=True)})
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(host, backend=backend, fullgraph=True)
    for numbers in ([0, 1, BASE], [1, 1, 1], [0, 0, BASE], [BASE] * 3):
        with stack.using(numbers):
            expected = logits(host, ids)
            assert torch.allclose(logits(compiled, ids), expected, atol=1e-5)
    assert len(graphs) == 1


class TestRefused:
    def test_an_adapter_of_another_model(self, folders):
        lora = Lora.load(folders[0])
        path = next(iter(lora.down))
        lora.down[path] = lora.down[path][:, :-1]
        with pytest.raises(MismatchError, match="another model"):
            AdapterStack(tiny_host(), {"a": lora})
        with pytest.raises(MismatchError, match="no such layer"):
            AdapterStack(tiny_crouter(), {"a": Lora.load(folders[1])})

    def test_files(self, folders, tmp_path):
        with pytest.raises(InputError, match="no adapter_config.json"):
            Lora.load(tmp_path)
        save_adapter(tmp_path / "dora", 4, use_dora=True)
        with pytest.raises(InputError, match="plain LoRA"):
            Lora.load(tmp_path / "dora")
        folder = save_adapter(tmp_path / "cut", 5)
        path = folder / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(InputError, match="damaged"):
            Lora.load(folder)
        folder = save_adapter(tmp_path / "config", 6)
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
        with pytest.raises(InputError, match="damaged|expected"):
            Lora.load(folder)
