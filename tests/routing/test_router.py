"""Decisions from reconstruction NLLs, with two experts that were trained and with made-up calibrations."""

import dataclasses
import math

import pytest
import torch

from hf_crouter.errors import InputError, MismatchError
from hf_crouter.routing.adapters import Lora
from hf_crouter.routing.calibration import LengthCalibration, quantiles_by_length
from hf_crouter.routing.experts import Expert, ExpertConfig, ExpertSet
from hf_crouter.routing.profile import FLOOR, LOG_NLL, NLL, Profile, summary
from hf_crouter.routing.router import Router
from hf_crouter.routing.spans import Span, route_spans, split_document

from ..tiny import CHUNK, tiny_crouter
from .trained_experts import DOMAINS, FOREIGN, save_expert, texts, trained_set

torch.set_num_threads(1)
LOW, HIGH = 0, 1


@pytest.fixture
def crouter():
    return tiny_crouter()


@pytest.fixture(scope="module")
def experts():
    return ExpertSet.load(trained_set())


@pytest.fixture
def router(crouter, experts):
    return Router(crouter, experts, fewest=4, rows=16)


def pieces_of(*kinds):
    """One text a kind, `low`, `high` or `?`."""
    return [texts(DOMAINS.get(kind, FOREIGN), 1, seed=200 + n)[0] for n, kind in enumerate(kinds)]


class TestTrained:
    def test_domains_are_told_apart_and_a_third_is_refused(self, router):
        for number, (name, first) in enumerate(DOMAINS.items()):
            routes = [router([piece])[0] for piece in texts(first, 40, seed=7)]
            assert sum(route.number == number for route in routes) >= 39
            assert {route.expert for route in routes} <= {name, None}
            assert routes[0].reconstruction_nll.keys() == DOMAINS.keys()
        routes = [router([piece])[0] for piece in texts(FOREIGN, 40, seed=7)]
        assert sum(route.status == "unknown" and route.expert is None and route.number == -1 for route in routes) >= 38

    def test_other_lengths(self, router):
        for number, first in enumerate(DOMAINS.values()):
            assert sum(router([piece])[0].number == number for piece in texts(first, 40, 9, seed=8)) >= 37

    def test_a_row_of_chunks(self, router):
        pieces = [*pieces_of("low", "low", "high", "?", "high"), torch.tensor([11, 12])]
        routes = router(pieces)
        assert [route.number for route in routes] == [LOW, LOW, HIGH, -1, HIGH, HIGH]
        assert routes[-1].status == "short" and routes[-1].reconstruction_nll == {}
        alone = [router([piece])[0] for piece in pieces[:-1]]
        assert [route.expert for route in alone] == [route.expert for route in routes[:-1]]

    def test_rows_at_once_are_rows_alone(self, crouter, experts):
        pieces = [piece[: 4 + 3 * n] for n, piece in enumerate(pieces_of("low", "high", "?", "low", "high"))]
        both = Router(crouter, experts, rows=16).reconstruction_nlls(pieces)
        alone = Router(crouter, experts, rows=1).reconstruction_nlls(pieces)
        assert both.shape == (5, 3, 2) and torch.allclose(both, alone, atol=1e-5)

    def test_reconstruction_nlls_are_those_of_the_adapter(self, router, crouter, experts):
        piece = pieces_of("low")[0]
        assert router.token_reconstruction_nll(piece).shape == (2, CHUNK)
        with torch.no_grad():
            alone = crouter(piece[None]).token_reconstruction_nll
        every = summary(torch.cat([router.token_reconstruction_nll(piece), alone]))
        assert torch.allclose(every, router.reconstruction_nlls([piece])[0], atol=1e-5)
        other = tiny_crouter()
        for path, down in experts["high"].compressor.down.items():
            other.get_submodule(path).weight.data += experts["high"].compressor.up[path] @ down
        with torch.no_grad():
            merged = other(piece[None]).token_reconstruction_nll[0]
        assert torch.allclose(router.token_reconstruction_nll(piece)[HIGH], merged, atol=1e-4)
        some = router.token_reconstruction_nll(piece, [HIGH])
        assert some[LOW].isnan().all() and torch.allclose(some[HIGH], merged, atol=1e-4)

    def test_the_crouter_is_bit_for_bit_itself(self, crouter, experts):
        ids = torch.stack(pieces_of("low", "high"))
        with torch.no_grad():
            before = crouter(ids).token_reconstruction_nll
            router = Router(crouter, experts)
            assert torch.equal(crouter(ids).token_reconstruction_nll, before)
            found = router.reconstruction_nlls(list(ids))
            assert torch.equal(crouter(ids).token_reconstruction_nll, before)
        with pytest.raises(InputError, match="1 to 16 tokens"):
            router.reconstruction_nlls([ids[0], torch.zeros(CHUNK + 1, dtype=torch.long)])
        assert torch.equal(router.reconstruction_nlls(list(ids)), found)
        with torch.no_grad():
            assert torch.equal(crouter(ids).token_reconstruction_nll, before)
        router.remove()
        assert not any(module._forward_hooks for module in crouter.modules())
        with pytest.raises(InputError, match="after `remove`"):
            router.reconstruction_nlls(list(ids))

    def test_a_third_expert_changes_no_bit_of_the_others(self, crouter, experts, tmp_path):
        pieces = [piece[: 5 + 2 * n] for n, piece in enumerate(pieces_of("low", "high", "?", "high", "low"))]
        before = Router(crouter, experts, rows=3).reconstruction_nlls(pieces)
        third = Expert.load(save_expert(tmp_path / "third", trained=False, seed=9))
        more = Router(tiny_crouter(), ExpertSet((*experts, third)), rows=3).reconstruction_nlls(pieces)
        assert more.shape == (5, 4, 2) and torch.equal(more[:, :2], before[:, :2])
        assert more[:, 3].isnan().all(), "no expert has a profile in this set: the crouter alone is not asked"

    def test_top_k(self, crouter, experts, tmp_path):
        third = Expert.load(save_expert(tmp_path / "third", trained=False, seed=9))
        experts = ExpertSet((*experts, third))
        pieces = [piece for first in DOMAINS.values() for piece in texts(first, 20, seed=9)]
        router = Router(crouter, experts, top_k_experts=2, rows=16)
        found = router.reconstruction_nlls(pieces)
        full = Router(tiny_crouter(), experts, rows=16).reconstruction_nlls(pieces)
        left_out = found[:, :-1, NLL].isnan()
        assert (left_out.sum(1) == 1).all()
        assert torch.allclose(found[:, :-1][~left_out], full[:, :-1][~left_out], atol=1e-5)
        own = torch.tensor([0] * 20 + [1] * 20)
        assert left_out[torch.arange(40), own].float().mean() <= 0.1, "its own expert is nearly always among them"
        route = router.decide(found[0], CHUNK)
        assert len(route.reconstruction_nll) == 2 and math.isfinite(route.margin)
        assert not Router(crouter, experts, top_k_experts=3).reconstruction_nlls(pieces[:2])[:, :-1].isnan().any()

    def test_overlap_is_below_the_experts_own_margins(self, router, experts):
        found = [router([piece])[0].status for piece in texts(DOMAINS["low"], 60, seed=11)]
        assert found.count("overlap") <= 4
        least = experts["low"].profile.margin(CHUNK, 0.01)
        medians = [min(e.calibration.reconstruction_nll(CHUNK, 0.5) for e in experts)] * 2
        for margin, status in ((least - 0.05, "overlap"), (least + 0.05, "known")):
            reconstruction_nlls = row(*medians)
            reconstruction_nlls[HIGH, LOG_NLL] += margin
            route = router.decide(reconstruction_nlls, CHUNK)
            assert (route.number, route.status) == (LOW, status) and route.margin == pytest.approx(margin, abs=1e-5)

    def test_profiles_know_what_one_nll_does_not(self, crouter, experts):
        router = Router(crouter, experts, fewest=4)
        own = router.reconstruction_nlls(pieces_of("low", "high"))
        for piece, number in zip(own, (LOW, HIGH), strict=True):
            assert router.distances(piece, CHUNK).argmin() == number
            assert router.in_domain(piece, CHUNK).tolist() == [number == LOW, number == HIGH]
        easy = own[0].clone()  # rebuilt with ease by everybody, and unlike the texts of anybody
        easy[:, NLL], easy[:, LOG_NLL] = 0.0, math.log(FLOOR)
        assert not router.in_domain(easy, CHUNK).any() and router.decide(easy, CHUNK).status == "unknown"
        plain = Router(tiny_crouter(), ExpertSet(tuple(dataclasses.replace(e, profile=None) for e in experts)))
        assert plain.in_domain(easy, CHUNK).all() and plain.distances(easy, CHUNK).isnan().all()
        one = ExpertSet((experts["low"], dataclasses.replace(experts["high"], profile=None)))
        assert Router(tiny_crouter(), one).in_domain(easy, CHUNK).tolist() == [False, True], (
            "each by what is known of it"
        )
        easy[HIGH] = math.nan  # not among the top k
        assert router.in_domain(easy, CHUNK).tolist() == [True, False]

    def test_borders_of_a_document(self, router):
        low, high = (torch.cat(texts(first, 3, seed=12)) for first in DOMAINS.values())
        ids = torch.cat([low[:40], high[:41], low[:20]])  # no border is a chunk's
        spans = split_document(router, ids, switch=6.0, smooth=4)
        assert [span.number for span in spans] == [LOW, HIGH, LOW]
        assert abs(spans[0].end - 40) <= 4 and abs(spans[1].end - 81) <= 4 and spans[-1].end == 101
        routes = route_spans(router, ids, spans)
        assert [route.number for route in routes] == [LOW, HIGH, LOW]
        assert split_document(router, [], switch=1.0) == []
        assert split_document(router, low, switch=6.0) == [Span(0, 48, LOW)]


def made_up(medians, *, spread=0.5, margins=None):
    """Experts whose reconstruction NLLs at 100 tokens lie evenly around a median, half of it at 10 tokens."""
    found = []
    for n, median in enumerate(medians):
        rows = {
            length: torch.linspace(-spread, spread, 1001) + median * share for length, share in ((10, 0.5), (100, 1))
        }
        calibration = LengthCalibration.fit({k: v.numpy() for k, v in rows.items()}, 9, "f", "w")
        profile = None
        if margins is not None:
            profile = Profile(("w",) * len(medians), (), {}, {}, {}, quantiles_by_length({100: margins}, "margins"))
        lora = Lora({}, {}, "w")
        found.append(Expert(f"e{n}", lora, lora, calibration, ExpertConfig("f"), profile=profile))
    return ExpertSet(tuple(found))


def row(*values):
    """Reconstruction NLLs of one text all of whose tokens cost the same, the crouter alone not asked."""
    return torch.tensor([[value, math.log(value + FLOOR)] for value in (*values, math.nan)])


def lead(other, own):
    """Margin over such another."""
    return math.log((other + FLOOR) / (own + FLOOR))


def decide(experts, values, tokens=100, previous=None, **options):
    return Router(tiny_crouter(), experts, **options).decide(row(*values), tokens, previous)


class TestDecision:
    def test_one_hard_token_does_not_decide(self):
        experts, tokens = made_up([1.0, 1.0]), torch.full((2, 100), 0.1)
        tokens[0, 1:], tokens[0, 0] = 0.05, 9.0  # half as much in all tokens but one
        reconstruction_nlls = summary(torch.cat([tokens, torch.full((1, 100), math.nan)]))
        assert reconstruction_nlls[0, NLL] > reconstruction_nlls[1, NLL]
        assert Router(tiny_crouter(), experts).decide(reconstruction_nlls, 100).expert == "e0"

    def test_the_least_log_nll_serves(self):
        experts = made_up([1.0, 3.0])
        assert decide(experts, [1.4, 2.8]).expert == "e0"
        assert decide(experts, [1.4, 1.3]).expert == "e1"
        assert decide(experts, [1.4, 1.3]).margin == pytest.approx(lead(1.4, 1.3), abs=1e-5)
        assert decide(experts, [1.8, 2.9]).expert == "e1", "the first does not know it"

    def test_unknown_is_above_every_experts_own_quantile(self):
        experts = made_up([1.0, 3.0])
        route = decide(experts, [1.6, 3.6])
        assert (route.expert, route.number, route.status) == (None, -1, "unknown")
        assert route.reconstruction_nll == pytest.approx({"e0": 1.6, "e1": 3.6})
        assert decide(experts, [1.6, 3.4]).expert == "e1"
        assert decide(experts, [1.45, 3.6]).status == "known"
        assert decide(experts, [1.45, 3.6], in_domain_quantile=0.9).status == "unknown"
        assert decide(experts, [1.45, 3.6], tokens=10, fewest=5).status == "unknown"
        assert decide(experts, [float("nan"), float("nan")]).status == "unknown"
        assert decide(experts, [float("nan"), 3.0]).number == 1

    def test_short(self):
        experts = made_up([1.0, 3.0])
        for previous in (None, -1, 1):
            route = decide(experts, [1.0, 3.5], tokens=63, previous=previous)
            assert (route.status, route.number) == ("short", -1 if previous is None else previous)
        assert decide(experts, [1.0, 3.5], tokens=63, previous=1).expert == "e1"
        assert decide(experts, [1.0, 3.5], tokens=64).status == "known"

    def test_overlap(self):
        margins = torch.linspace(0.0, 1.0, 101).numpy()
        experts = made_up([1.0, 1.0], margins=margins)
        assert decide(experts, [1.0, 1.005]).status == "overlap"
        assert decide(experts, [1.0, 1.02]).status == "known"
        assert decide(experts, [1.0, 1.02], overlap_quantile=0.1).status == "overlap"
        assert decide(made_up([1.0, 1.0]), [1.0, 1.0]).status == "known", "no margins were measured"

    def test_a_lone_expert(self):
        route = decide(made_up([1.0]), [1.0])
        assert (route.number, route.margin, route.status) == (0, math.inf, "known")


class TestRefused:
    def test_ids_of_another_tokenizer(self, crouter, experts):
        most = crouter.config.vocab_size
        with pytest.raises(MismatchError, match=f"expected ids below {most} .*, got {most}"):
            Router(crouter, experts).reconstruction_nlls([torch.tensor([1, 2]), torch.tensor([most])])

    def test_sets(self, crouter, experts):
        with pytest.raises(InputError, match="at least one"):
            Router(crouter, ExpertSet(()))
        with pytest.raises(InputError, match="centroid of every expert"):
            Router(crouter, ExpertSet(tuple(dataclasses.replace(e, centroid=None) for e in experts)), top_k_experts=1)

    def test_another_crouter(self, experts):
        crouter = tiny_crouter(hidden_size=32)
        with pytest.raises(MismatchError, match="another model"):
            Router(crouter, experts)
        assert not any(module._forward_hooks for module in crouter.modules())

    @pytest.mark.parametrize("piece", [torch.zeros(0, dtype=torch.long), torch.zeros(2, 3, dtype=torch.long)])
    def test_texts(self, router, piece):
        with pytest.raises(InputError, match="texts of 1 to 16 tokens"):
            router.reconstruction_nlls([piece])
