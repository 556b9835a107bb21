import itertools

import numpy as np
import pytest
import torch

from eval.documents import Record
from eval.hgr import candidates as searching
from eval.hgr import passes
from eval.hgr import reader as reading
from eval.hgr.arms import ARMS, Arm, archive_of
from eval.hgr.candidates import Search, search
from eval.hgr.gates import NineWeights
from eval.hgr.places import Places
from eval.hgr.reader import partners, retrieved
from hf_crouter.ngram.archive import ORDERS
from hf_crouter.ngram.mixture import mix, view_host

from ...tiny import CHUNK, LATENTS, VOCAB
from .tiny_rows import COUNTS, LAYOUT, make_block, make_gates, make_reader, make_records, make_rows


@pytest.mark.parametrize("tokens", [1, 150, 230, 10_000])
def test_another_choice_of_chunks_meets_the_same_candidates(tokens, monkeypatch):
    """However many rows fit, batches do not cross from one choice to the next."""
    reader, rows, joins = make_reader(tokens=tokens), make_rows(5), []
    block = make_block(reader, rows)
    join = searching.joined
    monkeypatch.setattr(reading, "joined", lambda *arguments: joins.append(1) or join(*arguments))
    whole = [(i, (chunk,)) for chunk in range(4) for i in range(5)]
    losses = passes.single_losses(reader, block, 4, make_gates()["shipped"], whole)
    assert len(joins) == len({tuple(d) for d, _ in reader.forward(block, Arm(retrieve="given"), 4, whole)}) <= 5
    alone = [passes.single_losses(reader, block, 4, make_gates()["shipped"], [pair]) for pair in whole]
    np.testing.assert_allclose(losses, np.concatenate(alone), atol=1e-4)


def plain_loss(reader, *parts, soft=None):
    """Loss of the last tokens, from embeddings put together here."""
    ids = torch.from_numpy(np.concatenate(parts).astype(np.int64))[None]
    embeddings = reader.host.get_input_embeddings()(ids)
    if soft is not None:
        embeddings = torch.cat([embeddings[:, :4], soft, embeddings[:, 4:]], dim=1)
    with torch.no_grad():
        logits = reader.host(inputs_embeds=embeddings[:, :-1]).logits[0, -LAYOUT.target :]
    return torch.nn.functional.cross_entropy(logits, ids[0, -LAYOUT.target :]).item()


def means(reader, row):
    """A mean embedding for every soft prompt of the chunks, `[1, S, H]`."""
    spans = torch.from_numpy(row[4 : 4 + 4 * CHUNK].astype(np.int64)).view(4 * LATENTS, -1)
    return reader.host.get_input_embeddings()(spans).mean(1)[None].detach()


def test_arms_read_what_they_say(measured):
    reader, rows, found = measured
    chunks = [slice(4 + CHUNK * i, 4 + CHUNK * (i + 1)) for i in range(4)]
    for i, row in enumerate(rows):
        prefix, recent = row[:4], row[4 + 4 * CHUNK :]
        pair = [row[chunks[c]] for c in found["n4.retrieve2_bm25.chunks"][i]]
        latents = torch.cat([reader.crouter.encode(torch.from_numpy(row[s].astype(np.int64))[None]) for s in chunks])
        soft = reader.projector(latents).flatten(0, 1)[None]
        expected = {
            "n2.window": plain_loss(reader, prefix, recent),
            "n4.full": plain_loss(reader, row),
            "n2.full": plain_loss(reader, prefix, row[chunks[2].start :]),
            "n4.longer_same_slots": plain_loss(reader, prefix, row[4 + 4 * CHUNK - 4 * LATENTS :]),
            "n4.longer_same_slots_retrieve2": plain_loss(reader, prefix, row[4 + 2 * CHUNK - 4 * LATENTS :]),
            "n4.retrieve2_last": plain_loss(reader, prefix, row[chunks[2].start :]),
            "n4.retrieve2_bm25": plain_loss(reader, prefix, *pair, recent),
            "n4.mean_pool": plain_loss(reader, prefix, recent, soft=means(reader, row)),
            "n4.soft": plain_loss(reader, prefix, recent, soft=soft),
            "n2.soft": plain_loss(reader, prefix, recent, soft=soft[:, 2 * LATENTS :]),
            "n4.soft_retrieve2_bm25": plain_loss(reader, prefix, *pair, recent, soft=soft),
        }
        for key, value in expected.items():
            assert found[key][i] == pytest.approx(value, abs=1e-4), key


def test_slots_are_the_positions_before_the_target():
    reader, rows = make_reader(), make_rows(1).astype(np.int64)
    block = make_block(reader, rows)
    for (name, arm), count in itertools.product(ARMS.items(), COUNTS):
        if arm.exists(LAYOUT, count):
            before = reader.forwarded
            list(reader.forward(block, arm, count, reader.wanted(block, arm, count)))
            assert reader.forwarded - before == arm.slots(LAYOUT, count) + LAYOUT.target - 1, name


def test_partners_are_other_texts():
    records = [Record(f"p/{n}", "p", "code", 0.1) for n in ("a.py#0", "a.py#1", "b.py")]
    records.append(Record("q/a.py", "q", "code", 0.1))
    found = partners(records, 0)
    assert found[:2].tolist() == [2, 2] and found[2] in (0, 1) and found[3] != 3


def test_shuffled_latents_and_random_chunks_differ(measured):
    found = measured[2]
    assert not np.isclose(found["n4.soft"], found["n4.shuffled"]).any()
    assert (partners(make_records(), 0) != np.arange(5)).all()
    assert partners(make_records(), 0)[0] == 3  # of the same package
    random = make_reader().scorers["random"]
    assert retrieved(LAYOUT, make_rows()[0], 4, random) == retrieved(LAYOUT, make_rows()[0], 4, random)


def test_no_pair_beats_the_oracle(measured):
    found = measured[2]
    for pair, key in itertools.product(
        ("retrieve2_last", "retrieve2_bm25", "retrieve2_random"), ("retrieve2_oracle",)
    ):
        assert (found[f"n4.{key}"][[0, 2]] <= found[f"n4.{pair}"][[0, 2]] + 1e-5).all()
    assert (
        found["n4.retrieve2_oracle_copy_fitted"][[0, 2]] <= found["n4.retrieve2_bm25_copy_fitted"][[0, 2]] + 1e-5
    ).all()
    assert (
        np.isnan(found["n4.retrieve2_oracle"][[1, 3, 4]]).all()
        and "n2.retrieve2_oracle" not in found
        and "n2.retrieve2_last" not in found
    )


def test_weight_zero_is_the_host_alone():
    reader, rows = make_reader(), make_rows(2)
    found = passes.measure(reader, make_block(reader, rows), COUNTS, make_gates(bias=-np.inf))
    for name, arm in ARMS.items():
        for key, _, gate in arm.readings:
            if gate != "nine_weights":
                for n in COUNTS:
                    if f"n{n}.{key}" in found:
                        assert np.allclose(found[f"n{n}.{key}"], found[f"n{n}.{name}"], atol=1e-5), key
    assert np.allclose(found["n4.copy.right"], found["n4.window.right"])


def test_copying_equals_the_packages_mixture(measured):
    reader, rows, found = measured
    row = rows[0].astype(np.int64)
    gate = make_gates()["shipped"]
    work = Search(LAYOUT, row, None, ((4, ""),), VOCAB, frozenset({0, 1, 2}))
    candidates = searching.joined([search(work)[4, ""]], LAYOUT.target, "cpu")
    ids = torch.from_numpy(np.concatenate([row[:4], row[LAYOUT.old : -1]]))[None]
    with torch.no_grad():
        scores = reader.host(ids).logits[0, -LAYOUT.target :]
        mixture = mix(scores, candidates, gate)
    targets = torch.from_numpy(row[LAYOUT.split :])
    assert found["n4.copy"][0] == pytest.approx(-mixture.of(targets, scores).mean().item(), abs=1e-4)
    places = Places.read(scores, targets)
    assert torch.equal(places.greedy(candidates, mixture.weights), mixture.greedy())
    assert found["n4.copy.right"][0] == pytest.approx((mixture.greedy() == targets).float().mean().item())
    host, normaliser = view_host(scores, candidates)
    assert torch.allclose(places.entropy, host.entropy, atol=1e-5)
    assert torch.allclose(places.normaliser, normaliser, atol=1e-5) and torch.equal(places.token, host.token)
    assert len(candidates.tokens) > 0


def test_an_archive_excludes_what_is_raw():
    row = np.arange(LAYOUT.length)
    for (name, arm), count in itertools.product(ARMS.items(), COUNTS):
        for _, archive, _ in arm.readings:
            if archive == "past" and arm.exists(LAYOUT, count):
                extra = LAYOUT.extra(archive_of(arm, archive), count)
                past = set(LAYOUT.past(row, count, extra).tolist())
                raw = set(LAYOUT.raw(row, LAYOUT.extra(arm.longer, count)).tolist())
                older = set(LAYOUT.past(row, count).tolist())
                if arm.longer == "full":
                    assert past == older
                else:
                    assert past | raw >= older and not past & raw, name


def test_candidates_come_from_the_archive_that_is_named():
    row = np.full(LAYOUT.length, 5)
    row[LAYOUT.old - LATENTS * 4 : LAYOUT.old] = 7  # only what the longer window holds
    rebuilt, archives = (np.full(64, 9), np.ones(64, np.float32)), ((4, ""), (4, "soft"), (4, "rebuilt"))
    work = Search(LAYOUT, row, rebuilt, archives, VOCAB, frozenset())
    found = search(work)
    assert 7 in found[4, ""]["tokens"] and 7 not in found[4, "soft"]["tokens"]
    assert len(found[4, "soft"]["tokens"]) and not len(found[4, "rebuilt"]["tokens"])


def test_nine_weights_take_the_longest_order():
    nine = NineWeights()
    nine.logit.data = torch.linspace(-2, 2, len(ORDERS))
    available = torch.zeros(2, len(ORDERS), dtype=torch.bool)
    available[0, :3] = True
    weights = nine(torch.zeros(2, 1), available).exp()
    assert torch.allclose(weights.sum(1), torch.ones(2))
    assert weights[0, 3].item() == pytest.approx(torch.sigmoid(nine.logit[2]).item()) and weights[1, 0] == 1


def test_rows_without_candidates_name_no_entry_of_others():
    rows = [np.full(LAYOUT.length, 5), np.arange(LAYOUT.length) % VOCAB]
    rows[1][LAYOUT.split - 1 :] = VOCAB - 1  # never in its past
    rows[1][: LAYOUT.old] = 3
    works = [Search(LAYOUT, row, None, ((4, ""),), VOCAB, frozenset()) for row in rows]
    found = [search(work)[4, ""] for work in works]
    candidates = searching.joined(found, LAYOUT.target, "cpu")
    assert not candidates.available[-LAYOUT.target :].any() and candidates.available[: LAYOUT.target].any()
    assert candidates.best.max() < len(candidates.tokens)
