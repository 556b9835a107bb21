import json

import pytest

from eval.results import FOLDER
from eval.tables import hgr
from eval.tables.readme import README, render
from hf_crouter.errors import InputError

from .results import difference, interval, rows_of, write


def test_hgr(tmp_path):
    metrics = {"young.n8.window.slots": 516.0, **interval("young.n8.window.hgr", 0.0, 0.0, 0.0)}
    metrics |= {"young.n8.copy.slots": 516.0, **interval("young.n8.copy.hgr", 0.7281, 0.7025, 0.7537)}
    metrics |= {
        "young.n8.copy_fitted.hgr": 0.9,
        **interval("prose.n8.retrieve2_oracle_copy_fitted.hgr", 1.365, 1.28, 1.4781),
    }
    metrics |= {f"{name}.n8.retrieve2_oracle.documents": 150.0 for name in hgr.HGR_SETS} | {"young.n8.tra": 0.96071}
    write(tmp_path, "hgr-smollm2-135m", metrics)
    text = render("hgr", tmp_path)
    rows = {row[0]: row[1:] for row in rows_of(text)}
    assert rows["raw window"] == ["516", "0.0", "–", "–", "–"]
    assert rows["copying"] == ["516", "72.8 [70.2, 75.4]", "–", "–", "–"]  # the gate that ships, not the one for it
    assert rows["best 2 chunks, by an oracle, + copying †‡"] == ["–", "–", "–", "–", "136.5 [128.0, 147.8]"]
    assert "; 150 documents each" in text and "young 96.1%, files –" in text


def test_only_ways_with_a_gate_of_their_own_are_marked():
    with_gate = {arm for arm, label in hgr.HGR_WAYS.items() if "†" in label}
    assert with_gate == {arm for arm in hgr.HGR_WAYS if arm.endswith("_fitted")}


def test_kvpress(tmp_path):
    metrics = interval("young.n8.snapkv.at8.hgr", -0.276, -0.449, -0.138)
    write(
        tmp_path, "hgr-smollm2-135m", {**metrics, "young.n8.snapkv.at8.slots": 580.0, "prose.n8.snapkv.at8.hgr": -0.4}
    )
    rows = {row[0]: row[1:] for row in rows_of(render("kvpress", tmp_path))}
    assert rows["SnapKV that keeps the raw window"] == ["–"] * 5
    assert ["SnapKV", "580", "−27.6 [−44.9, −13.8]", "–", "–", "−40.0"] in rows_of(render("kvpress", tmp_path))


def test_hgr_differences(tmp_path):
    metrics = difference("young.n8.diff.soft_copy_fitted.longer_same_slots_copy_fitted", 0.034, 0.0266, 0.0415)
    write(tmp_path, "hgr-smollm2-135m", metrics | difference("packages.n8.diff.soft.shuffled", 0.004, -0.005, 0.008))
    rows = rows_of(render("hgr-differences", tmp_path))
    assert rows[0][2:] == ["–", "–", "+0.4 [−0.5, +0.8]", "–"]
    assert rows[2][0].endswith("†") and rows[2][2] == "+3.4 [+2.7, +4.2]"


def test_hgr_prose(tmp_path):
    metrics = interval("prose.logs.n8.copy.hgr", 0.79, 0.68, 0.86) | {"prose.logs.n8.documents": 16.0}
    write(tmp_path, "hgr-smollm2-135m", metrics | {"prose.n8.tra": 0.6})
    row = next(row for row in rows_of(render("hgr-prose", tmp_path)) if row[0] == "logs")
    assert row == ["logs", "79.0 [68.0, 86.0]", "–", "–", "–", "16"]
    write(tmp_path, "hgr-smollm2-135m", {"prose.recipes.n8.documents": 3.0})
    with pytest.raises(InputError, match="no name for the prose of recipes"):
        render("hgr-prose", tmp_path)


def test_what_the_readme_says_beside_its_tables_was_measured():
    metrics = json.loads((FOLDER / "hgr-smollm2-135m.json").read_text())["metrics"]
    everything_arm = "soft_retrieve2_bm25_copy"
    copy, everything, longer, fitted, generic = (
        f"{100 * metrics[f'young.n8.{arm}.hgr']:.0f}%"
        for arm in ("copy", everything_arm, "longer_same_slots_retrieve2_copy_fitted", "copy_fitted", "copy_generic")
    )
    slots, full = (f"{metrics[f'young.n8.{arm}.slots']:,.0f}" for arm in (everything_arm, "full"))
    text = " ".join(README.read_text(encoding="utf-8").split())
    assert f"copying takes no KV slot and recovers {copy} of what full history is worth" in text
    assert f"all three ways {everything} with {slots} slots of {full}" in text
    assert f"where a raw window of {slots} slots that copies as well recovers {longer}" in text
    assert metrics["young.n8.copy.slots"] == metrics["young.n8.window.slots"]
    difference = [
        f"{100 * metrics[f'young.n8.diff.soft_copy_fitted.longer_same_slots_copy_fitted.{end}']:.1f}"
        for end in ("mean", "lo", "hi")
    ]
    assert "by {} points [{}, {}] on young code".format(*difference) in text
    ratio = metrics["young.n8.full.slots"] / metrics[f"young.n8.{everything_arm}.slots"]
    assert f"{slots} instead of {full} is {ratio:.1f}x fewer" in text
    prose = [f"{100 * metrics[f'prose.n8.{key}']:.0f}%" for key in ("tra", "copy_rebuilt.hgr")]
    assert "of prose {} of the tokens are rebuilt, and HGR is {}.".format(*prose) in text
    gates = f"The generic gate recovers {generic} on young code, the shipped one {copy}, "
    gates += f"one fitted to copying alone {fitted}."
    assert gates in text
    assert f"worth {generic} instead of {copy} on young code" in text
