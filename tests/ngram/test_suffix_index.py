import copy
import pickle

import numpy as np
import pytest

from hf_crouter.ngram.suffix_index import LONGEST, Followers, Memory, SuffixIndex, match_lengths


def padded(ids, dtype=np.uint16):
    return np.concatenate([np.zeros(LONGEST, dtype), np.array(ids, dtype)])


@pytest.mark.parametrize(("dtype", "high"), [(np.uint16, 0), (np.uint16, 65_000), (np.uint32, 200_000)])
@pytest.mark.parametrize("seed", range(5))
def test_positions_are_sorted_by_what_stands_before_them(dtype, high, seed):
    ids = np.random.default_rng(seed).choice([0, 1, high + 2], 50).astype(dtype)
    index = SuffixIndex.build(padded(ids, dtype))
    assert index.ends.dtype == np.int32
    assert index.ends.tolist() == sorted(range(1, 50), key=lambda end: ids[:end][::-1].tolist())


def test_narrow_finds_every_occurrence():
    ids = np.random.default_rng(0).integers(0, 3, 200)
    index = SuffixIndex.build(padded(ids))
    for end in range(1, 200):
        low = high = 0
        for depth, token in enumerate(ids[:end][::-1][:12].tolist()):
            low, high = index.narrow(low, high, depth, token)
            wanted = [i for i in range(depth + 1, 200) if (ids[i - depth - 1 : i] == ids[end - depth - 1 : end]).all()]
            assert sorted(index.ends[low:high].tolist()) == wanted


def test_padding_is_no_text():
    index = SuffixIndex.build(padded([0, 0, 1]))
    low, high = index.narrow(0, 0, 0, 0)
    assert sorted(index.ends[low:high].tolist()) == [1, 2]
    low, high = index.narrow(low, high, 1, 0)
    assert index.ends[low:high].tolist() == [2]
    low, high = index.narrow(low, high, 2, 0)
    assert low == high


@pytest.mark.parametrize("ids", [[3], [3, 3], [3, 4]])
def test_short_texts(ids):
    index = SuffixIndex.build(padded(ids))
    assert len(index) == len(ids) and len(index.ends) == len(ids) - 1
    assert index.narrow(0, 0, 0, 5) == (0, 0)
    assert index.proposable is None


def test_what_may_not_be_proposed_is_not_indexed():
    flags = np.array([True, True, False, True, False])
    index = SuffixIndex.build(padded([1, 2, 1, 2, 1]), proposable=flags)
    assert sorted(index.ends.tolist()) == [1, 3]
    assert index.proposable is not None and index.proposable.tolist() == [False, True, False, True, False]
    nothing = SuffixIndex.build(padded([1, 2]), proposable=np.zeros(2, bool))
    assert nothing.narrow(0, 0, 0, 1) == (0, 0)


def test_followers_are_remembered():
    weights = np.array([255, 255, 0, 255, 51], np.uint8)
    index = SuffixIndex.build(padded([7, 1, 7, 2, 7]), weights)
    low, high = index.narrow(0, 0, 0, 7)
    found = index.followers(low, high)
    assert dict(zip(found.tokens.tolist(), found.weights.tolist(), strict=True)) == {1: 1.0, 2: 1.0}
    assert index.followers(low, high) is found
    assert index.memory.nbytes == found.nbytes > 0


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("count", "high"), [(300, 60_000), (300, 300)])
def test_followers_are_counted(weighted, count, high):
    """Few positions of many ids are sorted, many are counted."""
    rng = np.random.default_rng(0)
    ids = np.ravel(np.column_stack([np.full(count, 1), rng.integers(2, high, count)]))
    weights = rng.integers(0, 256, 2 * count).astype(np.uint8) if weighted else None
    index = SuffixIndex.build(padded(ids), weights)
    low, high = index.narrow(0, 0, 0, 1)
    wanted = {}
    for at in range(1, 2 * count, 2):
        wanted[ids[at]] = wanted.get(ids[at], 0) + (1 if weights is None else weights[at] / 255)
    found = index.followers(low, high)
    assert found.tokens.dtype == np.uint16 and found.tokens.tolist() == sorted(wanted)
    assert found.weights.tolist() == pytest.approx([wanted[token] for token in sorted(wanted)])
    assert sorted(index.latest(low, high).tolist()) == list(range(2 * count - 127, 2 * count, 2))


def test_memory_forgets_what_was_not_used_for_longest():
    values = [Followers(np.zeros(2, np.uint16), np.zeros(2, np.float32)) for _ in range(3)]
    memory = Memory(2 * values[0].nbytes)
    memory.put((0, 1), values[0])
    memory.put((1, 2), values[1])
    assert memory.get((0, 1)) is values[0]
    memory.put((2, 3), values[2])
    memory.put((2, 3), values[0])
    assert [memory.get(key) for key in ((0, 1), (1, 2), (2, 3))] == [values[0], None, values[2]]
    assert memory.nbytes == memory.limit
    for other in (copy.deepcopy(memory), pickle.loads(pickle.dumps(memory))):
        assert (other.limit, other.nbytes, other.get((0, 1))) == (memory.limit, 0, None)


def test_match_lengths():
    ids = padded([*range(1, 80), *range(1, 80), 5])
    pattern = np.array([*range(1, 80)][::-1][:LONGEST], np.uint16)
    rows = np.array([79, 158, 78, 159])
    assert match_lengths(ids, rows, pattern).tolist() == [LONGEST, LONGEST, 0, 0]
    assert match_lengths(ids, rows, pattern[:3]).tolist() == [3, 3, 0, 0]
    assert match_lengths(ids, rows[:0], pattern).tolist() == []
