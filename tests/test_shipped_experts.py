"""The experts that come with the package: what they are, and where real texts go."""

import graphlib
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch

from hf_crouter.cli.main import main
from hf_crouter.crouter.fingerprint import crouter_fingerprint
from hf_crouter.crouter.loading import SHIPPED, load_crouter
from hf_crouter.errors import InputError, MismatchError
from hf_crouter.routing.experts import SHIPPED_EXPERTS, ExpertSet, Texts, expert_folder
from hf_crouter.routing.router import Router

from .tiny import tiny_crouter

ROOT = Path(__file__).parent.parent


def test_they_are_small_whole_and_hold_no_text():
    assert expert_folder() == expert_folder(SHIPPED_EXPERTS.name) == SHIPPED_EXPERTS
    assert expert_folder("mine") == Path("mine")
    experts = ExpertSet.load(SHIPPED_EXPERTS)
    assert experts.names == ("python", "wiki_en")
    experts.check(crouter_fingerprint(load_crouter()[0], decoder=True))
    for expert in experts:
        assert expert.profile is not None and set(expert.profile.means) == {64, 128, 256, 512}
        assert Texts.load(SHIPPED_EXPERTS / expert.name) is None
        loss = expert.config.training["held_out"]["host_loss"]
        assert loss["adapter"] < loss["base"]
        assert expert.config.host_architecture.startswith("model_type=llama embeddings=49152x576 ")
    size = sum(path.stat().st_size for path in SHIPPED.parent.rglob("*") if path.is_file())
    assert size <= 40 * 2**20
    with pytest.raises(MismatchError, match="expert python: expected the crouter"):
        experts.check(crouter_fingerprint(tiny_crouter(), decoder=True))


@pytest.mark.slow
def test_code_and_prose_go_to_their_experts():
    crouter, tokenizer = load_crouter()
    router = Router(crouter, ExpertSet.load(expert_folder()))
    code = Path(graphlib.__file__).read_text(encoding="utf-8")
    prose = (ROOT / "examples" / "pendulum_clock.txt").read_text(encoding="utf-8")
    manual = topics["exceptions"] + topics["objects"]
    texts = [torch.tensor(tokenizer(text).input_ids[:512]) for text in (code, prose, manual[2500:])]
    routes = [router.decide(row, 512) for row in router.reconstruction_nlls(texts)]
    assert [route.expert for route in routes] == ["python", "wiki_en", None]
    assert routes[2].status == "unknown"


def test_the_list_names_them(capsys):
    assert main(["expert", "list", "--experts", SHIPPED_EXPERTS.name]) == 0
    assert "wiki_en" in capsys.readouterr().out


def test_an_installation_without_them(monkeypatch, tmp_path):
    monkeypatch.setattr("hf_crouter.routing.experts.SHIPPED_EXPERTS", tmp_path / "experts")
    with pytest.raises(InputError, match="missing from this installation"):
        expert_folder()
