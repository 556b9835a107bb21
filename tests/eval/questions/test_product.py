"""The measured choice of chunks and the measured modes are the product's."""

import itertools

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from eval.arms import ARMS
from eval.questions import ruler
from eval.questions.retrieval import SCORERS, prompts
from eval.rows import Shape
from hf_crouter import CompressedHistory, Retrieve
from hf_crouter.crouter.loading import shipped_crouter
from hf_crouter.data.tokens import plain_tokenizer
from hf_crouter.modes import modes_from_options
from hf_crouter.ngram.postings import ChunkIndex
from hf_crouter.ngram.scorers import top_k
from tests.tiny import tiny_host

from .test_retrieval import make_texts


@pytest.fixture(scope="module")
def host():
    return tiny_host(vocab_size=49_152, positions=4096)


@pytest.mark.parametrize("scorer", [None, *SCORERS])
def test_a_history_retrieves_the_chunks_that_are_counted(host, scorer):
    tokenizer = plain_tokenizer(Tokenizer.from_file(str(shipped_crouter() / "tokenizer.json")))
    of = SCORERS["overlap" if scorer is None else scorer](0)  # the default, where none is named
    choices = []
    for past, recent, _, _ in itertools.islice(prompts(make_texts(), tokenizer, 4, 0, 1, seed=0), 4):
        recent = recent[-Shape.chunk + 1 :]  # one token more is scored: no fifth chunk
        expected = top_k(of.scores(ChunkIndex().extended(*past), recent), 2).tolist()
        mode = Retrieve(2) if scorer is None else Retrieve(2, scorer=of)
        history = CompressedHistory(host, modes=[mode], window=len(recent), keep_first=0)
        row = np.concatenate([past.ravel(), recent, [5]])
        history.score(torch.from_numpy(row)[None], last=1)
        found = history.report(measure=False).retrievals
        history.detach()
        assert len(found) == 2
        if scorer != "random":  # it draws by all the tokens that it is given
            assert [record.chunk for record in found] == expected
        choices.append(expected)
    assert len({tuple(choice) for choice in choices}) > 1 or scorer == "last"


@pytest.mark.parametrize("arm", [arm for arm in ruler.ARMS if ARMS[arm].modes is not None])
def test_arms_of_one_name_are_the_same_modes(arm):
    modes, rest = modes_from_options(ruler.ARMS[arm])
    wanted = ARMS[arm].modes
    assert not rest and (modes == wanted if "auto" in (modes, wanted) else
                         {type(mode): mode for mode in modes} == {type(mode): mode for mode in wanted})  # fmt: skip
