"""Test windows, spliced texts and real ones with borders."""

import json

import numpy as np
import pytest
import torch

from eval.routing.baselines import CharacterGrams, LatentProbe, TfIdfCentroids, gram_buckets, gram_costs
from eval.routing.borders import nearest_border, tuned
from eval.routing.data import cut_windows, group_of
from eval.routing.mixed import CODE, Labelled, docstrings, fenced, notebook, smoothed, token_labels
from eval.routing.report.figures import Figures, false_accepts, macro, rejection_auroc
from eval.routing.report.routes import confusion
from eval.routing.splice import changing, splice
from eval.routing.windows import WINDOW, Record, TestWindows
from hf_crouter.data.documents import Document
from hf_crouter.data.tokens import plain_tokenizer
from hf_crouter.routing.spans import Span

from ...data.samples import LIBRARY
from ...trained_crouter import make_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return plain_tokenizer(make_tokenizer())


@pytest.mark.parametrize(
    "domain, document, group",
    [
        ("novels_en", Document("novels_en/ENG18531_Yonge", "novels_en", ""), "Yonge"),
        ("medquad", Document("medquad/1.xml", "medquad", "Topic: Gout\n\nQuestion"), "topic: gout"),
        ("json_config", Document("json_config/src/schemas/json/renovate-39.json", "json_config", ""), "renovate"),
        ("json_config", Document("json_config/src/test/renovate/a.json", "json_config", ""), "renovate"),
        ("csv_tables", Document("csv_tables/bob-ross/a.csv", "csv_tables", ""), "bob-ross"),
        ("python", Document("rich/a.py", "rich", ""), "rich"),
        ("wiki_en", Document("wiki_en/12", "wiki_en", ""), "wiki_en/12"),
    ],
)
def test_group_of(domain, document, group):
    assert group_of(document, domain) == group


def test_windows_do_not_overlap_and_every_document_comes_first(tokenizer):
    documents = [(Document(f"{name}.py", name, (LIBRARY / f"{name}.py").read_text()), 0.1) for name in ("ast", "pdb")]
    rows, records = cut_windows(documents, tokenizer, "python", 6, seed=0)
    assert len(rows) == 6 and all(row.shape == (WINDOW,) for row in rows)
    assert {record.document for record in records[:2]} == {"ast.py", "pdb.py"}
    for name in ("ast.py", "pdb.py"):
        starts = sorted(record.start for record in records if record.document == name)
        assert (np.diff(starts) >= WINDOW).all()


def windows():
    return np.arange(4)[:, None] * 1000 + np.arange(64), np.array(["a", "a", "b", "b"])


def test_splice_changes_once_at_its_border():
    ids, domains = windows()
    found = splice(ids, domains, 20, seed=0)
    assert found.ids.shape == (20, 32)
    for row, border, first, second in zip(found.ids, found.borders, found.first, found.second, strict=True):
        assert domains[first] != domains[second] and 4 <= border <= 28
        assert (row[:border] // 1000 == first).all() and (row[border:] // 1000 == second).all()


def test_changing_documents_stay_in_the_second_domain():
    ids, domains = windows()
    found = changing(ids, domains, 10, seed=0)
    assert found.ids.shape == (10, 160)
    for row, border, second in zip(found.ids, found.borders, found.second, strict=True):
        assert 32 <= border < 64
        assert (domains[row[border:] // 1000] == domains[second]).all()


def test_docstrings_are_prose_and_the_rest_is_code(tokenizer):
    prose = '"""' + "What this module says about itself. " * 8 + '"""'
    (text,) = docstrings([Document("m.py", "m", f"{prose}\nimport os\n\n\ndef f():\n    return os\n")])
    assert [text.text[a:b] for a, b in text.code] == ["\nimport os\n\n\ndef f():\n    return os\n"]
    ids, labels = token_labels(text, tokenizer)
    code = tokenizer.decode(ids[labels == CODE].tolist())
    assert code.strip().startswith("import os") and len(ids) == len(labels)


def test_fenced_python_is_code_and_another_language_ends_the_text():
    text = fenced("readme", "Hello\n```python\nprint(1)\n```\nmore\n```bash\n" + "x" * 200 + "\n```\nrest")
    assert [text.text[a:b] for a, b in text.code] == ["print(1)\n"]
    assert text.text.endswith("more\n")
    assert fenced("readme", "no code") is None


def test_notebook_cells():
    cells = [{"cell_type": "markdown", "source": ["# A", " title"]}, {"cell_type": "code", "source": "x = 1"}]
    text = notebook("n.ipynb", json.dumps({"cells": cells}).encode())
    assert text.text == "# A title\n\nx = 1\n\n" and text.text[slice(*text.code[0])] == "x = 1\n\n"
    assert notebook("n.ipynb", b"{}") is None


def test_short_stretches_join_their_neighbours():
    labels = np.repeat([0, 1, 0, 1], [10, 2, 10, 10]).astype(np.uint8)
    assert smoothed(labels, 4).tolist() == [0] * 22 + [1] * 10


def test_labelled_text_without_code_is_prose(tokenizer):
    _, labels = token_labels(Labelled("descriptions", "a", "only prose", []), tokenizer)
    assert not labels.any()


def test_character_grams_know_their_language():
    grams = CharacterGrams([["the cat sat on the mat " * 30], ["der Hund lief in den Wald " * 30]])
    assert grams.scores(["the mat", "den Hund"]).argmin(1).tolist() == [0, 1]
    assert len(gram_buckets("abcd")) == 4 + 3 + 2 + 1
    costs = gram_costs(grams, ["the", " cat", " Hund", " lief"])
    assert costs.shape == (2, 4) and costs[:, :2].sum(1).argmin() == 0 and costs[:, 2:].sum(1).argmin() == 1


def test_centroids_and_probe_find_their_own():
    generator = np.random.default_rng(0)
    pieces = [[generator.integers(0, 20, 30) for _ in range(5)], [generator.integers(15, 40, 30) for _ in range(5)]]
    centroids = TfIdfCentroids(pieces, 40)
    assert centroids.scores([pieces[0][0], pieces[1][0]]).argmin(1).tolist() == [0, 1]
    counts = np.stack([np.bincount(piece, minlength=40) for some in pieces for piece in some])
    vectors = counts * (np.log(11 / (1 + (counts > 0).sum(0))) + 1)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    means = vectors.reshape(2, 5, 40).mean(1)
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    np.testing.assert_allclose(centroids.scores(pieces[0]), 1 - vectors[:5] @ means.T, atol=1e-6)
    latents = torch.cat([torch.randn(10, 2, 4) + 3, torch.randn(10, 2, 4) - 3])
    domains = torch.arange(2).repeat_interleave(10)
    assert (LatentProbe(latents, domains, steps=50).scores(latents).argmin(1) == domains.numpy()).all()


def test_nearest_border_and_its_setting():
    spans = [Span(0, 10, 0), Span(10, 20, 1), Span(20, 32, 0)]
    assert nearest_border(spans, 18, 32) == 2
    assert nearest_border(spans[:1], 18, 32) == 32
    costs = np.ones((3, 2, 64))
    costs[:, 0, 32:], costs[:, 1, :32] = 2.0, 2.0
    switch, smooth = tuned(costs, np.full((3, 1), 32))
    assert switch < 32 and smooth >= 1


def test_rejection_figures():
    assert rejection_auroc(np.array([0.0, 1.0]), np.array([2.0, 3.0])) == 1
    assert rejection_auroc(np.array([0.0, 1.0]), np.array([0.0, 1.0])) == 0.5
    assert false_accepts(np.arange(100.0), np.array([0.0, 50.0, 1000.0, 2000.0])) == 0.5
    assert macro(np.array([1.0, 1.0, 0.0]), np.array(["a", "a", "b"])) == 0.5


def test_confusion_rows_sum_to_one():
    records = [Record("python", str(i), 0, 0.0) for i in range(3)] + [Record("zh_tech", "z", 0, 0.0)]
    figures = Figures(TestWindows(np.zeros((4, 8)), records), ("python", "wiki_en"), 0, 10)
    shares = confusion(figures, np.array([0, 0, 1, 0, 0, 0, -1, -1]))
    assert shares["zh_tech"]["base"] == 1 and sum(shares["python"].values()) == pytest.approx(1)
    figures.accuracy("a", np.array([0, 0, 1, 0, 0, 0, -1, -1]))
    assert figures.found["a"] == pytest.approx(5 / 6) and figures.found["a.lo"] <= 5 / 6 <= figures.found["a.hi"]
