import argparse
import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from eval.arrays import about_of, save_arrays, shard_of
from eval.hgr import experiment as hgr
from eval.hgr.measure import Said
from eval.hgr.report import measured
from eval.results import provenance, versions
from eval.rows import right_lines
from hf_crouter.errors import InputError

from ..tiny_world import SHAPE, make_rows, world

ARMS = ("window", "full", "copy", "copy_fitted", "soft", "shuffled", "retrieve2", "retrieve2_oracle")


@pytest.fixture(scope="module")
def data(tmp_path_factory, reader):
    folder = tmp_path_factory.mktemp("sets")
    make_rows(reader.tokenizer, 5).save(folder, "young", 0)
    make_rows(reader.tokenizer, 4, domain="tales", seed=1).save(folder, "prose", 0)
    return folder


@pytest.fixture
def run(data, tmp_path, monkeypatch):
    monkeypatch.setattr(hgr, "Reader", lambda *args: hgr_reader(*args))
    monkeypatch.setenv("CROUTER_RESULTS", str(tmp_path))
    monkeypatch.setenv("CROUTER_COMMIT", "abc")
    monkeypatch.setattr(hgr, "provenance", lambda: {**provenance(), "device": "a machine far away"})
    parser = argparse.ArgumentParser()
    hgr.configure(parser)

    def run_stage(stage, save, *more, sets=("young",), arms=ARMS):
        words = [stage, "--data", str(data), "--save", str(tmp_path / save), "--sets", *sets, "--chunks", "4", "3",
                 "--host", world().host, "--crouter", world().crouter, "--gate", str(world().gate)]  # fmt: skip
        hgr.run(parser.parse_args([*words, "--draws", "20", "--arms", *arms, *more]))
        return tmp_path / save

    return run_stage


def hgr_reader(*args):
    from eval.arms import Reader

    return Reader(*args, window=SHAPE.window)


def test_both_stages_and_two_shards_agree_with_one(run, tmp_path, reader):
    one = run("collect", "one", sets=("young", "prose"))
    run("report", "one", sets=("young", "prose", "files"))
    result = json.loads((tmp_path / "hgr-tiny-host.json").read_text())
    metrics = result["metrics"]
    assert metrics["young.n4.documents"] == 5 and metrics["young.n3.clusters"] == 3
    assert {f"young.n{n}.{arm}.{end}" for n in (3, 4) for arm in ARMS for end in ("hgr", "lines.lo", "slots")} <= set(
        metrics
    )  # fmt: skip
    assert "prose.tales.n4.copy.hgr" in metrics and not any(key.startswith("files") for key in metrics)
    assert "young.n4.diff.soft.shuffled.mean" in metrics and "young.n4.linesdiff.copy_fitted.copy.lo" in metrics
    # of where the figures were collected, not of where they were reported
    assert result["device"] == "a machine far away" and result["commit"] == "abc"
    assert result["versions"] == versions() and result["config"]["draws"] == 20
    rows, figures = make_rows(reader.tokenizer, 5), measured([one / "young.ours.0of1.safetensors"], 5)
    shown = hgr.read(reader, "shuffled", rows.ids, SHAPE, 4, 8192, rows.ids[[1, 0, 3, 2, 0]])  # of their packages
    np.testing.assert_allclose(figures["n4.shuffled.loss"], -shown.log_probabilities.mean(1), atol=1e-4)
    both = tmp_path / "two"
    for shard in ("1/2", "0/2"):
        run("collect", "two", "--shard", shard)
    parts = sorted(both.glob("young.ours.*"))
    assert [path.name for path in parts] == ["young.ours.0of2.safetensors", "young.ours.1of2.safetensors"]
    assert load_file(parts[1])["documents"].tolist() == [1, 3]
    whole, joined = measured([one / "young.ours.0of1.safetensors"], 5), measured(parts, 5)
    assert set(whole) == set(joined) == {f"n{n}.{arm}.{figure}" for n in (3, 4) for arm in ARMS
                                         for figure in ("loss", "right", "lines", "slots")}  # fmt: skip
    for key, values in whole.items():
        assert np.isfinite(values).all() and np.allclose(values, joined[key], atol=1e-4), key


def test_a_run_that_stopped_goes_on_where_it_was(run, monkeypatch, tmp_path, reader):
    calls, read = [], hgr.read

    def counted(reader, arm, rows, shape, count, *rest):
        if len(calls) == 7:
            raise KeyboardInterrupt
        calls.append((arm, count, len(rows)))
        return read(reader, arm, rows, shape, count, *rest)

    monkeypatch.setattr(hgr, "read", counted)
    arms = ("window", "full", "copy")
    with pytest.raises(KeyboardInterrupt):
        run("collect", "save", "--block", "2", arms=arms)
    path = tmp_path / "save" / "young.ours.0of1.safetensors"
    done = load_file(path)  # written after a whole block: the second one's first arm is lost
    assert set(done) == {"documents", *(f"n{n}.{arm}.{figure}" for n in (3, 4) for arm in arms
                                        for figure in ("loss", "right", "lines", "slots"))}  # fmt: skip
    assert np.isfinite(done["n3.window.loss"]).tolist() == [True, True, False, False, False]
    calls.clear()
    monkeypatch.setattr(hgr, "read", lambda *a: calls.append((a[1], a[4], len(a[2]))) or read(*a))
    run("collect", "save", "--block", "2", arms=arms)
    expected = [(arm, count, size) for size in (2, 1) for arm in arms for count in (3, 4)]
    assert calls == expected and np.isfinite(load_file(path)["n4.copy.loss"]).all()
    calls.clear()
    run("collect", "save", "--block", "2", arms=(*arms, "retrieve2"))  # only what is new
    assert calls == [("retrieve2", count, size) for size in (2, 2, 1) for count in (3, 4)]
    calls.clear()
    run("collect", "save", "--block", "2", arms=(*arms, "retrieve2"))
    assert not calls
    # the figures are what was read
    rows = make_rows(reader.tokenizer, 5)
    said = read(reader, "copy", rows.ids, SHAPE, 4, 8192)
    found = measured([path], 5)
    np.testing.assert_allclose(found["n4.copy.loss"], -said.log_probabilities.mean(1), atol=1e-4)
    assert found["n4.copy.right"].tolist() == said.right.sum(1).tolist() and said.right.any()
    assert found["n4.copy.lines"].tolist() == right_lines(rows.lines, said.right).tolist()
    assert found["n4.copy.slots"].tolist() == said.slots.tolist()
    assert about_of(path) == {"set": "young", "shard": [0, 1], "versions": versions(), "commit": "abc",
                              "device": "a machine far away"}  # fmt: skip


def test_figures_belong_to_their_documents(run, monkeypatch, tmp_path, reader):
    rows = make_rows(reader.tokenizer, 5)
    numbers = {row.tobytes(): n for n, row in enumerate(rows.ids)}

    def told(reader, arm, ids, *rest):
        """Right everywhere but in the first token of one line, another one in each document."""
        some = [numbers[row.tobytes()] for row in ids]
        right = np.stack([rows.lines[n] != n % 2 for n in some])
        losses = np.array([float(n) for n in some])[:, None]
        return Said(-np.repeat(losses, SHAPE.target, 1), right, 10.0 + losses[:, 0])

    monkeypatch.setattr(hgr, "read", told)
    for shard in ("0/2", "1/2"):
        run("collect", "save", "--shard", shard, "--block", "2", arms=("full",))
    found = measured(sorted((tmp_path / "save").glob("*.safetensors")), 5)
    assert found["n3.full.loss"].tolist() == [0, 1, 2, 3, 4] and found["n3.full.slots"].tolist() == [
        10,
        11,
        12,
        13,
        14,
    ]
    whole = rows.lines.max(1) + 1
    expected = [int(count) - (n % 2 < count) for n, count in enumerate(whole)]
    assert found["n3.full.lines"].tolist() == expected and len({*expected}) > 1
    assert found["n3.full.right"].tolist() == [int((line != n % 2).sum()) for n, line in enumerate(rows.lines)]


def test_more_documents_are_added_to_those_that_are_there(run, tmp_path):
    run("collect", "save", "--documents", "2", arms=("window", "full"))
    run("collect", "save", "--documents", "4", arms=("window", "full"))
    found = load_file(tmp_path / "save" / "young.ours.0of1.safetensors")
    assert found["documents"].tolist() == [0, 1, 2, 3] and np.isfinite(found["n4.full.loss"]).all()
    run("report", "save")
    assert json.loads((tmp_path / "hgr-tiny-host.json").read_text())["metrics"]["young.n4.documents"] == 4


def test_peers_on_the_same_rows_stand_beside_ours(run, tmp_path):
    save = run("collect", "save", arms=("window", "full", "longer_same_slots"))
    theirs = {f"n4.kvzip.at8.{key}": np.array([2, 1], np.float32) for key in ("loss", "right", "slots")}
    theirs["n4.kvzip.at8.lines"] = np.zeros(2, np.float32)
    save_file({**theirs, "documents": np.array([4, 0])}, save / "young.peers.0of1.safetensors")
    run("report", "save")
    metrics = json.loads((tmp_path / "hgr-tiny-host.json").read_text())["metrics"]
    assert metrics["young.n4.kvzip.at8.documents"] == 2 and metrics["young.n4.kvzip.at8.loss"] == 1.5
    assert "young.n4.diff.kvzip.at8.longer_same_slots.lo" in metrics


def test_nothing_collected_and_rows_of_another_tokenizer_are_refused(run, tmp_path, data):
    with pytest.raises(InputError, match="expected figures of the stage `collect`"):
        run("report", "nowhere")
    about = json.loads((data / "young.json").read_text())
    (tmp_path / "other.json").write_text(json.dumps({**about, "tokenizer": "other"}))
    (tmp_path / "other.safetensors").write_bytes((data / "young.safetensors").read_bytes())
    args = argparse.Namespace(data=tmp_path)
    with pytest.raises(InputError, match="expected rows of tokenizer"):
        hgr.collect(hgr_reader(*(getattr(world().reader(), key) for key in ("host", "tokenizer"))), args, "other")


def test_chunks_of_a_set():
    rows = argparse.Namespace(shape=SHAPE)
    assert hgr.chunks_of("young", None, rows) == [8] and hgr.chunks_of("repo", None, rows) == [9]
    assert hgr.chunks_of("young", [40, 2, 20], rows) == [2, 9]


def test_shards_and_arrays(tmp_path):
    assert shard_of("1/3") == (1, 3) and shard_of("0") == (0, 1)
    for wrong in ("3/3", "-1/2"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected i/k"):
            shard_of(wrong)
    save_arrays(tmp_path / "new" / "x.safetensors", {"a": np.arange(6).reshape(2, 3).T}, {"commit": "c"})
    assert load_file(tmp_path / "new" / "x.safetensors")["a"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert about_of(tmp_path / "new" / "x.safetensors") == {"commit": "c"}
