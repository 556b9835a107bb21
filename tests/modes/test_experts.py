"""Experts from disk in generation."""

import dataclasses

import pytest
import torch

from hf_crouter.errors import InputError, MismatchError
from hf_crouter.routing.experts import ExpertSet

from ..histories import PREFIX, make, run
from ..routing.trained_experts import DOMAINS, FOREIGN, texts, trained_set
from ..tiny import make_history, tiny_crouter, tiny_host

torch.set_num_threads(1)


@pytest.fixture
def host():
    return tiny_host()


@pytest.fixture
def crouter():
    return tiny_crouter()


class TestExperts:
    """With an expert set from disk."""

    def ids(self):
        kinds = (DOMAINS["low"], DOMAINS["low"], DOMAINS["high"], FOREIGN, DOMAINS["high"])
        return torch.cat([texts(0, 1, PREFIX)[0] + 3, *(texts(first, 1, seed=5)[0] for first in kinds)])[None]

    def test_chunks_and_window_find_their_expert(self, host, crouter):
        history = make(host, crouter, copy=False, experts=trained_set())
        run(host, self.ids(), new=2, logits_processor=[history])
        report = history.report()
        assert [chunk.expert for chunk in report.chunks] == ["low", "low", "high", None]
        assert report.chunks[-1].route_status == "unknown"
        assert report.routes[0].expert == "high" and report.routes[0].length == self.ids().shape[1]
        history.detach()
        assert not any(m._forward_hooks for model in (host, crouter) for m in model.modules())

    def test_the_loaded_set_serves_as_well(self, host, crouter):
        by_folder = make(host, crouter, experts=trained_set())
        first = run(host, self.ids(), new=4, logits_processor=[by_folder])
        by_folder.detach()
        loaded = make(host, crouter, experts=ExpertSet.load(trained_set()))
        assert torch.equal(run(host, self.ids(), new=4, logits_processor=[loaded]).sequences, first.sequences)

    def test_slots_belong_to_what_routes(self, host, crouter):
        first = ExpertSet.load(trained_set())
        moved = dataclasses.replace(first["low"], centroid=first["high"].centroid)
        other = ExpertSet((moved, first["high"]))
        same = [{"experts": first}, {"experts": first, "experts_top_k_experts": 2}]
        another = [
            {"experts": other},
            {"experts": first, "experts_in_domain_quantile": 0.9},
            {"experts": first, "experts_top_k_experts": 1},
        ]
        keys = []
        for options in (*same, *another):
            history = make(host, crouter, **options)
            keys.append(history.policy.key)
            history.detach()
        assert keys[0] == keys[1] and len({str(key) for key in keys}) == 1 + len(another)

    def test_a_stricter_known_leaves_chunks_to_the_host(self, host, crouter):
        history = make(host, crouter, experts=trained_set(), experts_in_domain_quantile=0.0)
        run(host, self.ids(), new=2, logits_processor=[history])
        assert {chunk.route_status for chunk in history.report().chunks} == {"unknown"}

    def test_a_shortlist_asks_fewer_experts(self, host, crouter):
        history = make(host, crouter, experts=trained_set(), experts_top_k_experts=1)
        run(host, self.ids(), new=2, logits_processor=[history])
        assert [chunk.expert for chunk in history.report().chunks][:3] == ["low", "low", "high"]
        assert all(chunk.margin is None for chunk in history.report().chunks), "there was nobody to compare with"

    @pytest.mark.parametrize(
        "options, message",
        [
            ({"experts": True, "experts_in_domain_quantile": 1.5}, "a share, 0 to 1"),
            ({"experts": True, "experts_top_k_experts": -1}, "a number of experts"),
            ({"experts": "nowhere"}, "no set of experts"),
        ],
    )
    def test_bad_arguments(self, host, crouter, options, message):
        with pytest.raises(InputError, match=message):
            make(host, crouter, **options)

    def test_without_a_crouter(self, host):
        with pytest.raises(InputError, match="Experts: expected a crouter"):
            make_history(host, None, soft_prompts=False, experts=trained_set())

    def test_experts_of_another_host_or_crouter(self, host, crouter):
        with pytest.raises(MismatchError, match="host"):
            make(tiny_host(seed=9), crouter, experts=trained_set())
        with pytest.raises(MismatchError, match="crouter"):
            make(host, tiny_crouter(seed=9), experts=trained_set())
