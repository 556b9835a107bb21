from eval.tables import questions
from eval.tables.readme import render

from .results import interval, rows_of, write


def test_ruler(tmp_path):
    metrics = {"ruler_vt.4k.full.accuracy": 0.125, "ruler_vt.4k.full.accuracy.se": 0.0312}
    metrics |= {"ruler_vt.8k.compact32_retrieve2.accuracy": 1.0, "slots.4k.full": 4012.0}
    write(tmp_path, "ruler-qwen1.5b", metrics)
    rows = {row[0]: row[1:] for row in rows_of(render("ruler", tmp_path))}
    assert rows["`ruler_vt`: variables traced"] == ["12 ± 3", "100"]  # what was measured, and nothing else
    assert rows["KV slots"] == ["4,012", "–"] and len(rows) == len(questions.RULER_TASKS) + 1
    write(tmp_path, "ruler-qwen1.5b", {**metrics, "mean.4k.full.accuracy": 0.5})
    assert rows_of(render("ruler", tmp_path))[-2] == ["mean", "50", "–"]


def test_answers(tmp_path):
    metrics = {"xquad.16k.full.accuracy": 0.54, "xquad.16k.full.lo": 0.45, "xquad.16k.full.hi": 0.63}
    metrics |= {"xquad.16k.full.slots": 16285.0, "xquad.16k.full.questions": 100.0, "nq.16k.kvzip.at8.accuracy": 0.0}
    write(tmp_path, "questions-qwen1.5b", metrics)
    rows = {row[0]: row[1:] for row in rows_of(render("questions", tmp_path))}
    assert rows["full history"] == ["16,285", "54 [45, 63]", "–", "100 / –"]
    assert rows["KVzip, 8 entries a chunk"] == ["–", "–", "0", "– / –"]


def test_retrieval_questions(tmp_path):
    metrics = interval("nq.64.overlap.k2.found", 0.453, 0.414, 0.494)
    write(tmp_path, "retrieval-questions", {**metrics, "nq.64.questions": 600.0})
    text = render("retrieval-questions", tmp_path)
    assert rows_of(text)[0][1:] == ["–", "45.3 [41.4, 49.4]", "–", "–", "–"] and "Questions: –, 600, –" in text
