import argparse
import gzip
import json

import numpy as np
import pytest
from tokenizers import Tokenizer

from eval.questions import retrieval
from eval.questions.retrieval import ASKED, passages, prompts
from eval.rows import Shape
from hf_crouter.crouter.loading import shipped_crouter
from hf_crouter.data.tokens import plain_tokenizer
from hf_crouter.errors import InputError

WORDS = [f"{a}{b}" for a in ("am", "ba", "ca", "do") for b in ("ber", "sket", "ndle")]


@pytest.fixture(scope="module")
def tokenizer():
    return plain_tokenizer(Tokenizer.from_file(str(shipped_crouter() / "tokenizer.json")))


def make_texts():
    """Forty passages of 150 words, each with one question."""
    rng = np.random.default_rng(0)
    made = []
    for number in range(40):
        words = rng.choice(WORDS, 150).tolist()
        words[100] = f"vault{number} holds answer{number}"
        text = " ".join(words)
        made.append(
            (text, [(f"what holds vault{number}", text.index(f"answer{number}"), ["nowhere", f"answer{number}"])])
        )
    return made


def write_data(folder, texts):
    """Both sets, of the same passages."""
    nq = [{"question": f"{q}?", "answers": answers, "ctxs": [{"text": text}]}
          for text, asked in texts for q, _, answers in asked]  # fmt: skip
    xquad = []
    for text, asked in texts:
        qas = [{"question": f"{q}?", "answers": answers, "starts": [place]} for q, place, answers in asked]
        xquad.append({"lang": "en", "context": text, "qas": qas})
    absent = {"question": "x", "answers": ["absent"], "ctxs": [{"text": "y"}]}
    rows = {"eval_nq_oracle/nq_open_oracle.jsonl.gz": [*nq, absent],
            "eval_xquad/xquad.jsonl.gz": [*xquad, {"lang": "de", "context": "z", "qas": []}]}  # fmt: skip
    for name, lines in rows.items():
        (folder / name).parent.mkdir()
        with gzip.open(folder / name, "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)


@pytest.fixture(scope="module")
def texts():
    return make_texts()


def test_the_answer_stands_in_the_chunk_that_is_named(texts, tokenizer):
    found = list(prompts(texts, tokenizer, 4, 0, 1, seed=0))
    assert len(found) > 20
    for past, recent, where, number in found:
        assert past.shape == (4, Shape.chunk) and len(recent) <= retrieval.QUERY
        ahead, _, question = tokenizer.decode(recent.tolist()).rpartition("\n\nQuestion:")
        assert question == ASKED.format(question=f"what holds vault{number}").partition(":")[2]
        around = tokenizer.decode(
            past.ravel()[max(0, where * Shape.chunk - 8) : (where + 1) * Shape.chunk + 8].tolist()
        )
        assert f"answer{number}" in around and f"answer{number} " not in ahead
    assert {number % 2 for *_, number in prompts(texts, tokenizer, 4, 1, 2, seed=0)} == {1}


def test_passages_and_result(tmp_path, monkeypatch, texts):
    with pytest.raises(InputError, match="no such file"):
        passages(tmp_path, "xquad")

    write_data(tmp_path, texts)
    assert passages(tmp_path, "nq_oracle") == passages(tmp_path, "xquad") == texts
    monkeypatch.setenv("CROUTER_RESULTS", str(tmp_path))
    parser = argparse.ArgumentParser()
    retrieval.configure(parser)
    retrieval.run(parser.parse_args(["--data", str(tmp_path), "--chunks", "4"]))
    metrics = json.loads((tmp_path / "retrieval-questions.json").read_text())["metrics"]
    assert metrics["nq.4.overlap.k2.found"] > 0.9 > metrics["nq.4.random.k2.found"]
    assert metrics["nq.4.overlap.k1.found.lo"] <= metrics["nq.4.overlap.k1.found"] <= metrics["nq.4.overlap.k2.found"]
