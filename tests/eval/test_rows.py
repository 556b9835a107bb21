import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.rows import (
    Record,
    Rows,
    Shape,
    breaks_lines,
    in_turns,
    line_numbers,
    repetition,
    right_lines,
)
from hf_crouter.errors import InputError

from ..trained_crouter import make_tokenizer

SHAPE = Shape(prefix=2, chunk=4, chunks=3, window=5, target=6)
BREAKS = np.array([False, True, True, False, False])  # ids 1 (a break) and 2 (a break with indentation)


def some_rows(count=3):
    ids = np.arange(count * SHAPE.length, dtype=np.uint32).reshape(count, -1)
    records = [Record(f"p/{n}.py", "p", "code", 0.25, None if n else 0.5) for n in range(count)]
    return Rows(ids, np.full((count, SHAPE.target), -1, np.int16), records, SHAPE, "abc", {"short": 2})


def test_what_is_saved_is_what_is_loaded(tmp_path):
    rows = some_rows()
    rows.save(tmp_path, "own", seed=7)
    for loaded in (Rows.load(tmp_path, "own"), Rows.load(tmp_path, "own", "abc")):
        assert np.array_equal(loaded.ids, rows.ids) and loaded.ids.dtype == np.uint32
        assert np.array_equal(loaded.lines, rows.lines) and loaded.lines.dtype == np.int16
        assert (loaded.records, loaded.shape, loaded.tokenizer, loaded.dropped) == (
            rows.records, SHAPE, "abc", {"short": 2}
        )  # fmt: skip
    assert json.loads((tmp_path / "own.json").read_text())["seed"] == 7


def test_refusals_are_one_line(tmp_path):
    some_rows().save(tmp_path, "own", seed=0)

    def refused(match, name="own", tokenizer=""):
        with pytest.raises(InputError, match=match) as error:
            Rows.load(tmp_path, name, tokenizer)
        assert "\n" not in str(error.value)

    refused("expected the set other .*eval.documents", "other")
    refused("own: expected rows of tokenizer def, got abc", tokenizer="def")
    about = json.loads((tmp_path / "own.json").read_text())
    for changed, match in (
        ({**about, "documents": about["documents"][1:]}, "own: expected 2 rows of 25 ids"),
        ({**about, "layout": {**about["layout"], "target": 5}}, "own: expected 3 rows of 24 ids"),
        ({**about, "layout": {**about["layout"], "target": 5, "window": 6}}, "25 ids and 5 line numbers"),
        ({**about, "layout": {"odd": 1}}, "expected the set own"),
        ({key: about[key] for key in ("set", "documents")}, "expected the set own"),
    ):
        (tmp_path / "own.json").write_text(json.dumps(changed))
        refused(match)
    (tmp_path / "own.json").write_text("{")
    refused("expected the set own")
    (tmp_path / "own.json").write_text(json.dumps(about))
    (tmp_path / "own.safetensors").write_bytes(b"no tensors")
    refused("expected the set own")


def test_the_latest_chunks_and_what_stands_before_them():
    assert (SHAPE.old, SHAPE.split, SHAPE.length) == (14, 19, 25)
    rows = np.arange(50).reshape(2, 25)
    for count in range(4):
        for extra in range(0, 15 - 2 - 4 * count, 3):
            kept = [0, 1, *range(14 - 4 * count - extra, 25)]
            assert SHAPE.latest(rows, count, extra).tolist() == [kept, [25 + n for n in kept]]
    assert np.array_equal(SHAPE.latest(rows, 3), rows)


@pytest.mark.parametrize(
    "targets, numbers",
    [
        ([3, 1, 3, 4, 1, 3], [-1, -1, 0, 0, 0, -1]),  # parts at both ends do not count
        ([1, 3, 1, 1, 1, 4, 3, 1], [-1, 0, 0, -1, -1, 1, 1, 1]),  # blank lines of one token do not either
        ([1, 3, 2, 3, 1], [-1, 0, 0, 1, 1]),  # a break with the next line's indentation ends its line
        ([3, 4, 3], [-1, -1, -1]),
        ([1], [-1]),
        ([], []),
    ],
)
def test_whole_lines(targets, numbers):
    found = line_numbers(np.array(targets, np.int64), BREAKS)
    assert found.tolist() == numbers and found.dtype == np.int16


def test_tokens_with_a_break_are_known_by_their_text():
    tokenizer = make_tokenizer(300, "if x:\n    y\n        z\n" * 40)
    breaks = breaks_lines(tokenizer)
    assert len(breaks) == len(tokenizer)
    joined = [n for n in np.flatnonzero(breaks) if tokenizer.decode([n]) not in ("\n",)]
    assert joined and all("\n" in tokenizer.decode([n]) for n in joined)
    assert not any("\n" in tokenizer.decode([n]) for n in np.flatnonzero(~breaks))


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=40))
def test_right_lines_by_brute_force(tokens):
    targets, right = np.array([t for t, _ in tokens], np.int64), np.array([r for _, r in tokens], bool)
    expected = whole = 0
    line, began = [], False
    for token, hit in zip(targets, right, strict=True):
        line.append(hit)
        if BREAKS[token]:
            whole += began and len(line) > 1
            expected += began and len(line) > 1 and all(line)
            line, began = [], True
    numbers = line_numbers(targets, BREAKS)
    assert right_lines(numbers[None], right[None]).tolist() == [expected]
    assert numbers.max(initial=-1) + 1 == whole
    assert right_lines(np.stack([numbers] * 2), np.stack([right, right | True])).tolist() == [expected, whole]


def test_repetition_is_the_share_of_scored_grams_that_stand_in_the_past():
    length, scored = 1500, 512
    row = np.arange(length, dtype=np.uint32)
    assert repetition(row, scored) == 0
    row[-scored:] = row[:scored]
    assert repetition(row, scored) == 1
    row[-scored // 2 :] = 50_000 + np.arange(scored // 2)
    assert repetition(row, scored) == pytest.approx((scored // 2 - 12) / (scored - 12))
    row[:] = np.arange(length)
    row[-100:] = row[-200:-100]  # a repeat inside the scored tokens is none of the past
    assert repetition(row, scored) == 0


@given(st.lists(st.sampled_from("abcd"), max_size=20), st.integers(0, 3), st.randoms())
def test_clusters_take_turns_in_any_order_of_input(clusters, seed, random):
    records = [Record(f"{cluster}/{n}", cluster, "code", 0.0) for n, cluster in enumerate(clusters)]
    order = [records[i] for i in in_turns(records, seed)]
    assert sorted(order, key=records.index) == records
    mixed = random.sample(records, len(records))
    assert [mixed[i] for i in in_turns(mixed, seed)] == order
    counts = {cluster: 0 for cluster in clusters}
    for record in order:
        counts[record.cluster] += 1
        done = {name: n for name, n in counts.items() if n == clusters.count(name)}
        left = [n for name, n in counts.items() if name not in done]
        # of two clusters that still have rows neither is two turns ahead, and those that are done had their turns
        assert max(left, default=0) - min(left, default=0) <= 1 and max(counts.values()) <= min(left, default=99) + 1


def test_the_seed_decides_the_order():
    records = [Record(f"{n % 5}/{n}", f"{n % 5}", "code", 0.0) for n in range(30)]
    assert in_turns(records, 0) != in_turns(records, 1)
    renamed = [replace(record, repetition=0.3) for record in records]
    assert in_turns(records, 0) == in_turns(renamed, 0)
