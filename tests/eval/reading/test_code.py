"""Next lines, identifiers and lost copies: what their measures claim."""

import numpy as np
import pytest

from eval.reading import identifiers, lost_copies, measures, next_lines
from eval.rows import Shape
from tests.tiny import CHUNK

from .conftest import LENGTH, SHAPE


def test_edit_similarity():
    assert measures.similarity("", "") == measures.similarity("abc", "abc") == 1
    assert measures.similarity("kitten", "sitting") == pytest.approx(1 - 3 / 7)
    assert measures.similarity("", "abcd") == 0


def test_line_metrics():
    assert measures.first_line("\n  \n  x = 1\ny = 2") == "x = 1"
    assert measures.statement("\n  f(1,\n    2)\ny") == "f(1, 2)"
    assert measures.statement("x = '([{'\ny") == "x = '([{'"
    assert measures.repeated_trigrams([1, 2, 3, 4]) == measures.repeated_trigrams([]) == 0
    assert measures.repeated_trigrams([1, 1, 1, 1]) == 0.5
    assert measures.right_before_mistake([1, 2, 4], [1, 2, 3]) == 2
    assert measures.right_before_mistake([1, 2], [1, 2, 3]) == 2
    assert measures.known_names("some_name(x, 'a text', unseen)", "some_name 'a text'", "") == (2, 3)


def test_identifiers_last_stood_in_the_chunks(bench):
    encode = bench.tokenizer.encode
    filler = encode(" 1")

    def fill(ids, length):
        return ids + (filler * length)[: length - len(ids)]

    prefix, space = fill([], 4), encode(" ")
    past = fill(encode(" faraway = nearby"), SHAPE.old - 4)
    window = fill(encode(" nearby"), SHAPE.window)
    target = [*space, *encode("faraway"), *encode(" nearby"), *encode(" faraway"), *encode(" unknown"), *space]
    ids = np.array(prefix + past + window + target)
    spans = identifiers.identifier_spans(bench, ids, SHAPE)
    assert len(spans) == 1 and spans[0][0] >= SHAPE.split
    assert bench.text(ids[slice(*spans[0])]).strip() == "faraway"


def test_copied_tokens_are_traced_to_their_chunk(bench):
    random = np.random.default_rng(0)
    ids = random.permutation(300)[: SHAPE.split + 1] + 20
    ids[-4:] = ids[4 + 2 * CHUNK : 4 + 2 * CHUNK + 4]
    shape = Shape(4, CHUNK, 4, 32, 1)
    assert lost_copies.sources(bench, ids, shape, np.array([True])).tolist() == [2]
    assert lost_copies.sources(bench, ids, shape, np.array([False])).tolist() == [-1]


def test_splits_are_behind_line_ends(bench):
    splits = next_lines.line_splits(bench, bench.sets["young"], SHAPE, 2, range(6), made=64)
    assert splits
    for split in splits:
        ids = bench.sets["young"].ids[split.row]
        assert SHAPE.split <= split.at <= LENGTH - 64 and bench.text(ids[: split.at]).rstrip(" ").endswith("\n")
