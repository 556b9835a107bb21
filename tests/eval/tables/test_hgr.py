import json

import pytest

from eval.results import FOLDER
from eval.tables.readme import README, render
from hf_crouter.errors import InputError

from .results import difference, interval, rows_of, write


def metrics_of(name):
    return json.loads((FOLDER / f"{name}.json").read_text())["metrics"]


def test_gains(tmp_path):
    metrics = {"young.n8.copy.slots": 516.0, **interval("young.n8.copy.hgr", 0.2281, 0.1625, 0.2937)}
    metrics |= interval("repo.n40.copy.lines", 0.365, 0.351, 0.38) | {"young.n8.loss.full": 0.8679}
    metrics |= {"young.n8.documents": 64.0, "repo.n40.documents": 60.0}
    write(tmp_path, "hgr-qwen1.5b", metrics)
    text = render("hgr", tmp_path)
    rows = {row[0]: row[1:] for row in rows_of(text)}
    assert rows["`Copy()`"] == ["516", "22.8 [16.2, 29.4]", "–", "–", "–", "36.5 [35.1, 38.0]"]
    assert list(rows) == ["`Copy()`"]  # what was not measured has no row
    assert "Documents: young 64, repo 60;" in text and "young 0.868, repo –" in text


def test_peers_and_differences(tmp_path):
    metrics = {"repo.n40.kvzip.at8.slots": 836.0, **interval("repo.n40.kvzip.at8.hgr", -1.642, -2.077, -1.257)}
    metrics |= difference("young.n8.linesdiff.copy.window", -0.01, -0.021, 0.001)
    write(tmp_path, "hgr-qwen1.5b", metrics)
    rows = {row[0]: row[1:] for row in rows_of(render("hgr-peers", tmp_path))}
    assert rows["KVzip, 8 entries a chunk"] == ["–", "–", "–", "836", "−164.2 [−207.7, −125.7]", "–"]
    row = rows_of(render("hgr-differences", tmp_path))[0]
    assert row == ["copying", "raw window", "–", "−1.0 [−2.1, +0.1]", "–", "–"]


def test_sizes_need_all_three_hosts(tmp_path):
    for name in ("smollm2-135m", "qwen0.5b", "qwen1.5b"):
        assert "not measured yet" in render("hgr-sizes", tmp_path)
        write(tmp_path, f"hgr-{name}", {"young.n8.copy.hgr": len(name) / 100, "young.n8.copy.lines": 0.5})
    text = render("hgr-sizes", tmp_path)
    assert rows_of(text)[0] == ["copying", "12.0", "50.0", "8.0", "50.0", "8.0", "50.0"]
    assert text.count("python -m eval.run hgr-") == 3  # every command that made it


def test_the_small_host_and_prose(tmp_path):
    metrics = interval("prose.logs.n8.copy.hgr", 0.79, 0.68, 0.86) | {"prose.logs.n8.documents": 16.0}
    write(tmp_path, "hgr-smollm2-135m", metrics | {"files.n8.soft.hgr": 0.1, "prose.n8.domains": 9.0})
    assert rows_of(render("hgr-prose", tmp_path)) == [["logs", "79.0 [68.0, 86.0]", "–", "–", "–", "–", "16"]]
    text = render("hgr-small", tmp_path)
    assert rows_of(text)[2] == ["`SoftPrompts()`", "–", "–", "–", "–", "10.0", "–", "–"] and "mean of 9 kinds" in text
    write(tmp_path, "hgr-smollm2-135m", {"prose.recipes.n8.documents": 3.0})
    with pytest.raises(InputError, match="no name for the prose of recipes"):
        render("hgr-prose", tmp_path)


def test_what_the_readme_says_beside_its_tables_was_measured():
    large, small, asked = (metrics_of(name) for name in ("hgr-qwen1.5b", "hgr-smollm2-135m", "questions-qwen1.5b"))
    text = " ".join(README.read_text(encoding="utf-8").split())
    slots, full = (large[f"repo.n40.{arm}.slots"] for arm in ("retrieve2", "full"))
    assert f"{slots:,.0f} instead of {full:,.0f} is {full / slots:.0f}x fewer" in text
    smaller = large["bytes_a_token.full"] / large["bytes_a_token.full_quantised4"]
    assert f"a full cache in 4 bits, {smaller:.1f}x smaller" in text
    assert (
        f"KVzip's and SnapKV's answers to questions rest on {asked['nq.16k.kvzip.at8.questions']:.0f} of them" in text
    )
    assert f"and recovers {100 * small['prose.n8.copy_rebuilt.hgr']:.0f}% on prose" in text


def holds_zero(metrics, key):
    return metrics[f"{key}.lo"] <= 0 <= metrics[f"{key}.hi"]


def test_what_the_readme_claims_of_the_large_host_is_what_the_intervals_say():
    large, asked = metrics_of("hgr-qwen1.5b"), metrics_of("questions-qwen1.5b")
    for name in ("young.n8", "repo.n40"):
        # retrieval: level with a longer window, far ahead of chance
        for kind in ("diff", "linesdiff"):
            assert holds_zero(large, f"{name}.{kind}.retrieve2.longer_same_slots_retrieve2")
            assert large[f"{name}.{kind}.retrieve2.retrieve2_random.lo"] > 0
        # copying: gains over the window, likelihood beside retrieval, nothing beside the default; lines never go
        assert large[f"{name}.diff.copy.window.lo"] > 0 < large[f"{name}.linesdiff.copy.window.lo"]
        assert large[f"{name}.diff.retrieve2_copy.retrieve2.lo"] > 0
        for kind in ("diff", "linesdiff"):
            assert holds_zero(large, f"{name}.{kind}.compact32_retrieve2_copy.compact32_retrieve2")
        for other in ("retrieve2", "compact32_retrieve2"):
            assert large[f"{name}.linesdiff.{other}_copy.{other}.lo"] > -0.005
        # soft prompts: nothing of their own
        assert holds_zero(large, f"{name}.diff.soft.shuffled") and holds_zero(large, f"{name}.soft.hgr")
        assert large[f"{name}.full_quantised4_channels.hgr.lo"] > 0.99
        # compaction: ahead of SnapKV and a longer window; with retrieval far more than retrieval alone
        assert large[f"{name}.diff.compact8.snapkv.at8.lo"] > 0 < large[f"{name}.diff.compact8.longer_same_slots.lo"]
        assert large[f"{name}.diff.compact32_retrieve2.retrieve2.lo"] > 0.2
    young, repo = "young.n8", "repo.n40"
    assert large[f"{young}.diff.compact128.snapkv.at128.lo"] > 0 > large[f"{young}.diff.compact8.kvzip.at8.hi"]
    assert large[f"{young}.diff.compact128.longer_same_slots_at128.lo"] > 0
    assert holds_zero(large, f"{young}.diff.compact128.kvzip.at128")
    assert -0.02 < large[f"{young}.linesdiff.compact128.kvzip.at128.hi"] < 0
    assert large[f"{repo}.diff.compact128.kvzip.at128.lo"] > 0 > large[f"{young}.diff.compact32.kvzip.at32.hi"]
    assert large[f"{repo}.linesdiff.compact8.longer_same_slots.hi"] < 0
    # budgets are worth about twice the pairs; the default keeps most of a repository in an eighth of the slots
    assert abs(large[f"{young}.compact64.hgr"] - large[f"{young}.compact128_equal.hgr"]) < 0.05
    assert large[f"{repo}.compact32_retrieve2.hgr.lo"] > 0.8
    assert (large[f"{repo}.compact32_retrieve2.slots"] - large[f"{repo}.window.slots"]) * 8 <= 40 * 512
    assert holds_zero(large, f"{repo}.linesdiff.compact32_retrieve2.full")
    assert large[f"{young}.linesdiff.compact32_retrieve2.full.hi"] < 0
    assert large["young.n8.full_quantised4.hgr.hi"] < 0
    assert large["young.n8.diff.kvzip.at128.retrieve2.lo"] > 0 > large["repo.n40.kvzip.at8.hgr.hi"]
    for name in ("xquad", "nq"):
        assert holds_zero(asked, f"{name}.16k.diff.retrieve4.full")
    assert holds_zero(asked, "xquad.16k.diff.compact32_retrieve2.full")
    assert asked["nq.16k.diff.compact32_retrieve2.full.hi"] < 0


def test_what_the_readme_claims_of_copying():
    seen, unseen = metrics_of("hgr-qwen1.5b"), metrics_of("hgr-unseen-qwen1.5b")
    small, small_unseen = metrics_of("hgr-smollm2-135m"), metrics_of("hgr-unseen-smollm2-135m")
    for shipped, other in ((seen, unseen), (small, small_unseen)):  # nearly as well on a host that it never saw
        assert other["young.n8.copy_fitted.hgr"] > 0.93 * shipped["young.n8.copy.hgr"]
        assert other["young.n8.linesdiff.copy_fitted.window.lo"] > 0
    assert unseen["young.n8.copy_fitted.hgr"] > 0.97 * seen["young.n8.copy_fitted.hgr"]
    free, again = metrics_of("free-qwen1.5b"), metrics_of("updates-qwen1.5b")
    for name in ("young", "prose"):  # beside the default more names are right, and prose repeats itself less
        assert free[f"{name}.compact32_retrieve2_copy.exact.minus_plain.lo"] > 0
    assert free["prose.compact32_retrieve2_copy.repetition.minus_plain.hi"] < 0
    near = metrics_of("near-matches-qwen1.5b")
    assert near["copy.old.lo"] > near["full.old"] > near["window.old"] == 0
    assert abs(near["compact32_retrieve2_copy.old"] - near["full.old"]) < 0.02
    assert abs(near["retrieve2_copy.old"] - near["full.old"]) < 0.02
    near = metrics_of("near-matches-smollm2-135m")
    assert near["retrieve2_copy.old.lo"] > near["retrieve2.old.hi"]
    for times in (3, 10, 32):
        assert again[f"u{times}.copy.new"] > 0.5 and again[f"u{times}.full.new"] < 0.02
        assert again[f"u{times}.compact32_retrieve2_copy.new"] < 0.06


def test_what_the_readme_claims_of_rulers_tasks_and_of_time():
    ruler, cost = metrics_of("ruler-qwen1.5b"), metrics_of("generation-gpu")
    share = {arm: ruler[f"ruler_vt.8k.{arm}.accuracy"] / ruler["ruler_vt.8k.full.accuracy"]
             for arm in ("retrieve2", "compact32_retrieve2", "compact64_retrieve2")}  # fmt: skip
    assert share["retrieve2"] < 1 / 3 and 0.48 < share["compact32_retrieve2"] < share["compact64_retrieve2"]
    assert ruler["niah_single_1.8k.compact128.accuracy"] < 0.1 < 0.9 < ruler["niah_single_1.8k.retrieve2.accuracy"]
    for way in ("compact_", "mix_"):
        assert cost[f"qwen1.5b.32k.b1.{way}ttft_speedup"] < 1 < cost[f"qwen1.5b.128k.b1.{way}ttft_speedup"]
    assert cost["qwen1.5b.32k.b1.mix_decode_ms"] > cost["qwen1.5b.32k.b1.full_decode_ms"]
