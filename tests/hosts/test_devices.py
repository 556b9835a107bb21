import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook, disk_offload, dispatch_model
from accelerate.hooks import ModelHook, SequentialHook, add_hook_to_module
from accelerate.utils import offload_state_dict

from hf_crouter.errors import InputError
from hf_crouter.hosts.devices import input_device
from hf_crouter.hosts.fingerprint import host_fingerprint

from ..histories import make, run
from ..tiny import prompt, tiny_crouter, tiny_host, tiny_projector

torch.set_num_threads(1)


def dispatched(host, folder):
    names = {name: "cpu" for name in ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")}
    names |= {"model.layers.0": "disk", "model.layers.1": "cpu"}
    offload_state_dict(str(folder), {k: v for k, v in host.state_dict().items() if k.startswith("model.layers.0")})
    return dispatch_model(host, names, main_device="cpu", offload_dir=str(folder), force_hooks=True)


def hooked_twice(host, folder):
    host = cpu_offload(host, torch.device("cpu"))
    for module in (host.get_input_embeddings(), host.model.layers[0].self_attn.q_proj, host.model.norm):
        add_hook_to_module(module, ModelHook(), append=True)
    return host


def loaded(host, folder):
    host.save_pretrained(folder / "host")
    places = {"model.embed_tokens": "disk", "model.layers": "cpu", "model.norm": "disk", "model.rotary_emb": "cpu"}
    return type(host).from_pretrained(
        folder / "host", device_map={**places, "lm_head": "disk"}, offload_folder=folder / "offload"
    )


WAYS = {
    "memory": lambda host, folder: host,
    "cpu_offload": lambda host, folder: cpu_offload(host, torch.device("cpu")),
    "disk_offload": lambda host, folder: disk_offload(host, str(folder), torch.device("cpu")),
    "device_map": dispatched,
    "device_map of from_pretrained": loaded,
    "by layer": lambda host, folder: cpu_offload(
        host, torch.device("cpu"), preload_module_classes=["LlamaDecoderLayer"]
    ),
    "hooked twice": hooked_twice,
}


@pytest.mark.parametrize("way", WAYS)
class TestOffloadedHosts:
    def test_fingerprint_and_device(self, way, tmp_path):
        expected = host_fingerprint(tiny_host())
        host = WAYS[way](tiny_host(), tmp_path)
        assert host_fingerprint(host) == expected and input_device(host) == torch.device("cpu")

    @pytest.mark.parametrize("soft", [True, False])
    def test_reads_as_in_memory(self, way, tmp_path, soft):
        plain = tiny_host()
        projector = tiny_projector(plain, tiny_crouter())
        options = {"soft_prompts": projector} if soft else {"soft_prompts": False, "retrieve": 1}
        ids, mask = prompt(70, 40)
        expected = run(plain, ids, mask, new=12, logits_processor=[make(plain, tiny_crouter(), **options)])
        host = WAYS[way](tiny_host(), tmp_path)
        history = make(host, tiny_crouter(), **options)
        out = run(host, ids, mask, new=12, logits_processor=[history])
        assert torch.equal(out.sequences, expected.sequences) and history.report().chunks
        torch.testing.assert_close(history.score(out.sequences, 10), make(plain, tiny_crouter(), **options).score(
            out.sequences, 10), atol=1e-5, rtol=0)  # fmt: skip


@pytest.mark.parametrize("classes", [None, ["LlamaModel"], ["LlamaForCausalLM"]])
@pytest.mark.parametrize("twice", [False, True])
def test_the_device_is_where_a_hook_runs_the_embedding(classes, twice):
    # a device that is not what it would fall back to
    host = cpu_offload(tiny_host(), torch.device("meta"), preload_module_classes=classes)
    for module in host.modules() if twice else ():
        if hasattr(module, "_hf_hook"):
            module._hf_hook = SequentialHook(ModelHook(), module._hf_hook)
    assert input_device(host) == torch.device("meta")
    assert host_fingerprint(host) == host_fingerprint(tiny_host())


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "norm"]},
    ],
)
def test_adapters_of_the_embedding(options):
    peft = pytest.importorskip("peft")
    host = peft.get_peft_model(tiny_host(), peft.LoraConfig(init_lora_weights=False, **options))
    for name, weight in host.named_parameters():
        weight.data += ".modules_to_save." in name
    assert host_fingerprint(host) == host_fingerprint(tiny_host())
    cpu_offload(host, torch.device("meta"))
    assert host_fingerprint(host) == host_fingerprint(tiny_host())
    assert input_device(host.get_base_model()) == torch.device("meta")


def test_the_device_of_a_host_that_a_call_moves_is_where_it_stands():
    host, _ = cpu_offload_with_hook(tiny_host(), torch.device("meta"))
    assert input_device(host) == torch.device("cpu")


def test_a_hooks_device_by_number():
    host = cpu_offload(tiny_host(), torch.device("cpu"))
    host.get_input_embeddings()._hf_hook.execution_device = 1
    assert input_device(host) == torch.device("cuda", 1)


def test_a_fingerprint_reads_a_weight_at_a_time(monkeypatch):
    host = cpu_offload(tiny_host(), torch.device("cpu"))
    monkeypatch.setattr("accelerate.hooks.AlignDevicesHook.pre_forward", lambda *args: pytest.fail("weights moved"))
    assert host_fingerprint(host) == host_fingerprint(tiny_host())
    assert {weight.device.type for weight in host.parameters()} == {"meta"}


def test_a_host_without_weights_is_told():
    with pytest.raises(InputError, match="expected weights, got none"):
        host_fingerprint(tiny_host().to("meta"))
