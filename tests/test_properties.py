"""Properties of chunking, layout and rollback, on whatever hypothesis comes up with."""

from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_crouter.cache.kv_cache import CompressedDynamicCache
from hf_crouter.cache.layout import PAD, common_columns, entry_chunk, row_experts, row_layout, stack_rows
from hf_crouter.cache.policy import ContextPolicy
from hf_crouter.chunking import SameTokenizerChunker
from hf_crouter.types import Entries, Retrieval, Row

SETTINGS = settings(deadline=None, max_examples=60)


class Making:
    """Entries of a number that depends on the chunk."""

    key, beside_raw, ids_decide, reads = "making", True, True, False

    def __init__(self, most):
        self.most = most

    def encode(self, chunks):
        return [Entries(embeddings=torch.zeros(chunk.start % self.most + 1, 2)) for chunk in chunks]


def policies():
    return st.builds(
        lambda window, length, prefix, most: ContextPolicy(
            window=window, chunker=SameTokenizerChunker(length), prefix=lambda ids: prefix, compressor=Making(most)
        ),
        st.integers(1, 20), st.integers(1, 12), st.integers(0, 30), st.integers(1, 5),
    )  # fmt: skip


def with_entries(policy, row):
    chunks = [chunk if chunk.entries is not None else replace(chunk, entries=policy.compressor.encode([chunk])[0])
              for chunk in row.chunks]  # fmt: skip
    return replace(row, chunks=tuple(chunks))


def tokens(length):
    return torch.arange(length) % 50


def spans(row):
    return [(chunk.start, chunk.end) for chunk in row.chunks]


class TestChunking:
    @SETTINGS
    @given(policies(), st.integers(0, 150), st.lists(st.integers(0, 40), max_size=6))
    def test_however_a_text_arrives_its_chunks_are_the_same(self, policy, length, pieces):
        row, at = Row(0), 0
        for piece in [*pieces, length]:
            at = min(length, at + piece)
            row = policy.extend(row, tokens(length)[:at])
        assert spans(row) == spans(policy.extend(Row(0), tokens(length)))

    @SETTINGS
    @given(policies(), st.integers(0, 150))
    def test_chunks_are_whole_contiguous_and_as_many_as_can_be(self, policy, length):
        row = policy.extend(Row(0), tokens(length))
        size, prefix = policy.chunker.chunk_length, row.prefix if row.prefix is not None else 0
        most = max(0, (length - prefix - policy.window) // size) if length >= policy.fewest else 0
        assert spans(row) == [(prefix + size * k, prefix + size * (k + 1)) for k in range(most)]

    @SETTINGS
    @given(policies(), st.integers(0, 150))
    def test_where_nothing_may_change_nothing_does(self, policy, length):
        row = policy.extend(Row(0), tokens(length))
        for more in range(1, policy.changes_at(row) - length):
            assert spans(policy.extend(row, tokens(length + more))) == spans(row)

    @SETTINGS
    @given(policies(), st.integers(0, 150), st.integers(0, 150))
    def test_an_ended_row_is_what_it_was_at_its_end(self, policy, end, more):
        ended = policy.extend(replace(Row(0), end=end), tokens(end + more))
        assert spans(ended) == spans(policy.extend(Row(0), tokens(end)))


class TestLayout:
    @SETTINGS
    @given(policies(), st.integers(1, 150), st.lists(st.integers(0, 20), max_size=3), st.booleans())
    def test_every_token_stands_once(self, policy, length, wanted, beside_raw):
        row = with_entries(policy, policy.extend(Row(0), tokens(length)))
        chosen = tuple(sorted({number % len(row.chunks) for number in wanted})) if row.chunks else ()
        if chosen:
            row = replace(row, retrievals=(Retrieval(length, len(row.chunks), chosen, ({},) * len(chosen)),))
        codes = row_layout(length, row, beside_raw=beside_raw)
        raw = codes[codes >= 0].tolist()
        assert len(set(raw)) == len(raw) and PAD not in codes
        compressed = {t for n, (a, b) in enumerate(spans(row)) if n not in chosen for t in range(a, b)}
        assert set(raw) | compressed == set(range(length)) and not set(raw) & compressed
        entries = entry_chunk(codes[codes < PAD])
        for number, chunk in enumerate(row.chunks):
            aside = number in chosen and not beside_raw
            assert int((entries == number).sum()) == (0 if aside else len(chunk.entries))
        changed = ContextPolicy(policy.window, policy.chunker, policy.prefix, Making(policy.compressor.most))
        changed.compressor.beside_raw = beside_raw
        assert changed.slots(row, length) == len(codes)
        assert len(row_experts(row, codes)) == len(codes)
        assert raw == sorted(raw)

    @SETTINGS
    @given(st.lists(st.lists(st.integers(0, 5), max_size=8), min_size=1, max_size=4), st.data())
    def test_common_columns_are_the_longest_common_start(self, rows, data):
        layout = stack_rows([torch.tensor(row, dtype=torch.long) for row in rows], 3)
        other = layout.clone()
        for _ in range(data.draw(st.integers(0, 2))):
            if other.shape[1]:
                other[data.draw(st.integers(0, len(rows) - 1)), data.draw(st.integers(0, other.shape[1] - 1))] += 1
        same = (layout == other).all(0).tolist()
        expected = next((n for n, ok in enumerate(same) if not ok), len(same))
        assert common_columns((layout,), (other,)) == expected


def column(cache, batch, start, count):
    """Keys that say which token they are of, in a forward of `count` columns."""
    tokens_of_rows = torch.arange(start, start + count) + 1000 * torch.arange(batch)[:, None]
    keys = tokens_of_rows[:, None, :, None].float().expand(batch, 1, count, 2)
    cache.update(keys, -keys, 0)


def filled(batch, columns):
    cache = CompressedDynamicCache()
    cache.start([Row(0) for _ in range(batch)], torch.zeros(batch, columns, dtype=torch.long))
    column(cache, batch, 0, columns)
    cache.layout = torch.arange(columns).expand(batch, columns)
    cache.experts = torch.full((batch, columns), -1)
    cache.ids = torch.arange(columns) + 1000 * torch.arange(batch)[:, None]
    return cache


class TestRollback:
    @SETTINGS
    @given(st.integers(1, 3), st.integers(5, 20), st.data())
    def test_state_and_slots_stay_together(self, batch, columns, data):
        """Drafts taken back, rows reordered, chosen and repeated, in any order."""
        cache = filled(batch, columns)
        for _ in range(data.draw(st.integers(1, 6))):
            rows, width = len(cache.rows), cache.layout.shape[1]
            what = data.draw(st.sampled_from(["crop", "reorder", "select", "repeat", "keep"]))
            if what == "crop":
                cache.crop(-data.draw(st.integers(0, width - 1)))
            elif what == "reorder":
                cache.reorder_cache(torch.tensor(data.draw(st.permutations(range(rows)))))
            elif what == "select":
                cache.batch_select_indices(torch.tensor(data.draw(st.lists(st.integers(0, rows - 1), min_size=1))))
            elif what == "repeat":
                cache.batch_repeat_interleave(data.draw(st.integers(1, 2)))
            else:
                cache.keep_columns(data.draw(st.integers(1, width)))
                cache.ids = cache.ids[:, : cache.layout.shape[1]]
            keys = cache.layers[0].keys
            cache.check_filled()
            assert keys.shape[0] == len(cache.rows) == len(cache.layout) == len(cache.experts) == len(cache.ids)
            assert torch.equal(keys[:, 0, :, 0].long(), cache.ids)
            assert torch.equal(cache.layout, cache.ids % 1000)
