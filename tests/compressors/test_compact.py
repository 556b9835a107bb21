"""Which pairs are kept: sums of squared shares against a loop over queries, and the pairs of the greatest worth."""

import math
from dataclasses import replace

import pytest
import torch

from hf_crouter.compressors import compact
from hf_crouter.compressors.compact import PairSelector, squared_shares
from hf_crouter.types import LayerRead

HEADS, GROUPS, SIZE, BEFORE, BLOCK, PIECE = 2, 3, 8, 5, 24, 16


def a_read(seed=0, own=False, **options):
    """A block of three chunks behind five slots, and a piece that follows it; `own`: the block is the piece."""
    torch.manual_seed(seed)
    slots, asked = BEFORE + BLOCK + PIECE * (not own), BLOCK if own else PIECE
    keys, values = torch.randn(2, HEADS, slots, SIZE), torch.randn(2, HEADS, slots, SIZE)
    queries = torch.randn(2, HEADS * GROUPS, asked, SIZE)
    chunks = tuple((BEFORE + 8 * n, BEFORE + 8 * (n + 1)) for n in range(3))
    some = {"layer": 1, "scaling": 0.7, "softcap": None, "sinks": None, **options}
    some |= {"chunks": () if own else chunks, "own": chunks if own else ()}
    return LayerRead(keys=keys, values=values, queries=queries, **some)


def shares(read, most=1000, far=0):
    """Of the block alone."""
    return squared_shares(read, most, [(BEFORE, BEFORE + BLOCK, far)])[0]


def brute_force(read, far=0, every=1):
    """Sums of squared shares, query after query, or of every second one alone."""
    rows, heads, slots, _ = read.keys.shape
    asked, first, end = read.queries.shape[2], BEFORE, BEFORE + BLOCK
    total = torch.zeros(rows, heads, end - first)
    for row in range(rows):
        for head in range(read.queries.shape[1]):
            for number in range(0, asked, every):
                at = slots - asked + number
                products = []
                for slot in range(at + 1):
                    product = float(read.queries[row, head, number] @ read.keys[row, head // GROUPS, slot])
                    product *= read.scaling
                    if read.softcap is not None:
                        product = read.softcap * math.tanh(product / read.softcap)
                    products.append(math.exp(product))
                whole = sum(products) + (math.exp(float(read.sinks[head])) if read.sinks is not None else 0.0)
                for slot in range(first, min(end, at + 1)):
                    if at - slot >= far:
                        total[row, head // GROUPS, slot - first] += (products[slot] / whole) ** 2
    return total


OPTIONS = [{}, {"softcap": 1.5}, {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.1, 1.2, -0.3])}]


class TestSquaredShares:
    @pytest.mark.parametrize("options", OPTIONS, ids=["plain", "softcap", "sinks"])
    @pytest.mark.parametrize(("own", "far"), [(False, 0), (True, 0), (True, 6)])
    def test_equal_a_loop(self, options, own, far):
        read = a_read(own=own, **options)
        torch.testing.assert_close(shares(read, far=far), brute_force(read, far), atol=1e-6, rtol=1e-4)

    def test_tiles_change_nothing(self, monkeypatch):
        read = a_read()
        whole = shares(read)
        monkeypatch.setattr(compact, "TILE", 1)
        torch.testing.assert_close(shares(read), whole)

    def test_of_many_queries_evenly_spaced_ones_stand_for_all(self):
        read = a_read()
        torch.testing.assert_close(shares(read, 8), 2 * brute_force(read, every=2), atol=1e-6, rtol=1e-4)
        assert not torch.allclose(shares(read, 8), brute_force(read))

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_products_on_tensor_cores_are_summed_in_float32(self, dtype):
        read = a_read()
        some = {name: getattr(read, name).cuda().to(dtype) for name in ("keys", "values", "queries")}
        exact = {name: kept.double().cpu() for name, kept in some.items()}
        expected = shares(replace(read, **exact))
        torch.testing.assert_close(shares(replace(read, **some)).cpu(), expected, atol=1e-6, rtol=1e-5)


class TestPairSelector:
    def test_pairs_of_each_chunk_are_those_that_put_most_into_the_output(self):
        read, own = a_read(), a_read(own=True)
        selector = PairSelector((2, 3), block=32, far=6)
        made = selector.compress(read, selector.compress(own, None)[1])[0]
        worth = brute_force(read) + brute_force(own, far=6)
        worth = worth * read.values[:, :, BEFORE : BEFORE + BLOCK].square().sum(-1)
        assert made.counts == (3, 3, 3)
        for n, (first, end) in enumerate(read.chunks):
            pairs = [kind[:, :, 3 * n : 3 * n + 3] for kind in made[:2]]
            places = worth[..., first - BEFORE : end - BEFORE].topk(3, -1).indices.sort(-1).values + first
            for row in range(2):
                for head in range(HEADS):
                    for kept, whole in zip(pairs, (read.keys, read.values), strict=True):
                        assert torch.equal(kept[row, head], whole[row, head, places[row, head]])

    def test_a_read_tells_of_the_block_before_and_of_its_own_at_once(self):
        read, selector = a_read(), PairSelector((2, 3), block=32, far=6)
        alone, none = selector.compress(read, None)
        start = BEFORE + BLOCK
        both, observed = selector.compress(replace(read, own=((start, start + 8), (start + 8, start + PIECE))), None)
        assert none is None
        assert all(map(torch.equal, both[:3], alone[:3])) and both.counts == alone.counts
        torch.testing.assert_close(observed, squared_shares(read, 1000, [(start, start + PIECE, 6)])[0])

    def test_a_chunk_shorter_than_its_slots_stays_whole(self):
        read = a_read()
        pairs = PairSelector((2, 100), block=32).compress(read, None)[0]
        assert pairs.counts == (8, 8, 8)
        assert torch.equal(pairs.keys, read.keys[:, :, BEFORE : BEFORE + 24])
        assert pairs.places[1, 0].tolist() == [*range(8)] * 3

    def test_bf16_reads_keep_their_own_pairs(self):
        read = a_read()
        half = replace(read, **{k: getattr(read, k).bfloat16() for k in ("keys", "values", "queries")})
        pairs = PairSelector((2, 3), block=32).compress(half, None)[0]
        assert pairs.keys.dtype == torch.bfloat16

    def test_the_longer_the_larger_the_block(self):
        assert [PairSelector((2,), None).block(tokens) for tokens in (512, 32_768, 65_536, 10**6)] == [
            2048, 2048, 4096, 8192
        ]  # fmt: skip
        assert PairSelector((2,), 1000).block(10**6) == 1000

    def test_what_tells_selectors_apart(self):
        one = PairSelector((2, 3), block=32)
        assert one.key == PairSelector((2, 3), block=32).key and one.most == 3
        assert len({one.key, PairSelector((3, 2), block=32).key, PairSelector((2, 3), block=64).key}) == 3
        assert PairSelector((0, 3, 0, 4), block=32).most == 4
