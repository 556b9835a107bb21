import argparse
import json
import threading

import numpy as np

from eval.hgr import experiment as hgr
from eval.hgr import report
from eval.hgr.arms import GATES
from eval.hgr.gates import finished

from ...tiny import tiny_crouter, tiny_host, tiny_projector
from .tiny_rows import LAYOUT, write_set


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
    assert all(finished(tmp_path / "both", name).exists() for name in GATES)
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
