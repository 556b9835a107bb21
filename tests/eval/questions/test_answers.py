"""Prompts, what counts as right, and the stages of the questions."""

import argparse
import json

import numpy as np
import pytest
import torch

from eval.arms import Reader
from eval.questions import answers, prompts
from eval.questions.prompts import MADE, Question, build, is_right, load, save
from eval.statistics import clustered_interval
from hf_crouter.errors import InputError
from hf_crouter.hosts.loading import load_host

from ...tiny import tiny_host
from ...trained_crouter import make_tokenizer
from .test_retrieval import make_texts, write_data

LENGTH = 2048
SYSTEM = "<|im_start|>system\nYou answer.<|im_end|>\n"
TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}" + SYSTEM + "{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_passages():
    """Two questions a passage; every passage also holds the answer of another one's second question."""
    made = []
    for number, (text, [(question, _, _)]) in enumerate(make_texts()):
        text = f"{text} key{number} fits lock{number} beside lock{(number + 7) % 40}"
        made.append((text, [(question, text.index(f"answer{number}"), [f"answer{number}"]),
                            (f"what fits key{number}", text.index(f"lock{number}"), [f"lock{number}"])]))  # fmt: skip
    return made


@pytest.fixture(scope="module")
def texts():
    return make_passages()


@pytest.fixture(scope="module")
def tokenizer(texts):
    made = make_tokenizer(600, "".join(text for text, _ in texts))
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.chat_template = TEMPLATE
    return made


@pytest.fixture(scope="module")
def data(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("data")
    write_data(folder, texts)
    return folder


@pytest.fixture(scope="module")
def host(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("hosts") / "tiny-host"
    made = tiny_host(vocab_size=len(tokenizer), positions=4096)
    made.config.eos_token_id = made.generation_config.eos_token_id = tokenizer.eos_token_id
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name, count", [("xquad", 25), ("nq", 50)])
def test_prompts_hold_their_passage_and_no_other_answer(data, tokenizer, texts, name, count):
    made = build(data, name, tokenizer, LENGTH, count, seed=3)
    asked = {text[:60]: number for number, (text, _) in enumerate(texts)}
    system = tokenizer.encode(SYSTEM, add_special_tokens=False)
    assert len(made) == count
    for question in made:
        assert LENGTH - MADE - 512 <= len(question.ids) <= LENGTH - MADE
        assert question.ids[: question.prefix] == system
        text, number = tokenizer.decode(question.ids), asked[question.cluster]
        assert texts[number][0] in text and text.endswith("<|im_start|>assistant\n")
        there = [n for n, (passage, _) in enumerate(texts) if passage in text]
        assert len(there) > 5 and text.count("Question:") == 1
        holding = [n for n in there if any(f"{answer} " in f"{texts[n][0]} " for answer in question.answers)]
        assert holding == [number]
        assert any(f"Question: {q}?" in text and found == question.answers for q, _, found in texts[number][1])
    clusters = [question.cluster for question in made]
    different = min(count, 20 if name == "xquad" else 40)
    assert len({*clusters[:different]}) == different  # each passage once before a second time
    if name == "xquad":
        assert {asked[cluster] % 2 for cluster in clusters} == {1}  # on the even ones constants were chosen
        texts_of = [tokenizer.decode(question.ids) for question in made]
        assert any(texts[0][0] in text for text in texts_of)  # which fill prompts, though
    places = [tokenizer.decode(q.ids).index(texts[asked[q.cluster]][0]) / len(q.ids) for q in made]
    assert max(places) > 2 * min(places) + 1
    again = build(data, name, tokenizer, LENGTH, count, seed=3)
    assert again == made and build(data, name, tokenizer, LENGTH, count, seed=4) != made


def test_what_cannot_be_built_is_refused(data, tokenizer, tmp_path):
    with pytest.raises(InputError, match="expected a tokenizer with a chat template"):
        build(data, "nq", make_tokenizer(300), LENGTH, 1, 0)
    with pytest.raises(InputError, match="nq: expected passages for 65536 tokens"):
        build(data, "nq", tokenizer, 65_536, 1, 0)
    with pytest.raises(InputError, match="nq: expected passages for 100 tokens"):
        build(data, "nq", tokenizer, 100, 1, 0)  # the passage alone is longer
    with pytest.raises(InputError, match="no such file"):
        build(tmp_path, "nq", tokenizer, LENGTH, 1, 0)


@pytest.mark.parametrize(
    "said, answers, right",
    [
        ("It was Paris.", ["Paris"], True),
        ("paris", ["The PARIS"], True),
        ("in a city: the New-York, of course", ["new york"], True),
        ("Parisian", ["Paris"], False),  # whole words
        ("1990", ["199"], False),
        ("New old York", ["New York"], False),
        ("Rome", ["Paris", "Rome"], True),
        ("", ["Paris"], False),
        ("the a an", ["the"], False),  # an answer of articles alone is none
        ("anything", ["..."], False),
        ("42!", ["42"], True),
    ],
)
def test_right_answers(said, answers, right):
    assert is_right(said, answers) is right


def test_prompts_are_saved_for_every_reader(tmp_path, tokenizer):
    made = [Question([1, 2, 3], 2, ["x"], "c"), Question([4], 1, ["y", "z"], "d")]
    save(tmp_path / "nq.8k.json", made, tokenizer)
    found, about = load(tmp_path / "nq.8k.json")
    ids = tokenizer.convert_tokens_to_ids(["<|end|>", "<|im_start|>", "<|im_end|>"])
    assert found == made and about["stop_ids"] == sorted(ids) and about["max_new_tokens"] == MADE
    for text in ("{", "{}", '{"questions": [{"odd": 1}]}'):
        (tmp_path / "nq.8k.json").write_text(text)
        with pytest.raises(InputError, match="expected questions"):
            load(tmp_path / "nq.8k.json")
    with pytest.raises(InputError, match="expected questions"):
        load(tmp_path / "absent.json")


@pytest.mark.parametrize("arm", ["window", "full", "retrieve2", "retrieve2_copy", "compact32_retrieve2"])
def test_answers_are_what_score_calls_greedy(data, tokenizer, host, arm):
    made = [build(data, "nq", tokenizer, length, 1, seed=3)[0] for length in (LENGTH, LENGTH - 700)]
    assert len(made[0].ids) > len(made[1].ids) + 100  # so much padding
    loaded, _ = load_host(host)
    reader = Reader(loaded, tokenizer, window=256, keep_first="auto")
    both, slots = answers.answer(reader, arm, made)
    for question, ids, most in zip(made, both, slots, strict=True):
        alone, own = answers.answer(reader, arm, [question])
        ids = [n for n in ids if n != tokenizer.eos_token_id]
        assert alone[0][: len(ids)] == ids and own[0] <= most  # padding of a longer one is not read
        text = torch.tensor([[*question.ids, *ids]])
        history = reader.history(arm)
        if history is None:
            with torch.no_grad():
                right = loaded(text[:, :-1]).logits[0, -len(ids) :].argmax(-1).tolist()
            assert right == ids and most == max(len(q.ids) for q in made) + MADE - 1
            continue
        assert history.score(text, last=len(ids), greedy=True)[1].all()
        row = history.report(measure=False).rows[0]
        assert row.prefix == question.prefix  # the system turn stays raw
        assert row.prefix + 256 <= own[0] < row.prefix + 256 + 512 + MADE + 2 * 512
        history.detach()


def test_passages_are_read_before_the_question_is_known(data, host, tokenizer, monkeypatch):
    """Two questions about the same passages find the same pairs, made in the first call and not anew."""
    made = build(data, "nq", tokenizer, LENGTH, 1, seed=3)[0]
    at = answers.asked_at(made, tokenizer)
    assert tokenizer.decode(made.ids[at:]).startswith("Question: ")
    asked = tokenizer.encode("Question: and what else?", add_special_tokens=False)
    other = answers.Question([*made.ids[:at], *asked, *made.ids[-4:]], made.prefix, ["x"], "x")
    loaded, _ = load_host(host)
    reader = Reader(loaded, tokenizer, window=256, keep_first="auto")
    kept, generate = [], type(loaded).generate

    def seen(self, *args, **options):
        out = generate(self, *args, return_dict_in_generate=True, **{k: v for k, v in options.items()
                                                                     if k != "return_dict_in_generate"})  # fmt: skip
        cache = out.past_key_values
        kept.append((len(cache.rows[0].chunks), cache.rows[0].chunks[0].entries, cache.pairs_of_row(0, 0)[0].clone()))
        return out if "past_key_values" not in options else out.sequences

    monkeypatch.setattr(type(loaded), "generate", seen)
    for question in (made, other):
        answers.answer(reader, "compact32", [question])
    (count, first, pairs), (_, again, later), (_, _, others), _ = kept
    assert count >= 3 and first is again
    assert torch.equal(pairs, later[:, :, : pairs.shape[2]]) and torch.equal(pairs, others)


def test_a_prompt_without_a_question_is_refused(tokenizer):
    with pytest.raises(InputError, match="end with a question"):
        answers.asked_at(answers.Question([5, 6, 7], 0, ["x"], "x"), tokenizer)


@pytest.fixture
def run(data, host, tmp_path, monkeypatch):
    monkeypatch.setattr(prompts, "LENGTHS", {"2k": LENGTH})
    monkeypatch.setattr(answers, "LENGTHS", {"2k": LENGTH})
    monkeypatch.setenv("CROUTER_RESULTS", str(tmp_path))
    parser = argparse.ArgumentParser()
    answers.configure(parser)

    def run_stage(stage, *more):
        words = [stage, "--data", str(data), "--save", str(tmp_path), "--host", host, "--crouter", "none",
                 "--sets", "nq", "--questions", "5", *more]  # fmt: skip
        answers.run(parser.parse_args(words))

    return run_stage


def test_stages_go_on_where_they_were_and_peers_are_read(run, tmp_path, monkeypatch, tokenizer, capsys):
    run("prepare")
    questions, _ = load(tmp_path / "nq.2k.json")
    assert len(questions) == 5
    calls, answer = [], answers.answer

    def counted(reader, arm, some):
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append((arm, len(some)))
        return answer(reader, arm, some)

    monkeypatch.setattr(answers, "answer", counted)
    with pytest.raises(KeyboardInterrupt):
        run("collect", "--arms", "window", "full", "soft")
    assert "soft: left out, expected a crouter" in capsys.readouterr().out
    done = json.loads((tmp_path / "answers.nq.2k.ours.0of1.json").read_text())
    assert {entry["arm"] for entry in done} == {"window"} and len(done) == 5  # written arm by arm
    calls.clear()
    monkeypatch.setattr(answers, "answer", lambda *a: calls.append((a[1], len(a[2]))) or answer(*a))
    run("collect", "--arms", "window", "full")
    assert calls == [("full", 2), ("full", 2), ("full", 1)]
    calls.clear()
    run("collect", "--arms", "window", "full")
    assert not calls
    said = tokenizer.encode(f"it is {questions[3].answers[0]}!")
    theirs = [{"question": 3, "arm": "kvzip.at8", "ids": said, "slots": 70},
              {"question": 1, "arm": "kvzip.at8", "ids": said, "slots": 72}]  # fmt: skip
    (tmp_path / "questions.nq.2k.peers.0of1.json").write_text(json.dumps({"results": theirs}))
    run("report", "--device", "far away")
    result = json.loads((tmp_path / "questions-tiny-host.json").read_text())
    metrics = result["metrics"]
    assert metrics["nq.2k.full.questions"] == 5 and metrics["nq.2k.kvzip.at8.questions"] == 2
    assert metrics["nq.2k.kvzip.at8.accuracy"] == 0.5 and metrics["nq.2k.kvzip.at8.slots"] == 71
    assert "nq.2k.diff.window.full.lo" in metrics and result["device"] == "far away"
    assert metrics["nq.2k.window.slots"] < metrics["nq.2k.full.slots"] <= LENGTH


def test_shards_share_the_questions(run, tmp_path):
    run("prepare")
    for shard in ("0/2", "1/2"):
        run("collect", "--arms", "window", "--shard", shard)
    parts = [json.loads((tmp_path / f"answers.nq.2k.ours.{i}of2.json").read_text()) for i in range(2)]
    assert [[entry["number"] for entry in part] for part in parts] == [[0, 2, 4], [1, 3]]
    run("collect", "--arms", "window")  # once more, as one: the report would count answers twice
    with pytest.raises(InputError, match=r"nq.2k.window: question \d was answered twice"):
        run("report")


def test_missing_stages_are_refused(run, tmp_path):
    with pytest.raises(InputError, match="expected answers of the stage `collect`"):
        run("report")
    with pytest.raises(InputError, match="expected questions"):
        run("collect")
    with pytest.raises(InputError, match="expected --data FOLDER"):
        answers.run(argparse.Namespace(stage="prepare", data=None))


def test_accuracies_and_paired_differences(tokenizer):
    questions = [Question([1], 0, [f"w{n}"], f"c{n // 2}") for n in range(6)]

    def entries(arm, right, slots):
        return [{"number": n, "arm": arm, "ids": tokenizer.encode(f"w{n}" if hit else "no"), "slots": slots + n}
                for n, hit in right.items()]  # fmt: skip

    full, ours = {n: n != 2 for n in range(6)}, {0: True, 1: False, 2: True, 3: False}
    found = answers.accuracies("k", entries("full", full, 100) + entries("x", ours, 10), questions, tokenizer, 4)
    assert found["k.full.accuracy"] == pytest.approx(5 / 6) and found["k.x.accuracy"] == 0.5
    assert found["k.x.slots"] == 11.5 and found["k.x.questions"] == 4
    gaps = np.array([0.0, -1.0, 1.0, -1.0])  # on the questions that both answered
    expected = clustered_interval(lambda rows: gaps[rows].mean(), ["c0", "c0", "c1", "c1"], seed=4)
    assert [found[f"k.diff.x.full.{end}"] for end in ("mean", "lo", "hi")] == pytest.approx(expected)
    values = np.array([1.0, 0.0, 1.0, 0.0])
    share = clustered_interval(lambda rows: values[rows].mean(), ["c0", "c0", "c1", "c1"], seed=4)
    assert [found[f"k.x.{end}"] for end in ("accuracy", "lo", "hi")] == pytest.approx(share)
    assert not any("diff.full" in key for key in found)
    twice = entries("x", {0: True}, 1) + entries("x", {0: True}, 1)
    with pytest.raises(InputError, match="k.x: question 0 was answered twice"):
        answers.accuracies("k", twice, questions, tokenizer, 0)
