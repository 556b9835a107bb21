import copy

import torch

from hf_crouter.cache.kv_cache import CompressedDynamicCache
from hf_crouter.cache.layout import PAD, common_columns, entry_chunk, entry_place, row_layout, stack_rows
from hf_crouter.types import Chunk, Entries, Retrieval, Row
from tests.tiny import tiny_host


def a_row(*counts, retrieved=()):
    """Two tokens of prefix and chunks of three tokens, with so many entries each; None for a chunk that is dropped."""
    ids, chunks = torch.zeros(3, dtype=torch.long), []
    for n, count in enumerate(counts):
        entries = None if count is None else Entries(embeddings=torch.zeros(count, 4))
        chunks.append(Chunk(2 + 3 * n, 5 + 3 * n, ids, ids, entries))
    choice = (Retrieval(0, len(chunks), retrieved, ()),) if retrieved else ()
    return Row(0, prefix=2, chunks=tuple(chunks), retrievals=choice)


def test_a_row_without_chunks_is_its_tokens():
    assert row_layout(5, Row(0, prefix=4)).tolist() == [0, 1, 2, 3, 4]


def test_a_row_with_chunks():
    layout = row_layout(10, a_row(1, 3))
    assert layout.tolist()[:2] == [0, 1] and layout.tolist()[6:] == [8, 9]
    assert entry_chunk(layout[2:6]).tolist() == [0, 1, 1, 1] and entry_place(layout[2:6]).tolist() == [0, 0, 1, 2]
    assert row_layout(10, a_row(None, None)).tolist() == [0, 1, 8, 9]


def test_a_retrieved_chunk_stands_before_the_window():
    row = a_row(1, 2, 1, retrieved=(1,))
    entries = row_layout(12, a_row(1, 2, 1)).tolist()[2:6]
    assert row_layout(12, row).tolist() == [0, 1, *entries, 5, 6, 7, 11]
    assert row_layout(12, row, beside_raw=False).tolist() == [0, 1, entries[0], entries[3], 5, 6, 7, 11]


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

    def test_discard_partial(self):
        cache = filled()
        cache.discard_partial()
        assert cache.layout.shape[1] == 5
        cache.layers[1].crop(-1)
        cache.discard_partial()
        assert cache.layout.shape[1] == cache.get_seq_length() == 0


def test_bytes():
    assert filled().slot_bytes(10) == 10 * 2 * 2 * 2 * 8 * 4
