"""The archives on a device, searched here on the CPU, against the sorted index and a list read from end to end."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from hf_crouter.ngram.archive import Archive
from hf_crouter.ngram.candidates import Evidence, collect
from hf_crouter.ngram.device_index import DeviceSearch, match_lengths, rounded
from hf_crouter.ngram.gate import SOURCES, Gate
from hf_crouter.ngram.mixture import mix
from hf_crouter.ngram.raw_text import RawText
from hf_crouter.types import Chunk, Retrieval, Row

VOCAB, STOPS, CPU = 40, (0, 1), torch.device("cpu")


def repetitive(drawn, length):
    phrases = [drawn.integers(0, VOCAB, drawn.integers(3, 30)) for _ in range(4)]
    ids = np.concatenate([phrases[i] for i in drawn.integers(0, 4, length)])[:length]
    ids[drawn.random(length) < 0.05] = drawn.integers(0, VOCAB)
    return ids


def make_row(drawn, width, archived, window, pad, retrieved=()):
    """A row of a cache with ids `[width]`, compressed from its prefix of 3 on, and its archive."""
    ids = np.concatenate([np.zeros(pad, np.int64), repetitive(drawn, width - pad)])
    ends = np.linspace(3, width - pad - window, 5).astype(int) if archived else []
    chunks = []
    for start, end in zip(ends[:-1], ends[1:], strict=True):
        text = torch.from_numpy(ids[pad + start : pad + end])
        chunks.append(Chunk(int(start), int(end), text, text))
    retrievals = (Retrieval(0, 4, tuple(retrieved), ()),) if retrieved else ()
    row = Row(pad, 3, tuple(chunks), prompt=width - pad, retrievals=retrievals)
    return ids, row, ids[pad + 3 : pad + row.raw_start] if archived else ids[:0]


def make_archive(drawn, ids, rebuilt=False, holes=False, tail=10_000):
    archive = Archive.empty(VOCAB, STOPS, tail_limit=tail)
    weights = np.where(drawn.random(len(ids)) < 0.3, 0.0, drawn.random(len(ids))) if rebuilt else None
    return archive.extended(ids, weights, drawn.random(len(ids)) < 0.8 if holes else None)


def expected(ids, row, archive):
    """The same evidence from the sorted index."""
    begin, width = row.pad + row.raw_start, len(ids)
    chunks = [row.chunks[n].host_ids.numpy() for n in row.retrieved]
    raw = RawText([ids[row.pad : row.pad + row.prefix], *chunks], ids[begin:])
    return Evidence.of(archive, ids[max(row.pad, width - 64) :], raw, width - begin)


def flat_on_grid(candidates):
    """Probabilities of flat candidates by token, `[N, K, V]`."""
    table = torch.zeros(len(candidates), SOURCES, VOCAB)
    table[candidates.positions, candidates.sources, candidates.tokens] = candidates.probabilities
    return table


def grid_by_token(grid):
    return torch.zeros(len(grid), SOURCES, VOCAB).scatter_add_(
        2, grid.tokens[:, None].expand(-1, SOURCES, -1), grid.probabilities
    )


def assert_same(grid, flat, scores):
    assert torch.equal(grid.available, flat.available)
    torch.testing.assert_close(grid_by_token(grid), flat_on_grid(flat), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(grid.features, flat.features, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(grid.confidence, flat.confidence, atol=1e-6, rtol=1e-6)
    assert torch.equal(grid.chosen, flat.chosen)
    torch.manual_seed(0)
    gate = Gate()
    torch.nn.init.normal_(gate.down.weight, std=0.5)
    with torch.no_grad():
        gate.down.bias[0] = 0
    targets = torch.arange(len(flat)) % VOCAB
    one, two = mix(scores, grid, gate), mix(scores, flat, gate)
    for a, b in ((one.weights, two.weights), (one.of(targets, scores), two.of(targets, scores))):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(*(m.log_probabilities(scores) for m in (one, two)), atol=1e-4, rtol=1e-4)
    assert torch.equal(one.greedy(), two.greedy())
    brought = [m.candidates.of(targets, m.with_sources(scores)[1].float()) > 0 for m in (one, two)]
    assert torch.equal(*brought)
    return one.share.mean().item()


@pytest.mark.parametrize("rebuilt", [False, True])
@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("tail", [10_000, 50])
def test_it_says_what_the_sorted_index_says(rebuilt, holes, tail):
    drawn = np.random.default_rng(0)
    shares = []
    for trial in range(8):
        width = int(drawn.integers(150, 400))
        made = [make_row(drawn, width, archived, int(drawn.integers(20, 60)), pad, retrieved)
                for archived, pad, retrieved in
                [(True, 0, ()), (True, 40, (1, 3)), (False, 9, ()), (True, 3, (0,))]]  # fmt: skip
        archives = [make_archive(drawn, past, rebuilt, holes, tail) for _, _, past in made]
        rows, ids = [row for _, row, _ in made], torch.from_numpy(np.stack([ids for ids, _, _ in made]))
        ids[3, -1 - trial] = STOPS[0]  # nothing is matched over it
        scores = torch.randn(len(rows), VOCAB)
        scores[:, 3] = -torch.inf
        flat = collect([expected(ids[i].numpy(), rows[i], archives[i]) for i in range(len(rows))])
        grid = DeviceSearch(CPU, grows=False)(archives, tuple(rows), ids)
        shares.append(assert_same(grid, flat, scores))
    assert max(shares) > 0.05


@pytest.mark.parametrize("grows", [False, True])
def test_step_by_step_as_from_the_start(grows):
    drawn = np.random.default_rng(1)
    made = [make_row(drawn, 500, True, 190, pad, retrieved) for pad, retrieved in ((0, (2,)), (11, ()))]
    archives = [make_archive(drawn, past) for _, _, past in made]
    rows, ids = [row for _, row, _ in made], torch.from_numpy(np.stack([ids for ids, _, _ in made]))
    ids[1, 350:355] = STOPS[1]
    search = DeviceSearch(CPU, grows)
    for width in (311, 312, *range(330, 440), 460, 461):
        if width == 350:  # one row retrieves other chunks
            rows[0] = replace(rows[0], retrievals=(Retrieval(0, 4, (0, 1, 3), ()),))
        if width == 370:  # the other compresses more
            archives[1] = archives[1].extended(ids[1, 330:360].numpy())
            rows[1] = replace(rows[1], chunks=(*rows[1].chunks, Chunk(rows[1].raw_start, 349, ids[1], ids[1])))
        if width == 390:  # and more than there is room for
            archives[1] = archives[1].extended(np.arange(300) % VOCAB)
        if width in (311, 350, 370, 390):
            held = tuple(rows)  # the same object as long as nothing changes
        found = search(archives, held, ids[:, :width])
        flat = collect([expected(ids[i, :width].numpy(), rows[i], archives[i]) for i in range(2)])
        assert_same(found, flat, torch.randn(2, VOCAB))
    assert search.nbytes > 0


def test_a_text_that_fills_its_table_may_shrink():
    drawn = np.random.default_rng(4)
    ids, row, past = make_row(drawn, 1200, True, 400, 0)
    archive, text = make_archive(drawn, past), torch.from_numpy(ids)[None]
    search = DeviceSearch(CPU, grows=True)
    held = (row,)
    search([archive], held, text[:, :810])
    width = 810 + search._tables.text.shape[1] - search._ends[0]
    for column in range(811, width + 1):  # to the last place
        search([archive], held, text[:, :column])
    assert search._room == 0 and int(search._tables.ends) == search._tables.text.shape[1]
    shorter = replace(row, chunks=(*row.chunks, Chunk(row.raw_start, row.raw_start + 20, text[0], text[0])))
    found = search([archive], (shorter,), text[:, : width + 1])
    flat = collect([expected(ids[: width + 1], shorter, archive)])
    assert_same(found, flat, torch.randn(1, VOCAB))


def test_rows_that_change_places_are_searched_anew():
    drawn = np.random.default_rng(2)
    made = [make_row(drawn, 200, True, 40, 0) for _ in range(2)]
    archive = make_archive(drawn, made[0][2])
    rows, ids = (made[0][1],) * 2, torch.from_numpy(np.stack([ids for ids, _, _ in made]))
    search = DeviceSearch(CPU, grows=False)
    search([archive] * 2, rows, ids[:, :199])
    swapped = ids.flip(0)
    found = search([archive] * 2, rows, swapped)
    flat = collect([expected(swapped[i].numpy(), rows[i], archive) for i in range(2)])
    assert torch.equal(found.available, flat.available)
    torch.testing.assert_close(grid_by_token(found), flat_on_grid(flat))


def test_long_texts_are_compared_in_parts(monkeypatch):
    drawn = np.random.default_rng(3)
    text = torch.from_numpy(np.stack([repetitive(drawn, 500) for _ in range(3)]))
    pattern = text[:, 300:364].flip(1)
    whole = match_lengths(text, pattern)
    monkeypatch.setattr("hf_crouter.ngram.device_index._BLOCK", 100)
    assert torch.equal(match_lengths(text, pattern), whole)
    assert whole[:, 364].tolist() == [64] * 3 and int(whole.min()) == 0


def test_sizes_are_rounded_up_by_an_eighth_at_most():
    for size in (1, 64, 65, 100, 1000, 4097, 32_768, 1_000_000):
        assert size <= rounded(size) <= max(64, size * 1.125 + 8)
    assert len({rounded(size) for size in range(1, 100_000)}) < 100
