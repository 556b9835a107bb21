"""The reading experiments: what samples and metrics claim, and every part in miniature."""

import argparse
import json

import numpy as np
import pytest
import torch

from eval.documents import Record, Shape, Windows
from eval.reading import experiment as reading
from eval.reading import identifiers, lost_copies, manners, measures, next_lines
from eval.reading.bench import ARMS, PREFIX, Bench
from eval.reading.passkeys import (
    QUESTIONS,
    RECORDS,
    STATEMENTS,
    make_sample,
    make_samples,
    records,
    retrieval,
    summary,
    verdict,
)
from hf_crouter import SoftPrompts
from tests.tiny import CHUNK, tiny_crouter, tiny_host, tiny_projector
from tests.trained_crouter import TEXT, make_tokenizer

SHAPE = Shape(prefix=4, chunk=CHUNK, chunks=4, window=32, target=160)
LENGTH = SHAPE.split + SHAPE.target
CODE = "".join(f"name_{n} = call_{n % 5}(value_{n % 7}, 'text {n % 3}')\n" for n in range(600))


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    tokenizer = make_tokenizer(384, TEXT)
    host = tiny_host(positions=1024, vocab_size=len(tokenizer))
    crouter = tiny_crouter(vocab_size=len(tokenizer))
    ids = np.array(tokenizer.encode(CODE), np.uint16)
    sets = {}
    for name in ("young", "prose"):
        rows = np.stack([ids[n * 150 : n * 150 + LENGTH] for n in range(6)])
        found = [Record(f"{name}/{n}", f"{name}{n // 2}", "code", 0.0) for n in range(6)]
        sets[name] = Windows(rows, found, {})
    return Bench(
        host, tokenizer, crouter, sets, window=SHAPE.window, batch=4, save=tmp_path_factory.mktemp("samples"),
        soft_prompts=SoftPrompts(tiny_projector(host, crouter)),
    )  # fmt: skip


@pytest.fixture
def wide(bench):
    """With a window that a question of bytes fits in."""
    return Bench(bench.host, bench.tokenizer, bench.crouter, bench.sets, 256, 4, soft_prompts=bench.soft_prompts)


def arguments(folder, **changes):
    parser = argparse.ArgumentParser()
    reading.configure(parser)
    args = parser.parse_args(["--data", str(folder)])
    vars(args).update(
        {"lengths": [1024], "samples": 2, "documents": 4, "each": 1, "scored": 4, "free": 2, "tokens": 8, **changes}
    )
    return args


def test_wordings_ask_as_they_state():
    for task in STATEMENTS:
        assert len(STATEMENTS[task]) == len(QUESTIONS[task]) >= 6
        for statement, question in zip(STATEMENTS[task], QUESTIONS[task], strict=True):
            before = statement.split("{value}")[0].rstrip()
            assert question.endswith(before[before.index("{key}") :])
            assert statement.count("{key}") == statement.count("{value}") == 1


@pytest.mark.parametrize("task", ["passkey", "kv"])
def test_records_differ_and_some_nearly_match(task):
    for seed in range(20):
        found = records(task, np.random.default_rng(seed))
        keys, values = [key for key, _ in found], [value for _, value in found]
        assert len(found) == RECORDS[task][0] == len(set(keys)) == len(set(values))
        split = list if task == "passkey" else lambda key: key.split("-")
        near = sum(sum(a != b for a, b in zip(split(keys[0]), split(key), strict=True)) == 1 for key in keys[1:])
        assert near >= RECORDS[task][1]
        assert len({len(v.split("-")) for v in values}) == 1


@pytest.mark.parametrize("task", ["passkey", "kv", "passkey_paraphrased", "kv_paraphrased"])
def test_samples_have_what_they_claim(wide, task):
    length = 1500
    for sample in make_samples(wide, task, length, 6):
        assert sample.ids.shape == (length,)
        assert sample.compressed == PREFIX + CHUNK * ((length - 256 - PREFIX) // CHUNK)
        assert len(sample.spans) == 1 + len(sample.others) and 0 <= sample.depth < 1
        for (key, value), (start, end) in zip([(sample.key, sample.value), *sample.others], sample.spans, strict=True):
            assert start >= PREFIX and end <= sample.compressed
            text = wide.text(sample.ids[start:end])
            assert key in text and value in text
        assert wide.text(sample.ids[-200:]).count(sample.key) and sample.value not in wide.text(sample.ids[-200:])
        assert wide.text(sample.answer) == f" {sample.value}"
        assert sample.aligned or task.endswith("paraphrased")
        assert (sample.statement == sample.question) != task.endswith("paraphrased")


def test_depths_cover_the_compressed_part(wide):
    depths = [sample.depth for sample in make_samples(wide, "passkey", 2500, 40)]
    assert min(depths) < 0.25 and max(depths) > 0.7


def test_too_short_a_prompt_is_refused(wide):
    with pytest.raises(ValueError, match="too few"):
        make_sample(wide, "kv", wide.sets["young"].ids[0], 300, np.random.default_rng(0))


def test_verdicts(wide):
    sample = make_samples(wide, "passkey", 1500, 1)[0]
    others = [wide.encode(f" {value}") for _, value in sample.others]
    assert verdict(sample, [*sample.answer, 7], others) == "right"
    assert verdict(sample, others[1], others) == "distractor"
    assert verdict(sample, sample.answer[:-1], others) == "wrong"
    metrics = summary("kv.32k", "soft_retrieve2_copy", [sample] * 4, ["right", "wrong", "right", "distractor"], 0)
    assert metrics["kv.32k.accuracy"] == metrics["kv.32k.soft_retrieve2_copy.accuracy"] == 0.5
    assert metrics["kv.32k.soft_retrieve2_copy.distractor"] == 0.25
    assert metrics["kv.32k.accuracy.lo"] <= 0.5 <= metrics["kv.32k.accuracy.hi"]


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


def test_auroc():
    values, labels = np.array([0.1, 0.2, 0.3, 0.4]), np.array([0, 0, 1, 1])
    assert lost_copies.auroc(values, labels) == 1
    assert lost_copies.auroc(values, 1 - labels) == 0
    assert lost_copies.auroc(np.ones(4), labels) == 0.5
    assert np.isnan(lost_copies.auroc(values, np.ones(4)))


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


def test_near_matches_have_a_stale_record(wide):
    hay = np.tile(wide.sets["young"].ids[0].astype(np.int64), 12)
    for form in manners.FORMS:
        sample = manners.near_match(wide, hay, 1400, form, np.random.default_rng(1))
        assert sample.ids.shape == (1400,) and sample.answer != sample.stale
        start, end = sample.record
        assert start >= PREFIX and end <= wide.compressed_end(1400)
        assert wide.text(sample.stale).strip() in wide.text(sample.ids[start:end])
        text = wide.text(sample.ids[-250:])
        assert wide.text(sample.answer).strip() in text and wide.text(sample.stale).strip() not in text


def test_forced_losses_are_those_of_score(bench):
    ids = bench.sets["young"].ids[:2].astype(np.int64)
    steps = 6
    forced = manners.Forced(ids[:, SHAPE.split : SHAPE.split + steps], SHAPE.split)
    made = bench.generate("copy", ids[:, : SHAPE.split], steps, [forced])
    assert (made == ids[:, SHAPE.split : SHAPE.split + steps]).all()
    history = bench.history("copy")
    wanted = -history.score(torch.from_numpy(ids[:, : SHAPE.split + steps]), last=steps).numpy()
    history.detach()
    np.testing.assert_allclose(forced.losses[0], wanted, atol=1e-4)


@pytest.mark.parametrize("arm", ["full", *ARMS])
def test_every_arm_generates_and_scores(bench, arm):
    ids = bench.sets["young"].ids[:2]
    assert bench.generate(arm, ids[:, : SHAPE.split], 3).shape == (2, 3)
    assert bench.greedy(arm, ids, 5).shape == (2, 5)


def test_retrieval_runs(wide, tmp_path):
    wide.save = tmp_path
    metrics = retrieval(wide, "passkey", [1024], ["full", "window", "copy"], 2, {"window": 512})
    assert {"passkey.1k.full.accuracy", "passkey.1k.copy.accuracy"} <= metrics.keys()
    assert not any("window" in key for key in metrics)
    assert len((tmp_path / "passkey.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize("part", ["nextline", "identifiers", "residual"])
def test_parts_run(bench, tmp_path, monkeypatch, part):
    monkeypatch.setattr(next_lines, "MADE", 40)
    metrics = reading.parts(bench, arguments(tmp_path, parts=[part], documents=2), SHAPE)[part]()
    assert all(key.startswith(part) for key in metrics)
    if part == "nextline":
        assert {
            "nextline.soft_retrieve2_copy.exact",
            "nextline.full.edit",
            "nextline.soft_retrieve2_copy_minus_window.lo",
        } <= metrics.keys()
    if part == "identifiers":
        assert {
            f"identifiers.{arm}.accuracy" for arm in ("full", "window", "soft", "copy", "soft_retrieve2_copy")
        } <= metrics.keys()


def test_manners_run(wide, tmp_path):
    args = arguments(tmp_path, lengths=[1000])
    found = manners.near_matches(wide, ["window", "copy"], args.lengths[0], 2)
    assert {"manners.near.copy.wrong_copied", "manners.near.window.right"} <= found.keys()


def test_free_generation_runs(bench):
    found = manners.temperatures(bench, SHAPE, ["window", "copy"], 2)
    assert "manners.temperature.young.t50.copy.minus_window.lo" in found
    found = manners.drafts(bench, SHAPE, ["copy"], 2, 8, ahead=4)
    assert found["drafts.copy.same"] == 1.0 <= found["drafts.copy.tokens_a_step"] and found["drafts.prompts"] > 0
    found = manners.loops(bench, SHAPE, ["window", "copy_generated"], 2, 8)
    assert "manners.loops.copy_generated.repetition" in found


def test_parts_are_merged_within_a_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("CROUTER_RESULTS", str(tmp_path))
    monkeypatch.setenv("CROUTER_COMMIT", "one")
    args = arguments(tmp_path)
    reading.write_part(args, "kv", {"kv.a": 1.0, "kv.b": 1.0})
    reading.write_part(args, "nextline", {"nextline.a": 1.0})
    result = json.loads(reading.write_part(args, "kv", {"kv.a": 2.0}).read_text())
    assert result["metrics"] == {"nextline.a": 1.0, "kv.a": 2.0}
    assert set(result["config"]["parts"]) == {"kv", "nextline"}
    monkeypatch.setenv("CROUTER_COMMIT", "two")
    result = json.loads(reading.write_part(args, "kv", {"kv.a": 3.0}).read_text())
    assert result["metrics"] == {"kv.a": 3.0}
