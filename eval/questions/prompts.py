"""Questions over long texts: prompts in a host's chat template, and whether an answer was found.

`xquad`: the English paragraphs of XQuAD; `nq`: Natural Questions, each with one passage that answers it. A prompt is
`[system turn | passages, the answer's among them | question]`, as long as its name says.
"""

from __future__ import annotations

import itertools
import json
import re
import string
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval.questions.retrieval import passages
from eval.rows import place
from hf_crouter.cache.prefix import FirstTurn
from hf_crouter.errors import InputError
from hf_crouter.hosts.tokenizers import special_ids
from hf_crouter.utils.io import replaced_file

SETS = {"xquad": "xquad", "nq": "nq_oracle"}
LENGTHS = {"8k": 8192, "16k": 16384}
MADE = 16  # tokens of an answer
ASK = "Read the passages and answer the question with a few words from them.\n\n{passages}\n\nQuestion: {question}?"


@dataclass(frozen=True)
class Question:
    """One prompt.

    Attributes:
        ids: of the whole prompt, chat template and all.
        prefix: raw tokens at its start, the system turn.
        answers: any of them is right.
        cluster: what is drawn together in a bootstrap: the passage.
    """

    ids: list[int]
    prefix: int
    answers: list[str]
    cluster: str


def build(data: Path, name: str, tokenizer: Any, length: int, count: int, seed: int) -> list[Question]:
    """Prompts of at most `length` tokens, each about another passage where there are enough.

    Args:
        data: folder with eval_xquad and eval_nq_oracle.
        name: of `SETS`.
        tokenizer: of the host, with a chat template.
        length: tokens of a prompt with its answer.
        count: prompts.
        seed: of everything random.

    Raises:
        InputError: no such data, no chat template, or passages that do not fill a prompt.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(f"questions: expected a tokenizer with a chat template, got {type(tokenizer).__name__}")
    texts = passages(data, SETS[name])
    if name == "xquad":
        texts, rest = texts[1::2], texts[::2]  # on the even ones the retriever's constants were chosen
    else:
        rest = []
    asked = {text: sorted(questions, key=lambda asked: place(seed, asked[0])) for text, questions in texts}
    known = sorted([*asked, *(text for text, _ in rest)], key=lambda text: place(seed, text))
    sizes = {text: len(tokenizer.encode(f"\n\n{text}", add_special_tokens=False)) for text in known}
    turns = itertools.zip_longest(*(asked[text] for text in known if text in asked))
    order = [(text, one) for turn in turns for text, one in zip(filter(asked.get, known), turn, strict=True) if one]
    prefix, made = FirstTurn(tokenizer), []
    for number, (text, (question, _, answers)) in enumerate(order[:count]):
        generator = np.random.default_rng([seed, number, length])
        others = [known[i] for i in generator.permutation(len(known)) if known[i] != text]
        room, chosen = length - MADE - len(_ids(tokenizer, question, [text])), [text]
        for other in others:
            # an answer that stands elsewhere too would make another passage do
            if sizes[other] <= room and not any(_holds(other, answer) for answer in answers):
                chosen.append(other)
                room -= sizes[other]
        if not 0 <= room <= 512:
            raise InputError(f"{name}: expected passages for {length} tokens, got them with {room} left")
        places = generator.permutation(len(chosen))
        ids = _ids(tokenizer, question, [chosen[i] for i in places])
        made.append(Question(ids, prefix(ids), answers, text[:60]))
    return made


def _ids(tokenizer: Any, question: str, texts: Sequence[str]) -> list[int]:
    turn = {"role": "user", "content": ASK.format(passages="\n\n".join(texts), question=question)}
    return tokenizer.apply_chat_template([turn], add_generation_prompt=True, tokenize=True, return_dict=False)


def asked_at(question: Question, tokenizer: Any) -> int:
    """Tokens of a prompt before the question.

    Raises:
        InputError: the prompt holds no question as `build` writes them, or was made with another tokenizer.
    """
    mark = tokenizer.encode("Question:", add_special_tokens=False)
    for at in range(len(question.ids) - len(mark), 0, -1):
        if question.ids[at : at + len(mark)] == mark:
            return at
    raise InputError("questions: expected prompts of this host's tokenizer that end with a question, got one without")


def _plain(text: str) -> str:
    words = re.sub(rf"[{re.escape(string.punctuation)}]", " ", text.lower()).split()
    return f" {' '.join(word for word in words if word not in ('a', 'an', 'the'))} "


def _holds(text: str, answer: str) -> bool:
    return _plain(answer).strip() != "" and _plain(answer) in _plain(text)


def is_right(said: str, answers: Sequence[str]) -> bool:
    """Whether one of the answers stands in what was said: whole words, without case, punctuation and articles."""
    return any(_holds(said, answer) for answer in answers)


def save(path: Path, questions: Sequence[Question], tokenizer: Any, window: int = 512) -> None:
    """Writes prompts and what a reader of them must know, for `eval.questions.answers` and `eval.peers`."""
    about = {"chunk": 512, "window": window, "max_new_tokens": MADE, "stop_ids": sorted(special_ids(tokenizer, None))}
    with replaced_file(path) as temporary:  # without indentation: the ids would each stand on a line
        temporary.write_text(json.dumps({**about, "questions": [asdict(question) for question in questions]}))


def load(path: Path) -> tuple[list[Question], dict[str, Any]]:
    """Prompts and what else `save` noted.

    Raises:
        InputError: no such file, or another format.
    """
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        questions = [Question(**question) for question in about.pop("questions")]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: expected questions (eval.run questions prepare), got {error!r}") from error
    return questions, about
