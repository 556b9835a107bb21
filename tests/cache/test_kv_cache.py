import copy

import torch

from hf_crouter.cache.kv_cache import CompressedDynamicCache
from hf_crouter.cache.layout import PAD, common_columns, row_layout, soft_index, stack_rows
from hf_crouter.types import Row
from tests.tiny import tiny_host


def test_a_row_without_chunks_is_its_tokens():
    assert row_layout(5, 4, [], 2).tolist() == [0, 1, 2, 3, 4]


def test_a_row_with_chunks():
    layout = row_layout(12, 2, [(2, 5), (5, 9)], 2)
    assert layout.tolist()[:2] == [0, 1] and layout.tolist()[6:] == [9, 10, 11]
    assert soft_index(layout[2:6]).tolist() == [0, 1, 2, 3]
    assert row_layout(12, 2, [(2, 5), (5, 9)], 0).tolist() == [0, 1, 9, 10, 11]


def test_stacked_rows_are_padded_at_the_left():
    stacked = stack_rows([torch.arange(2), torch.arange(4)])
    assert stacked.tolist() == [[PAD, PAD, 0, 1], [0, 1, 2, 3]]
    assert stack_rows([torch.arange(2)], width=3).tolist() == [[PAD, 0, 1]]


def test_common_columns_are_those_of_all_rows():
    a, b = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 3]]), torch.tensor([[0, 1, 2], [0, 9, 2]])
    assert common_columns([a], [b]) == 1
    assert common_columns([a], [a]) == 4
    assert common_columns([a], [a[:1]]) == 0
    assert common_columns([a[:, :0]], [a]) == 0
    other = torch.tensor([[-1, -1, 0, 0], [-1, -1, -1, 0]])
    assert common_columns([a, other], [a, torch.full_like(a, -1)]) == 2
    assert common_columns([a, other], [b, other[:, :3]]) == 1


def filled():
    cache = CompressedDynamicCache(config=tiny_host().config)
    cache.rows = (Row(0, prefix=1), Row(2, prefix=2))
    cache.layout = stack_rows([torch.arange(5), torch.arange(3)])
    cache.experts = torch.tensor([[0] * 5, [1] * 5])
    cache.ids = torch.arange(10).view(2, 5)
    for layer in range(2):
        cache.update(torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8), layer)
    return cache


class TestMirror:
    def test_reorder(self):
        cache = filled()
        keys = cache.layers[0].keys.clone()
        cache.reorder_cache(torch.tensor([1, 1]))
        assert [row.prefix for row in cache.rows] == [2, 2]
        assert cache.layout.tolist() == [[PAD, PAD, 0, 1, 2]] * 2 and cache.ids.tolist() == [[5, 6, 7, 8, 9]] * 2
        assert torch.equal(cache.layers[0].keys, keys[[1, 1]]) and cache.experts.tolist() == [[1] * 5] * 2

    def test_select_by_index_and_by_mask(self):
        for indices in (torch.tensor([1]), torch.tensor([False, True])):
            cache = filled()
            cache.batch_select_indices(indices)
            assert [row.pad for row in cache.rows] == [2]
            assert len(cache.layout) == len(cache.ids) == len(cache.layers[0].keys) == 1

    def test_repeat(self):
        cache = filled()
        cache.batch_repeat_interleave(2)
        assert [row.pad for row in cache.rows] == [0, 0, 2, 2]
        assert len(cache.layout) == len(cache.ids) == len(cache.layers[0].keys) == 4

    def test_crop(self):
        cache = filled()
        cache.crop(0)
        assert cache.width == cache.get_seq_length() == 5
        cache.crop(-2)
        assert cache.width == cache.layout.shape[1] == cache.get_seq_length() == 3

    def test_keep_columns(self):
        cache = filled()
        assert cache.keep_columns(5) == 5
        assert cache.keep_columns(3) == 3 and cache.get_seq_length() == cache.layout.shape[1] == 3
        assert cache.keep_columns(0) == 0 and cache.get_seq_length() == cache.layout.shape[1] == 0

    def test_a_copy_is_independent(self):
        cache = filled()
        other = copy.deepcopy(cache)
        other.crop(-3)
        assert cache.width == cache.get_seq_length() == 5

    def test_heal(self):
        cache = filled()
        cache.heal()
        assert cache.layout.shape[1] == 5
        cache.layers[1].crop(-1)
        cache.heal()
        assert cache.layout.shape[1] == cache.get_seq_length() == 0


def test_bytes():
    assert filled().slot_bytes(10) == 10 * 2 * 2 * 2 * 8 * 4
