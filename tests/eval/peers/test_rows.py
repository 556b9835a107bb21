import ast
import json
from pathlib import Path

import numpy as np
import pytest

from eval.peers import rows as rows_
from eval.peers.arms import ARMS, DEFAULT, STAGES, stages
from eval.peers.measure import DocumentResults
from eval.peers.reading import right_lines
from eval.peers.rows import BadInput, Layout, chosen, read_questions, read_set, same_about
from tests.eval.peers.tiny_peers import LAYOUT, make_rows, write_questions, write_set

YOUNG = Layout(4, 512, 8, 512, 512)


def test_a_context_is_the_prefix_and_the_last_chunks_and_the_window():
    row = np.arange(YOUNG.length)[None]
    assert YOUNG.length == 5124
    assert YOUNG.context(row, 2).tolist() == [[*range(4), *range(4 + 6 * 512, 4 + 9 * 512)]]
    assert np.array_equal(YOUNG.context(row, 8), row[:, :-512])


def test_budgets_are_the_raw_positions_and_so_many_entries_a_chunk():
    assert ARMS["kvzip.at8"].kept(4, 512, 8, 4612) == 4 + 64 + 512
    assert ARMS["snapkv.at128"].kept(4, 512, 40, 20_996) == 4 + 5120 + 512
    assert ARMS["full_peers"].kept(4, 512, 8, 4612) == ARMS["full_quantised4"].kept(4, 512, 8, 4612) == 4612
    assert ARMS["kvzip.at128"].kept(4, 512, 0, 300) == 300  # never more than there is


def test_arms_come_in_the_order_of_need():
    first = ("kvzip.at8", "kvzip.at128", "snapkv.at8", "snapkv.at128")
    assert DEFAULT[:4] == first and DEFAULT[-1] == "full_peers"
    assert [arm.name for arm in stages(DEFAULT)[0]] == list(first)
    assert len(stages(DEFAULT)) == len(STAGES)
    names = ["full_peers", "snapkv.at32", "snapkv.at8"]
    assert [[arm.name for arm in stage] for stage in stages(names)] == [names[:0:-1], names[:1]]
    with pytest.raises(BadInput, match="--arms: expected some of .*, got nothing.at8"):
        stages(["kvzip.at8", "nothing.at8"])


def test_a_set_is_read_as_written(tmp_path):
    write_set(tmp_path, make_rows())
    rows = read_set(tmp_path, "young")
    assert rows.layout == LAYOUT and rows.names == make_rows().names and rows_.sets_in(tmp_path) == ["young"]
    assert np.array_equal(rows.ids, make_rows().ids) and np.array_equal(rows.lines, make_rows().lines)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda c: c["layout"].pop("chunk"), "expected a layout and named documents"),
        (lambda c: c["layout"].update(chunk=0), "expected a layout and named documents"),
        (lambda c: c["layout"].update(chunks=3), r"expected ids of shape \(3, 212\), got \(3, 244\)"),
        (lambda c: c["documents"].pop(), r"expected ids of shape \(2, 244\), got \(3, 244\)"),
    ],
)
def test_a_set_that_does_not_fit_is_told(tmp_path, spoil, message):
    write_set(tmp_path, make_rows())
    content = json.loads((tmp_path / "young.json").read_text())
    spoil(content)
    (tmp_path / "young.json").write_text(json.dumps(content))
    with pytest.raises(BadInput, match=message):
        read_set(tmp_path, "young")


def test_questions_are_read_and_their_chunks_counted(tmp_path):
    write_questions(tmp_path)
    read = read_questions(tmp_path / "young.200.json")
    assert [q.count for q in read.questions] == [(200 + i - 6 - 96) // 32 for i in range(3)]
    assert read.window == 96 and read.most == 5 and read.stop == {1}
    (tmp_path / "other.json").write_text('{"questions": [{"ids": [1, 2]}], "chunk": 32, "window": 96}')
    with pytest.raises(BadInput, match="expected questions with ids and a prefix, got KeyError"):
        read_questions(tmp_path / "other.json")
    (tmp_path / "other.json").write_text("{")
    with pytest.raises(BadInput, match="other.json: expected JSON, got"):
        read_questions(tmp_path / "other.json")


def test_shards_share_out_the_first_documents():
    """Sets are written in an order of which any first part is a fair sample."""
    assert [chosen(20, 9, (i, 2)).tolist() for i in range(2)] == [[0, 2, 4, 6, 8], [1, 3, 5, 7]]
    assert chosen(3, 9, (0, 1)).tolist() == chosen(3, None, (0, 1)).tolist() == [0, 1, 2]


def test_a_line_is_right_if_all_its_tokens_are():
    lines = np.array([[-1, 0, 0, 1, 1, 2, -1], [0, 0, 0, 3, 3, 3, 3]])
    right = np.array([[0, 1, 1, 1, 0, 1, 0], [1, 1, 0, 1, 1, 1, 1]], bool)
    assert right_lines(right, lines).tolist() == [2, 1]


def test_results_that_lack_something_are_gone_on_with(tmp_path):
    path = tmp_path / "young.peers.0of1.safetensors"
    results = DocumentResults(path, {"seed": 0})
    figures = {"loss": 1.5, "right": 3, "lines": 0, "slots": 20.0}
    results.add(7, "n2.snapkv.at8", figures)
    results.add(5, "n2.snapkv.at8", figures)
    results.add(7, "n2.full_peers", figures)
    results.write()
    found = rows_.load_file(path)
    assert found["documents"].tolist() == [7, 5] and found["documents"].dtype == np.int64
    assert found["n2.full_peers.right"].tolist() == [3, -1] and found["n2.full_peers.right"].dtype == np.int16
    assert np.isnan(found["n2.full_peers.loss"]).tolist() == [False, True]
    again = DocumentResults(path, {"seed": 0})
    assert not again.lacks(7, "n2.full_peers") and again.lacks(5, "n2.full_peers")
    assert not again.lacks(5, "n2.snapkv.at8") and again.found == results.found
    with pytest.raises(BadInput, match="expected results of seed 1, got 0; remove it or save elsewhere"):
        DocumentResults(path, {"seed": 1})
    assert [p.name for p in tmp_path.iterdir()] == [path.name]  # no temporary files


def test_same_about_names_what_is_other(tmp_path):
    same_about(tmp_path, {"a": 1}, {"a": 1})
    with pytest.raises(BadInput, match="expected results of b None, got 2"):
        same_about(tmp_path, {"a": 1, "b": 2}, {"a": 1})


def test_nothing_of_hf_crouter_is_imported():
    """It takes another transformers than kvpress; the same holds for the rest of `eval`."""
    for path in Path(rows_.__file__).parent.glob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = [name.name for node in nodes if isinstance(node, ast.Import) for name in node.names]
        names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
        ours = [name for name in names if name.split(".")[0] in ("eval", "hf_crouter", "tests")]
        assert all(name.startswith("eval.peers") for name in ours), path
