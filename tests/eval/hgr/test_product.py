"""What is measured is the product: every arm against `CompressedHistory.score`, or the plain host, called by hand."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from eval.arms import ARMS, Reader
from eval.hgr.measure import exists, partners, read
from eval.hgr.stand_ins import OtherPrompts
from eval.rows import Shape
from hf_crouter import Compact, CompressedHistory, Copy, Retrieve, SoftPrompts
from hf_crouter.errors import InputError
from hf_crouter.hosts.tokenizers import special_ids
from hf_crouter.ngram.archive import Archive
from hf_crouter.ngram.candidates import Evidence, collect
from hf_crouter.ngram.gate import Gate, general_gate
from hf_crouter.ngram.mixture import mix
from hf_crouter.ngram.raw_text import RawText
from hf_crouter.ngram.scorers import Bm25Scorer, RandomScorer, RecencyScorer

from ..tiny_world import CHUNK, SHAPE, make_rows, slots_of, world

COUNTS = (3, 9)
FITTED = world().gate
HISTORIES = {  # modes as a user writes them, and the slots that they take
    "window": ([], {}),
    "copy": ([Copy()], {}),
    "retrieve2": ([Retrieve(2)], {"retrieved": 2}),
    "retrieve2_copy": ([Retrieve(2), Copy()], {"retrieved": 2}),
    "retrieve4": ([Retrieve(4)], {"retrieved": 4}),
    "copy_fitted": ([Copy(gate=FITTED)], {}),
    "retrieve2_copy_fitted": ([Retrieve(2), Copy(gate=FITTED)], {"retrieved": 2}),
    "soft": ([SoftPrompts()], {"soft": True}),
    "retrieve8": ([Retrieve(8)], {"retrieved": 8}),
    "retrieve4_copy": ([Retrieve(4), Copy()], {"retrieved": 4}),
    "retrieve4_copy_fitted": ([Retrieve(4), Copy(gate=FITTED)], {"retrieved": 4}),
    "copy_general": ([Copy(gate=general_gate())], {}),
    "copy_rebuilt": ([Copy(source="rebuilt")], {}),
    "longer_same_slots_retrieve2_copy": ([Copy()], {"extra": 1024}),
    "retrieve2_last": ([Retrieve(2, scorer=RecencyScorer())], {"retrieved": 2}),
    "retrieve2_bm25": ([Retrieve(2, scorer=Bm25Scorer())], {"retrieved": 2}),
    "retrieve2_random": ([Retrieve(2, scorer=RandomScorer(0))], {"retrieved": 2}),
    "soft_copy": ([SoftPrompts(), Copy()], {"soft": True}),
    "soft_retrieve2_copy": ([SoftPrompts(), Retrieve(2), Copy()], {"retrieved": 2, "soft": True}),
    "copy_half": ([Copy(strength=0.5)], {}),
    "copy_generated": ([Copy(generated=True)], {}),
    **{f"compact{n}": ([Compact(n)], {"soft": True, "entries": n}) for n in (8, 32, 60, 64, 128, 160)},
    **{f"compact{n}_equal": ([Compact(n, budgets="equal")], {"soft": True, "entries": n}) for n in (8, 32, 128)},
    **{f"compact{n}_retrieve2": ([Compact(n), Retrieve(2)], {"soft": True, "entries": n, "retrieved": 2})
       for n in (8, 32, 64)},
    "compact96_retrieve1": ([Compact(96), Retrieve(1)], {"soft": True, "entries": 96, "retrieved": 1}),
    "compact32_copy": ([Compact(32), Copy()], {"soft": True, "entries": 32}),
    "compact32_copy_fitted": ([Compact(32), Copy(gate=FITTED)], {"soft": True, "entries": 32}),
    "compact32_retrieve2_copy": ([Compact(32), Retrieve(2), Copy()],
                                 {"soft": True, "entries": 32, "retrieved": 2}),
}  # fmt: skip
LONGER = {"window": lambda n: 0, "full": lambda n: n * CHUNK, "longer_same_slots": lambda n: 8 * n,
          "longer_same_slots_at32": lambda n: 32 * n,
          "longer_same_slots_at128": lambda n: 128 * n, "longer_same_slots_retrieve2": lambda n: 1024,
          "longer_same_slots_retrieve4": lambda n: 2048}  # fmt: skip
OTHERS = {"shuffled", "mean_pool", "retrieve2_oracle", "full_copy"}


@pytest.fixture(scope="module")
def said(reader, rows):
    """What an arm was measured to say, each read once."""
    known = {}

    def said_by(name, count):
        if (name, count) not in known:
            swap = rows.ids[[1, 2, 0]] if name == "shuffled" else None
            known[name, count] = read(reader, name, rows.ids, SHAPE, count, 8192, swap)
        return known[name, count]

    return said_by


def latest(rows, count):
    """The last chunks' rows, as tensors."""
    ids = torch.from_numpy(rows.ids.astype(np.int64))
    return torch.cat([ids[:, :4], ids[:, 4 + (9 - count) * CHUNK :]], 1)


def plain(host, ids, embeddings=None, last=SHAPE.target):
    """Log-probabilities of the last tokens of `[D, T]` and whether they are greedy, from one forward."""
    with torch.no_grad():
        read = {"input_ids": ids[:, :-1]} if embeddings is None else {"inputs_embeds": embeddings[:, :-1]}
        logp = host(**read).logits[:, -last:].float().log_softmax(-1)
    target = ids[:, -last:]
    return logp.gather(2, target[..., None])[..., 0].numpy(), (logp.argmax(-1) == target).numpy()


def agree(measured, scored, right, slots):
    np.testing.assert_allclose(measured.log_probabilities, scored, atol=2e-4)
    # where two tokens are as likely as one another, rounding may choose the other one
    assert (measured.right == right).mean() > 0.99
    assert measured.slots.tolist() == [slots] * len(scored)


def test_every_arm_has_a_test_of_its_own():
    assert {*HISTORIES, *LONGER} | OTHERS == set(ARMS)


@pytest.mark.parametrize("name", HISTORIES)
@pytest.mark.parametrize("count", COUNTS)
def test_a_history_arm_is_the_score_of_its_modes(reader, rows, said, name, count):
    if not exists(name, count) or SHAPE.window + ARMS[name].extra(count) >= count * CHUNK:
        pytest.skip("as much as everything")
    modes, slots = HISTORIES[name]
    history = CompressedHistory(
        reader.host, reader.crouter, modes=modes, window=64 + slots.get("extra", 0), keep_first=4
    )
    scored, greedy = history.score(latest(rows, count), last=SHAPE.target, greedy=True)
    peak = history.report(measure=False).peak_slots
    history.detach()
    agree(said(name, count), scored.numpy(), greedy.numpy(), slots_of(count, **slots))
    assert peak == slots_of(count, **slots) + SHAPE.target - 1  # what the cache really held; the last is not read


@pytest.mark.parametrize("name", LONGER)
@pytest.mark.parametrize("count", COUNTS)
def test_a_longer_window_is_the_plain_host_on_its_tokens(reader, rows, said, name, count):
    extra = LONGER[name](count)
    if extra > count * CHUNK or not exists(name, count):
        pytest.skip("as much as everything")
    ids = torch.from_numpy(rows.ids.astype(np.int64))
    ids = torch.cat([ids[:, :4], ids[:, SHAPE.old - extra :]], 1)
    agree(said(name, count), *plain(reader.host, ids), 4 + 64 + extra)


def test_arms_differ_but_for_those_that_are_one(said):
    """An arm that read by another's gate, scorer or window would equal it."""
    losses = {name: said(name, 9).log_probabilities for name in ARMS if name not in ("retrieve2_oracle",)}
    equal = {pair for pair in itertools.combinations(losses, 2) if np.allclose(*(losses[n] for n in pair), atol=1e-5)}
    unmeasured = {(f"compact{n}", f"compact{n}_equal") for n in (8, 32, 128)}  # nobody knows this host's layers
    assert equal == {("copy", "copy_generated"), *unmeasured}
    hits = [said(name, 9).right.mean() for name in ("copy", "copy_fitted")]
    assert all(0 < share < 1 for share in hits)  # else greedy hits would prove nothing


def test_rows_do_not_depend_on_those_beside_them(reader, rows, said):
    for name in ("copy", "retrieve2", "full", "full_copy", "mean_pool"):
        alone = read(reader, name, rows.ids, SHAPE, 9, 1)
        np.testing.assert_allclose(alone.log_probabilities, said(name, 9).log_probabilities, atol=2e-4)
        assert (alone.slots == said(name, 9).slots).all()


def test_progress_is_told_of_every_row(reader, rows):
    for name in ("copy", "full", "full_copy", "retrieve2_oracle"):
        done = []
        read(reader, name, rows.ids, SHAPE, 3, 4096, advance=lambda n, tokens, to=done: to.append((n, tokens)))
        assert sum(n for n, _ in done) == 3 and all(tokens > 0 for _, tokens in done)


def by_archive(reader, row, gate):
    """Log-probabilities and greedy hits of a row read raw, with its old chunks as the archive."""
    row = row.astype(np.int64)
    archive = Archive.empty(len(reader.tokenizer), special_ids(reader.tokenizer, reader.host))
    archive = archive.extended(row[4 : SHAPE.old])
    evidence = []
    for end in range(SHAPE.split, SHAPE.length):
        raw = RawText((), row[:end])  # anew for every position
        found = raw.match(archive.pattern(row[:end], 64), end)
        evidence.append(Evidence(archive.match(row[max(0, end - 64) : end]), len(archive), found, raw.upto(end)))
    with torch.no_grad():
        scores = reader.host(torch.from_numpy(row[None, :-1])).logits[0, -SHAPE.target :]
        mixture = mix(scores, collect(evidence), gate)
        targets = torch.from_numpy(row[SHAPE.split :])
        return mixture.of(targets, scores).numpy(), (mixture.greedy() == targets).numpy()


def test_copying_beside_the_full_text_is_the_packages_mixture(reader, rows, said):
    gate = Gate.load(f"{world().crouter}/gates/tiny")
    by_hand = [by_archive(reader, row, gate) for row in rows.ids]
    agree(said("full_copy", 9), *map(np.stack, zip(*by_hand, strict=True)), 4 + 9 * CHUNK + 64)


def test_no_pair_is_better_than_the_best(reader, rows):
    found = read(reader, "retrieve2_oracle", rows.ids, SHAPE, 4, 8192)
    ids = latest(rows, 4)
    pairs = []
    for pair in itertools.combinations(range(4), 2):
        chunks = [ids[:, 4 + n * CHUNK : 4 + (n + 1) * CHUNK] for n in pair]
        pairs.append(plain(reader.host, torch.cat([ids[:, :4], *chunks, ids[:, 4 + 4 * CHUNK :]], 1)))
    losses = np.stack([-scored.mean(1) for scored, _ in pairs])
    best = losses.argmin(0)
    assert len({*best.tolist()}) > 1 and len(pairs) == 6
    scored, right = (np.stack([pairs[n][i][d] for d, n in enumerate(best)]) for i in range(2))
    agree(found, scored, right, slots_of(4, retrieved=2))


def test_shuffled_shows_the_soft_prompts_of_the_partner(reader, rows, said):
    for count in COUNTS:
        ids, others = latest(rows, count), latest(rows, count)[[1, 2, 0]]
        ids[:, 4 : 4 + count * CHUNK] = others[:, 4 : 4 + count * CHUNK]  # only soft prompts are read of these
        history = CompressedHistory(reader.host, reader.crouter, modes=[SoftPrompts()], window=64, keep_first=4)
        scored, greedy = history.score(ids, last=SHAPE.target, greedy=True)
        history.detach()
        agree(said("shuffled", count), scored.numpy(), greedy.numpy(), slots_of(count, soft=True))


def test_a_chunk_without_a_partner_is_no_chunk_of_its_own(reader, rows):
    history = CompressedHistory(reader.host, reader.crouter, modes=[OtherPrompts({})], window=64, keep_first=4)
    with pytest.raises(KeyError):
        history.score(latest(rows, 3)[:1], last=SHAPE.target)
    history.detach()


def test_shuffled_reads_by_the_readers_projector(rows):
    own = world().reader()
    with torch.no_grad():
        own.projector.offset.add_(1.0)
    shown = read(own, "shuffled", rows.ids, SHAPE, 3, 8192, rows.ids)  # partners of itself
    np.testing.assert_allclose(
        shown.log_probabilities, read(own, "soft", rows.ids, SHAPE, 3, 8192).log_probabilities, atol=2e-4
    )


def test_mean_pool_puts_means_of_embeddings_there(reader, rows, said):
    ids = latest(rows, 3)
    embed = reader.host.get_input_embeddings()
    with torch.no_grad():
        spans = embed(ids[:, 4 : 4 + 3 * CHUNK]).view(3, 3 * 8, CHUNK // 8, -1).mean(2)
        joined = torch.cat([embed(ids[:, :4]), spans, embed(ids[:, 4 + 3 * CHUNK :])], 1)
    agree(said("mean_pool", 3), *plain(reader.host, ids, joined), slots_of(3, soft=True, entries=8))


def test_what_is_not_less_than_everything_is_no_arm():
    def there(count):
        return {name for name in ARMS if exists(name, count)}

    assert there(1) >= {"window", "full", "copy", "soft", "shuffled", "mean_pool", "full_copy", "longer_same_slots"}
    for count, name in itertools.product((1, 2), ("retrieve2", "retrieve2_copy", "soft_retrieve2_copy",
                                                  "longer_same_slots_retrieve2", "retrieve2_oracle")):  # fmt: skip
        assert name not in there(count)
    assert "retrieve2" in there(3) and "retrieve4" not in there(4) and "retrieve4" in there(5)
    assert there(8) == set(ARMS) - {"retrieve8"} and there(9) == set(ARMS) - {"retrieve2_oracle"}


@pytest.mark.parametrize("name", ["copy", "retrieve2_copy", "retrieve4", "compact32_retrieve2"])
def test_without_a_crouter_chunks_are_the_products_own(reader, name):
    shape = Shape(chunks=5, window=64, target=24)
    alone, rows = Reader(reader.host, reader.tokenizer, window=64), make_rows(reader.tokenizer, 2, shape)
    modes = {"copy": [Copy(gate=general_gate())], "retrieve2_copy": [Retrieve(2), Copy(gate=general_gate())],
             "retrieve4": [Retrieve(4)], "compact32_retrieve2": [Compact(32), Retrieve(2)]}[name]  # fmt: skip
    history = CompressedHistory(reader.host, modes=modes, window=64, keep_first=4)
    scored = history.score(torch.from_numpy(rows.ids.astype(np.int64)), last=24)
    history.detach()
    found = read(alone, name, rows.ids, shape, 5, 8192)
    np.testing.assert_allclose(found.log_probabilities, scored.numpy(), atol=2e-4)


def test_a_crouter_of_other_tokens_cuts_and_weighs_for_those_arms_alone_that_need_it(reader):
    other = Reader(reader.host, reader.tokenizer, reader.crouter, window=64, projector=reader.projector)
    assert other.own_gate().config.host_name == "tiny"
    other.projector = type(reader.projector)(dataclasses.replace(reader.projector.config, host_tokenizer="other"))
    history = other.history("copy")
    assert history.crouter is None and history.policy.chunker.chunk_length == 512
    history.detach()
    assert other.own_gate().config.host_name == ""  # of full_copy: the gate that copy reads by, too


def test_what_is_missing_is_said(reader, capsys):
    bare = Reader(reader.host, reader.tokenizer)
    need = {name: bare.lacks(name) for name in ARMS if bare.lacks(name)}
    assert {name for name, lack in need.items() if lack == "a crouter"} == {
        "soft", "shuffled", "copy_rebuilt", "soft_copy", "soft_retrieve2_copy"
    }  # fmt: skip
    fitted = {name for name, lack in need.items() if lack.startswith("a gate")}
    assert fitted == {"copy_fitted", "retrieve2_copy_fitted", "retrieve4_copy_fitted", "compact32_copy_fitted"}
    assert bare.readable(["copy", "soft", "copy_fitted", "full"]) == ["copy", "full"]
    assert capsys.readouterr().out.splitlines() == [
        "soft: left out, expected a crouter",
        "copy_fitted: left out, expected a gate that was fitted for this host (--gate)",
    ]
    with pytest.raises(InputError, match="copy_fitted: expected a gate that was fitted"):
        bare.history("copy_fitted")
    unread = Reader(reader.host, reader.tokenizer, reader.crouter)
    unread.projector = None
    assert unread.lacks("soft") == unread.lacks("shuffled") == "a projector for this host"
    assert not unread.lacks("copy_rebuilt") and reader.readable(list(ARMS)) == list(ARMS)
    assert bare.history("full") is None and reader.projector is not None


def test_partners_are_other_texts():
    names = ["p/a.py#0", "p/a.py#1", "p/b.py", "q/a.py", "r/x.py#0", "r/x.py#1"]
    found = partners(names, ["p", "p", "p", "q", "r", "r"])
    assert found[:2].tolist() == [2, 2] and found[2] in (0, 1)  # of the same package
    for i, j in enumerate(found):
        assert names[i].partition("#")[0] != names[j].partition("#")[0]
    random = np.random.default_rng(0)
    for _ in range(50):
        names = [f"{random.integers(3)}/{random.integers(3)}#{n}" for n in range(12)]
        clusters = [name[0] for name in names]
        texts = [name.partition("#")[0] for name in names]
        for i, j in enumerate(partners(names, clusters)):
            assert texts[i] != texts[j]
            assert clusters[i] == clusters[j] or len({t for t in texts if t[0] == texts[i][0]}) == 1
