import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
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


WAYS = {
    "memory": lambda host, folder: host,
    "cpu_offload": lambda host, folder: cpu_offload(host, torch.device("cpu")),
    "disk_offload": lambda host, folder: disk_offload(host, str(folder), torch.device("cpu")),
    "device_map": dispatched,
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


def test_a_host_without_weights_is_told():
    with pytest.raises(InputError, match="expected weights, got none"):
        host_fingerprint(tiny_host().to("meta"))
