import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from eval import budget_texts
from hf_crouter.data.documents import Document
from hf_crouter.data.tokens import TokenArray, encode_documents
from hf_crouter.training.budgets import WindowShape, document_windows


def word_tokenizer(more=0):
    words = ["<end>", "alpha", "beta", "gamma", "delta", *(f"w{n}" for n in range(more))]
    tokenizer = Tokenizer(WordLevel({word: n for n, word in enumerate(words)}, unk_token="<end>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture
def made(tmp_path, monkeypatch):
    tokenizer = word_tokenizer()
    code = [Document(f"package/{n}.py", "package", "alpha beta gamma " * 60) for n in range(5)]
    (tmp_path / "code").mkdir()
    encode_documents(code, tokenizer, separator_id=0, workers=1).save(tmp_path / "code" / "train.safetensors")

    def records(folder, domain, part):
        assert part == "train"
        for number in range(4):
            yield Document(f"{domain}/{number}", domain, "delta " * (20 if number == 1 else 200))

    monkeypatch.setattr(budget_texts, "records_of", records)
    monkeypatch.setattr(budget_texts, "resolve_host", lambda name: name)
    monkeypatch.setattr(budget_texts, "load_host_tokenizer", lambda name: (None, tokenizer))
    monkeypatch.setattr(budget_texts, "LEAST", 300)
    monkeypatch.setattr(budget_texts, "EACH", 2)
    words = ["--code", str(tmp_path / "code"), "--data", "texts", "--out", str(tmp_path / "out")]
    return words, tmp_path / "out" / "train.safetensors"


def test_half_is_code_and_half_is_prose(made):
    words, path = made
    assert budget_texts.main(words) == 0
    tokens = TokenArray.load(path)
    assert [name for name in tokens.names if name.startswith("package/")] == [f"package/{n}.py" for n in range(5)]
    # two long documents of each domain; the short one is passed over
    assert [name for name in tokens.names if "/" in name][5:] == [
        f"{domain}/{number}" for domain in budget_texts.PROSE for number in (0, 2)
    ]
    assert set(tokens.groups) == {"code", "prose"}
    windows = document_windows(tokens, WindowShape(prefix=1, chunk=4, chunks=2, window=4, target=4), 6, seed=0)
    of_code = np.isin(windows, tokens.ids[: tokens.starts[1] - 1]).all(1)
    assert of_code.sum() == 3, "drawn in turn"


def test_tokens_of_another_host_are_refused(made, monkeypatch, capsys):
    words, path = made
    monkeypatch.setattr(budget_texts, "load_host_tokenizer", lambda name: (None, word_tokenizer(more=3)))
    assert budget_texts.main(words) == 2
    error = capsys.readouterr().err
    assert "--code: expected tokens of" in error and error.count("\n") == 1 and not path.exists()
