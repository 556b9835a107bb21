"""lm-evaluation-harness on tiny models: the same as `hf` where nothing is compressed, the same as the history else."""

import logging

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from hf_crouter.cache.capacity import capacity
from hf_crouter.crouter.loading import load_crouter
from hf_crouter.errors import CapacityError, InputError
from hf_crouter.hosts.loading import load_host

from ..tiny import make_history, prompt, tiny_crouter, tiny_host, tiny_projector
from ..trained_crouter import TEXT, make_tokenizer, trained_crouter

pytest.importorskip("lm_eval", reason='lm_eval is not installed: pip install -e ".[lm-eval]"')

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

from hf_crouter.integrations.lm_eval import NO_LIMIT, CompressedHFLM, _batches, _Row  # noqa: E402

WINDOW, CHUNK = 16, 16
LONG = TEXT[:400]
SHORT = ["import json", "def f(x):\n    return x", "a"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of a host, with a tokenizer that pads, and of a crouter with a projector for it."""
    folder = tmp_path_factory.mktemp("harness")
    tokenizer: PreTrainedTokenizerFast = make_tokenizer()
    host = tiny_host(vocab_size=len(tokenizer), positions=300)
    host.config.eos_token_id = host.generation_config.eos_token_id = tokenizer.eos_token_id
    host.save_pretrained(folder / "host")
    tokenizer.save_pretrained(folder / "host")
    crouter, crouter_tokenizer = load_crouter(trained_crouter())
    host, tokenizer = load_host(folder / "host")
    projector = tiny_projector(host, crouter, host_tokenizer=tokenizer, crouter_tokenizer=crouter_tokenizer)
    projector.save(folder / "projector")
    return str(folder / "host"), str(trained_crouter()), str(folder / "projector")


@pytest.fixture(scope="module")
def ours(folders):
    return make(folders)


@pytest.fixture(scope="module")
def plain(folders):
    return HFLM(folders[0], device="cpu", batch_size=2)


def make(folders, **options):
    host, crouter, projector = folders
    options = {
        "crouter": crouter,
        "soft_prompts": projector,
        "copy": True,
        "window": WINDOW,
        "batch_size": 2,
        **options,
    }
    return CompressedHFLM(host, device="cpu", **options)


def requests(kind, *arguments):
    return [Instance(kind, {}, words, i) for i, words in enumerate(arguments)]


def ask(lm, kind, *arguments):
    return getattr(lm, kind)(requests(kind, *arguments), disable_tqdm=True)


class TestNothingCompressed:
    def test_scores_are_bit_identical(self, ours, plain):
        pairs = [(context, " return None") for context in ("", *SHORT)] + [("import", " a"), ("import", "b")]
        assert ask(ours, "loglikelihood", *pairs) == ask(plain, "loglikelihood", *pairs)

    def test_rolling_is_bit_identical(self, ours, plain):
        texts = [(text,) for text in SHORT]
        assert ask(ours, "loglikelihood_rolling", *texts) == ask(plain, "loglikelihood_rolling", *texts)

    def test_generations_are_identical(self, ours, plain):
        options = {"until": ["zzz"], "max_gen_toks": 8}
        prompts = [(text, options) for text in SHORT]
        found = ask(ours, "generate_until", *prompts)
        assert found == ask(plain, "generate_until", *prompts) and all(found)

    def test_short_ones_among_long_ones(self, ours, plain):
        pairs = [(LONG, " a"), (SHORT[0], " b"), (LONG[20:], " c"), (SHORT[1], " d")]
        found = ask(ours, "loglikelihood", *pairs)
        assert [found[1], found[3]] == ask(plain, "loglikelihood", pairs[1], pairs[3])
        assert found[0] == pytest.approx(ask(ours, "loglikelihood", pairs[0])[0], abs=1e-4)


class TestCompressed:
    def test_a_long_prompt_scores_as_the_history_does(self, ours):
        answer, = ask(ours, "loglikelihood", (LONG, TEXT[400:440]))  # fmt: skip
        context, continuation = ours._encode_pair(LONG, TEXT[400:440])
        expected = ours.history.score(torch.tensor([context + continuation]), len(continuation))
        assert ours.history.report(measure=False).chunks
        assert answer == (float(expected.sum()), False)

    def test_a_batch_of_unequal_ones_scores_as_one_by_one(self, ours):
        pairs = [(LONG, " a"), (LONG[:200], TEXT[200:300]), (LONG[50:], TEXT[:20]), (LONG[5:], " b")]
        one_by_one = [ask(ours, "loglikelihood", pair)[0] for pair in pairs]
        together = ask(ours, "loglikelihood", *pairs)
        assert [score for score, _ in together] == pytest.approx([score for score, _ in one_by_one], abs=1e-3)
        assert [best for _, best in together] == [best for _, best in one_by_one]

    def test_what_greedy_decoding_says_is_greedy(self, ours):
        ids = torch.tensor([ours.tok_encode(LONG)])
        out = ours.model.generate(ids, max_new_tokens=6, do_sample=False, logits_processor=[ours.history])
        new = out[0, ids.shape[1] :].tolist()
        assert ours._loglikelihood_tokens([(None, ids[0].tolist(), new)], disable_tqdm=True)[0][1]
        new[3] = (new[3] + 1) % 300
        assert not ours._loglikelihood_tokens([(None, ids[0].tolist(), new)], disable_tqdm=True)[0][1]

    def test_generation_equals_the_host_s_with_the_history(self, ours):
        found = ask(ours, "generate_until", *[(text, {"until": [], "max_gen_toks": 12}) for text in (LONG, SHORT[0])])
        for text, words in zip((LONG, SHORT[0]), found, strict=True):
            ids = torch.tensor([ours.tok_encode(text)])
            out = ours.model.generate(ids, max_new_tokens=12, do_sample=False, logits_processor=[ours.history])
            assert words == ours.tok_decode(out[0, ids.shape[1] :])

    def test_the_past_makes_a_difference(self, ours, plain):
        words = (LONG, {"until": [], "max_gen_toks": 12})
        assert ask(ours, "generate_until", words) != ask(plain, "generate_until", words)

    def test_rolling_is_the_sum_of_its_tokens(self, ours):
        ids = ours.tok_encode(LONG)
        expected = ours.history.score(
            torch.tensor([[ours.prefix_token_id, *ids]]), len(ids), archive_scored=True
        ).sum()
        assert ask(ours, "loglikelihood_rolling", (LONG,)) == [float(expected)]

    def test_rolling_in_several_windows(self, folders):
        lm = make(folders, max_length=70)
        ids = lm.tok_encode(LONG)
        assert 140 < len(ids) < 210
        parts = [[lm.prefix_token_id, *ids[:70]], ids[69:140], ids[-71:]]
        lasts = [70, 70, len(ids) - 140]
        expected = sum(
            lm.history.score(torch.tensor([p]), n, archive_scored=True).sum()
            for p, n in zip(parts, lasts, strict=True)
        )
        assert ask(lm, "loglikelihood_rolling", (LONG,))[0] == pytest.approx(float(expected), abs=1e-3)

    @pytest.mark.parametrize("soft", ["none", False])
    def test_without_soft_prompts(self, folders, soft):
        options = {"crouter": "none"} if soft == "none" else {}
        lm = make(folders, keep_first=0, soft_prompts=None, **options)
        # without a crouter chunks are of 512 tokens, more than the positions of this host
        assert lm.max_length == (300 if soft == "none" else NO_LIMIT) and lm.history.policy.compressor is None
        assert torch.isfinite(torch.tensor(ask(lm, "loglikelihood", (LONG, " a"))[0][0]))


def test_max_length_is_what_fits(ours):
    positions, latents, prefix = 300, 2, 4
    raw = prefix + WINDOW + CHUNK - 1
    assert ours.max_length == raw + (positions - raw) // latents * CHUNK
    ids = torch.randint(1, 300, (1, ours.max_length + CHUNK + 1))
    assert torch.isfinite(ours.history.score(ids[:, :-CHUNK], 1)).all()
    with pytest.raises(CapacityError, match=f"at most {ours.max_length} tokens"):
        ours.history.score(ids, 1)


def test_a_system_turn_has_room(folders):
    lm = make(folders)
    lm.history.policy.prefix.closing = [1, 2]
    assert lm.max_length == capacity(lm.history.host, lm.history.policy, 512) < make(folders).max_length


def test_too_long_is_cut_at_the_left_with_a_warning(folders, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("lm_eval"), "propagate", True)
    lm = make(folders, max_length=100)
    found = ask(lm, "loglikelihood", (LONG, " a"))
    assert "is cut at the left to the 101 that fit" in caplog.text
    context, continuation = lm._encode_pair(LONG, " a")
    ids = (context + continuation)[-101:]
    assert found[0][0] == float(lm.history.score(torch.tensor([ids]), len(continuation)).sum())
    words = ask(lm, "generate_until", (LONG, {"until": [], "max_gen_toks": 10}))
    assert "Left truncation applied" in caplog.text
    out = lm.model.generate(
        torch.tensor([lm.tok_encode(LONG)[-90:]]), max_new_tokens=10, do_sample=False, logits_processor=[lm.history]
    )
    assert words == [lm.tok_decode(out[0, 90:])]
    with pytest.raises(InputError, match="at most 100 tokens"):
        lm._loglikelihood_tokens([(None, [1], [2] * 101)])


@pytest.mark.parametrize("size", ["auto", "auto:4"])
def test_automatic_batch_sizes_are_refused(folders, size):
    with pytest.raises(InputError, match="batch_size: expected a number, got auto"):
        make(folders, batch_size=size)


def test_a_folder_that_is_no_host(tmp_path):
    with pytest.raises(InputError, match="cannot be read as a host"):
        CompressedHFLM(str(tmp_path), device="cpu")


def test_rows_of_a_batch_are_longer_than_its_continuations():
    rows = [_Row(i, [0] * length, last) for i, (length, last) in enumerate([(9, 8), (3, 1), (8, 7), (20, 1), (9, 2)])]
    found = list(_batches(rows, 2))
    assert sorted(row.index for batch in found for row in batch) == list(range(5))
    for batch in found:
        assert len(batch) <= 2 and max(row.last for row in batch) < min(len(row.ids) for row in batch)


def test_score_tells_what_greedy_decoding_chooses():
    host, crouter = tiny_host(), tiny_crouter()
    history = make_history(host, crouter, window=8, keep_first=3)
    ids, mask = prompt(70, 33)
    out = host.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False, logits_processor=[history])
    mask = torch.cat([mask, torch.ones(2, 9, dtype=torch.long)], 1)
    scores, best = history.score(out, 20, mask, greedy=True)
    assert torch.equal(scores, history.score(out, 20, mask))
    assert best[:, -9:].all() and not best.all()
