import argparse
import itertools
import json
import threading

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from eval import documents
from eval.arrays import joined_arrays
from eval.documents import Record
from eval.hgr import candidates as searching
from eval.hgr import experiment as hgr
from eval.hgr import passes, report
from eval.hgr import reader as reading
from eval.hgr.arms import ARMS, GATES, Arm, Layout, archive_of, archives_of
from eval.hgr.candidates import Search, Searchers, search
from eval.hgr.gates import NineWeights
from eval.hgr.places import Places
from eval.hgr.reader import DocumentReader, partners, retrieved
from eval.hgr.report import Bootstrap, Losses
from eval.statistics import clustered_interval
from hf_crouter.ngram.archive import ORDERS
from hf_crouter.ngram.gate import Gate
from hf_crouter.ngram.mixture import mix, view_host

from ...tiny import CHUNK, LATENTS, VOCAB, tiny_crouter, tiny_host, tiny_projector

LAYOUT = Layout(prefix=4, chunk=CHUNK, chunks=4, window=CHUNK, target=CHUNK, latents=LATENTS)
COUNTS = [2, 4]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny products: several threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_rows(count=5, seed=0):
    """Rows with repeats, so that there is something to copy."""
    generator = np.random.default_rng(seed)
    words = generator.integers(3, VOCAB, (6, 7))
    rows = [np.concatenate(words[generator.integers(0, 6, 20)])[: LAYOUT.length] for _ in range(count)]
    return np.stack(rows).astype(np.uint16)


def make_records(count=5, domain="code"):
    return [Record(f"p{i % 3}/{i}.py", f"p{i % 3}", domain, 0.1 * i) for i in range(count)]


def make_reader(workers=0, tokens=500):
    host, crouter = tiny_host(), tiny_crouter()
    return DocumentReader(
        host, crouter, tiny_projector(host, crouter), LAYOUT, frozenset({0, 1, 2}), Searchers(workers), tokens
    )


def make_gates(bias=1.0):
    gates = {}
    for name in GATES:
        if name == "nine_weights":
            gates[name] = NineWeights()
            gates[name].logit.data.fill_(bias)
        else:
            gates[name] = Gate().requires_grad_(False)
            gates[name].down.bias[0] = -bias if np.isfinite(bias) else 1e9
        gates[name].requires_grad_(False)
    return gates


def make_block(reader, rows):
    partner = partners(make_records(len(rows)), 0)
    archives = archives_of(LAYOUT, COUNTS)
    return reader.prepare(np.arange(len(rows)), rows.astype(np.int64), rows[partner].astype(np.int64), archives)


@pytest.fixture(scope="module")
def measured():
    reader, rows = make_reader(), make_rows()
    return reader, rows, passes.measure(reader, make_block(reader, rows), COUNTS, make_gates(), oracle=[0, 2])


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


def test_the_bootstrap_is_that_of_clustered_interval():
    values, groups = np.random.default_rng(0).normal(size=30), [f"g{i % 7}" for i in range(30)]
    bootstrap = Bootstrap(groups, seed=4, draws=100)
    drawn = bootstrap.sums(values) / bootstrap.sums(np.ones(30))
    mine = report.interval("x", drawn)
    expected = clustered_interval(lambda rows: values[rows].mean(), groups, seed=4, draws=100)
    assert list(mine.values()) == pytest.approx(expected)


@pytest.mark.parametrize("domain", ["code", "novels"])
def test_metrics_have_the_promised_keys(measured, domain):
    arrays = measured[2]
    arrays = {**arrays, "n4.full": arrays["n4.window"] - 0.1, "n2.full": arrays["n2.window"] - 0.1}
    found = report.metrics({"set": Losses(arrays, make_records(domain=domain))}, COUNTS, 0, draws=50, slots=LAYOUT)
    arms = set(ARMS) | {key for arm in ARMS.values() for key, _, _ in arm.readings}
    for arm in arms | {"retrieve2_oracle", "retrieve2_oracle_copy_fitted"}:
        for end in ("hgr", "hgr.lo", "hgr.hi", "slots", "loss"):
            assert f"set.n4.{arm}.{end}" in found, (arm, end)
    everything, longer = "soft_retrieve2_copy", "longer_same_slots_retrieve2_copy_fitted"
    for key in ("n4.diff.copy.longer_same_slots_copy_fitted.lo", f"n4.diff.{everything}.{longer}.hi",
                f"n4.diff.{everything}.soft_retrieve2_bm25_copy.mean", "n4.diff.soft.shuffled.mean",
                "n2.diff.soft.longer_same_slots_copy_fitted.mean", "n4.loss.window", "n4.loss.full", "n4.documents",
                "n4.tra", "n4.copy.third1.hgr", f"n4.{everything}.third3.hgr", "n4.copy.worst_document",
                "n4.retrieve2_bm25_is_last", "n4.copy.accuracy"):  # fmt: skip
        assert f"set.{key}" in found, key
    assert found["set.n4.window.hgr"] == 0 and found["set.n4.full.hgr"] == pytest.approx(1)
    assert (
        found["set.n4.copy.slots"] == 4 + CHUNK and found[f"set.n4.{everything}.slots"] == 4 + 4 * LATENTS + 3 * CHUNK
    )
    assert found["set.n4.longer_same_slots_retrieve2.slots"] == found[f"set.n4.{everything}.slots"]
    assert found["set.n4.retrieve2_oracle.documents"] == 2
    assert ("set.novels.n4.copy.hgr" in found) == (domain == "novels")
    assert "nan" not in report.table(found).split()


def test_rows_without_candidates_name_no_entry_of_others():
    rows = [np.full(LAYOUT.length, 5), np.arange(LAYOUT.length) % VOCAB]
    rows[1][LAYOUT.split - 1 :] = VOCAB - 1  # never in its past
    rows[1][: LAYOUT.old] = 3
    works = [Search(LAYOUT, row, None, ((4, ""),), VOCAB, frozenset()) for row in rows]
    found = [search(work)[4, ""] for work in works]
    candidates = searching.joined(found, LAYOUT.target, "cpu")
    assert not candidates.available[-LAYOUT.target :].any() and candidates.available[: LAYOUT.target].any()
    assert candidates.best.max() < len(candidates.tokens)


def test_kvpress_losses_stand_beside_ours(tmp_path, measured, monkeypatch):
    write_set(tmp_path, "young", monkeypatch)
    arrays = measured[2]
    kept = {k: v for k, v in arrays.items() if k.count(".") == 1 and k != "n4.soft_retrieve2_copy"}
    (tmp_path / "losses").mkdir()
    save_file({**kept, "documents": np.array([3, 1, 0, 2, 4])}, tmp_path / "losses" / "young.0of1.safetensors")
    theirs = {"documents": np.array([4, 0]), "n4.snapkv.at8": np.array([2.0, 1.0], np.float32)}
    save_file(theirs, tmp_path / "losses" / "young.kvpress.0of1.safetensors")
    losses = report.losses_of(tmp_path, "young", tmp_path)
    assert (
        losses.arrays["n4.snapkv.at8"][[0, 4]].tolist() == [1, 2]
        and np.isnan(losses.arrays["n4.snapkv.at8"][1:4]).all()
    )
    assert losses.arrays["n4.window"].tolist() == arrays["n4.window"][[2, 1, 3, 0, 4]].tolist()
    more = {"documents": np.array([2, 1]), "n4.soft_retrieve2_copy": np.array([0.5, 0.25], np.float32),
            "n4.soft_retrieve2.chunks": np.array([[0, 1], [1, 2]], np.int16)}  # fmt: skip
    save_file(more, tmp_path / "losses" / "young.soft_retrieve2.0of1.safetensors")
    losses = report.losses_of(tmp_path, "young", tmp_path)
    assert losses.arrays["n4.soft_retrieve2_copy"][[1, 2]].tolist() == [0.25, 0.5]
    assert losses.arrays["n4.soft_retrieve2.chunks"].tolist() == [[-1, -1], [1, 2], [0, 1], [-1, -1], [-1, -1]]
    found = report.metrics({"young": losses}, COUNTS, 0, draws=20, slots=LAYOUT)
    assert found["young.n4.snapkv.at8.documents"] == 2 == found["young.n4.soft_retrieve2_copy.documents"]
    both = losses.take(np.array([1, 2])).arrays
    gain = both["n4.soft_retrieve2_bm25_copy"] - both["n4.soft_retrieve2_copy"]
    worth = both["n4.window"] - both["n4.full"]
    assert found["young.n4.diff.soft_retrieve2_copy.soft_retrieve2_bm25_copy.mean"] == pytest.approx(
        gain.sum() / worth.sum(), rel=1e-5
    )
    assert found["young.n4.snapkv.at8.slots"] == found["young.n4.longer_same_slots.slots"]


def test_parts_that_lack_a_figure_say_so():
    joined = joined_arrays([{"documents": np.arange(2), "x": np.ones(2)}, {"documents": np.arange(3)}])
    assert (
        np.isnan(joined["x"][2:]).all() and len(joined["x"]) == 5 and joined["documents"].tolist() == [0, 1, 0, 1, 2]
    )


def write_set(folder, name, monkeypatch, count=5, domain="code", seed=0):
    monkeypatch.setattr(documents, "LENGTH", LAYOUT.length)
    save_file({"ids": make_rows(count, seed)}, folder / f"{name}.safetensors")
    records = [vars(record) for record in make_records(count, domain)]
    (folder / f"{name}.json").write_text(json.dumps({"documents": records, "dropped": {}}))


def test_both_stages_and_two_shards_agree_with_one(tmp_path, monkeypatch):
    for seed, name in enumerate(("young", "gate_code", "gate_prose")):
        write_set(tmp_path, name, monkeypatch, domain="prose" if "prose" in name else "code", seed=seed)
    host, crouter = tiny_host(), tiny_crouter()
    projector = tiny_projector(host, crouter)
    tokenizer = argparse.Namespace(all_special_ids=[0, 1, 2])
    monkeypatch.setattr(hgr, "load_host", lambda *args: (host, tokenizer))
    monkeypatch.setattr(hgr, "load_crouter", lambda *args: (crouter, None))
    monkeypatch.setattr(hgr, "find_projector", lambda *args: projector)
    monkeypatch.setattr(hgr, "layout_of", lambda _: LAYOUT)
    monkeypatch.setenv("CROUTER_RESULTS", str(tmp_path))
    parser = argparse.ArgumentParser()
    hgr.configure(parser)

    def run(stage, save, *more):
        words = [
            stage,
            "--data",
            str(tmp_path),
            "--save",
            str(tmp_path / save),
            "--sets",
            "young",
            "--chunks",
            "2",
            "4",
        ]
        hgr.run(parser.parse_args([*words, "--workers", "0", "--steps", "8", "--oracle-documents", "2", *more]))

    run("collect", "one", "--workers", "1")
    run("report", "one")
    metrics = json.loads((tmp_path / "hgr-smollm2-135m.json").read_text())["metrics"]
    assert metrics["young.n4.documents"] == 5 and "gate.shipped.held_out_gain" in metrics
    threads = [threading.Thread(target=run, args=("collect", "both", "--shard", f"{i}/2")) for i in range(2)]
    for thread in threads:  # each fits half of the gates, from what both recorded
        thread.start()
    for thread in threads:
        thread.join()
    assert len(report.losses_of(tmp_path / "both", "young", tmp_path).records) == 5
    assert all(hgr.finished(tmp_path / "both", name).exists() for name in GATES)
    for name in GATES:  # the same gates, so that only the splitting differs
        (tmp_path / "two" / name).mkdir(parents=True)
        for path in (tmp_path / "one" / name).iterdir():
            (tmp_path / "two" / name / path.name).write_bytes(path.read_bytes())
    for shard in ("0/2", "1/2"):
        run("collect", "two", "--shard", shard)
    one, two = (report.losses_of(tmp_path / name, "young", tmp_path).arrays for name in ("one", "two"))
    assert set(one) == set(two)
    for key, values in one.items():
        assert np.allclose(values, two[key], atol=1e-5, equal_nan=True), key
