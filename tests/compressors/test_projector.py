import json

import pytest
import torch

from hf_crouter.compressors.projector import CONFIG, WEIGHTS, Projector, find_projector
from hf_crouter.errors import InputError, MismatchError
from hf_crouter.history import CompressedHistory
from hf_crouter.modes import SoftPrompts
from tests.tiny import LATENTS, tiny_crouter, tiny_host, tiny_projector


@pytest.fixture
def host():
    return tiny_host()


@pytest.fixture
def crouter(tmp_path):
    tiny_crouter().save_pretrained(tmp_path / "crouter")
    return type(tiny_crouter()).from_pretrained(tmp_path / "crouter").eval()


@pytest.fixture
def projector(host, crouter):
    return tiny_projector(host, crouter)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "crouter" / "projectors" / "tiny"


class TestProjector:
    def test_soft_prompts_have_the_size_of_the_hosts_embeddings(self, host, projector):
        prompts = projector(torch.randn(2, 3, LATENTS, 12))
        size = host.get_input_embeddings().weight.detach().pow(2).mean().sqrt()
        assert prompts.shape == (2, 3, LATENTS, 32)
        torch.testing.assert_close(prompts.pow(2).mean(-1).sqrt(), size.expand(2, 3, LATENTS), atol=1e-3, rtol=0)

    def test_gemmas_scaled_embeddings(self, crouter):
        host = tiny_host("gemma2")
        embedded = host.get_input_embeddings()(torch.arange(97)).detach().pow(2).mean().sqrt()
        assert tiny_projector(host, crouter).scale.item() == pytest.approx(embedded.item(), rel=1e-4)

    def test_the_latents_order_counts(self, projector):
        latents = torch.randn(1, 1, 1, 12).expand(1, 1, LATENTS, 12)
        prompts = projector(latents)
        assert (prompts[0, 0, 0] - prompts[0, 0, 1]).abs().max() > 1e-3

    def test_round_trip(self, projector, folder):
        projector.save(folder, training={"steps": 3})
        loaded = Projector.load(folder)
        latents = torch.randn(2, LATENTS, 12)
        rounded = projector.to(torch.bfloat16).float()
        assert torch.equal(loaded(latents), rounded(latents))
        assert loaded.config.training == {"steps": 3}
        assert sorted(p.name for p in folder.iterdir()) == [CONFIG, WEIGHTS]
        loaded.save(folder)
        assert torch.equal(Projector.load(folder)(latents), loaded(latents))


class TestDamage:
    @pytest.mark.parametrize(
        "change", [lambda d: d[:-7], lambda d: d[:-9] + bytes([d[-9] ^ 1]) + d[-8:], lambda d: b""]
    )
    def test_weights(self, projector, folder, change):
        projector.save(folder)
        data = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(change(data))
        with pytest.raises(InputError, match="truncated or altered") as error:
            Projector.load(folder)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"sha256": ""}'])
    def test_description(self, projector, folder, text):
        projector.save(folder)
        (folder / CONFIG).write_text(text)
        with pytest.raises(InputError, match="not a projector"):
            Projector.load(folder)

    def test_shapes_that_are_not_the_descriptions(self, projector, folder):
        projector.save(folder)
        record = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**record, "hidden_size": 7}))
        with pytest.raises(InputError, match="weights of its projector.json") as error:
            Projector.load(folder)
        assert "\n" not in str(error.value)

    def test_missing(self, folder):
        with pytest.raises(InputError, match="cannot be read"):
            Projector.load(folder)

    def test_nothing_half_written_where_writing_fails(self, projector, folder, monkeypatch):
        def full(self, data):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("pathlib.Path.write_bytes", full)
        with pytest.raises(InputError, match="full"):
            projector.save(folder)
        assert list(folder.iterdir()) == []


class TestFind:
    def test_the_one_that_fits(self, host, crouter, projector, folder):
        tiny_projector(tiny_host(seed=5), crouter).save(folder.with_name("another"))
        projector.save(folder)
        assert find_projector(crouter, host).config == projector.config
        CompressedHistory(host, crouter, modes=[SoftPrompts()]).detach()

    def test_by_name(self, host, crouter, projector, folder):
        projector.save(folder)
        assert find_projector(crouter, host, "tiny").config == projector.config
        with pytest.raises(MismatchError, match="got none"):
            find_projector(crouter, host, "other")

    def test_none_names_the_command(self, host, crouter):
        command = "hf-crouter align --host HOST --crouter .*crouter --corpus .* --output .* --seconds .*$"
        with pytest.raises(MismatchError, match=command) as error:
            find_projector(crouter, host)
        assert "\n" not in str(error.value)

    def test_another_host_or_crouter(self, host, crouter, projector, folder):
        projector.save(folder)
        other = tiny_host(seed=5)
        with pytest.raises(MismatchError) as error:
            find_projector(crouter, other)
        assert projector.config.host_fingerprint in str(error.value) and "\n" not in str(error.value)
        for pair, word in (((other, crouter), "host"), ((host, tiny_crouter(seed=9)), "crouter")):
            for given in (projector, folder):
                with pytest.raises(MismatchError, match=f"expected the {word}"):
                    CompressedHistory(*pair, modes=[SoftPrompts(projector=given)])
