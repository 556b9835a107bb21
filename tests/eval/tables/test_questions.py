from eval.tables import questions
from eval.tables.readme import render

from .results import interval, rows_of, write


def test_lm_eval(tmp_path):
    metrics = {"ruler_vt.4096.full": 0.125, "ruler_vt.4096.full.se": 0.0312, "ruler_vt.8192.soft_retrieve2_copy": 1.0}
    write(tmp_path, "lm-eval", {**metrics, "slots.4096.full": 4012.0})
    text = render("lm-eval", tmp_path)
    rows = {row[0]: row[1:] for row in rows_of(text)}
    assert rows["`ruler_vt`: variables traced"] == ["12 ± 3", "–", "–", "100"]  # of two arms and two lengths
    assert rows["KV slots"] == ["4,012", "–", "–", "–"] and len(rows) == len(questions.RULER_TASKS) + 1


def test_retrieval_questions(tmp_path):
    metrics = interval("nq.64.overlap.k2.found", 0.453, 0.414, 0.494)
    write(tmp_path, "retrieval-questions", {**metrics, "nq.64.questions": 600.0})
    text = render("retrieval-questions", tmp_path)
    assert rows_of(text)[0][1:] == ["–", "45.3 [41.4, 49.4]", "–", "–", "–"] and "Questions: –, 600, –" in text
