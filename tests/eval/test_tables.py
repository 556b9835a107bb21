import json
import re

import pytest

from eval import tables
from eval.results import FOLDER
from eval.tables import README, TABLES, main, render, rewrite
from hf_crouter.errors import InputError

TEXT = "Before\n<!-- table: tra-mini -->\nold\n<!-- end -->\nAfter <!-- a comment -->\n"


def write(folder, name, metrics):
    origin = {"command": f"python -m eval.run {name} --seed 3", "device": "a device", "date": "2026-01-02"}
    result = {"name": name, **origin, "metrics": metrics}
    (folder / f"{name}.json").write_text(json.dumps(result))


def test_the_readme_shows_what_was_measured(capsys):
    text = README.read_text(encoding="utf-8")
    assert sorted(re.findall(r"<!-- table: (\S+) -->", text)) == sorted(TABLES)
    assert main(["--check"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("name", TABLES)
def test_a_result_that_is_missing_is_a_row_that_says_so(name, tmp_path):
    lines = render(name, tmp_path).splitlines()
    assert lines[2].startswith("| not measured yet | ") and lines[2].count("|") == lines[0].count("|")
    assert lines[-1].startswith("Host: ") and len(lines) == 5
    assert f"`python -m eval.run {TABLES[name].experiment or TABLES[name].result}`" in lines[-1]


@pytest.mark.parametrize("name", TABLES)
def test_host_device_and_command_are_named(name, tmp_path):
    result = TABLES[name].result
    write(tmp_path, result, {})
    last = render(name, tmp_path).splitlines()[-1]
    assert re.fullmatch(
        rf"Host: .+\. Device: a device\. Made by `python -m eval.run {result} --seed 3` \(.*\)\.", last
    )


def test_tra_mini(tmp_path):
    metrics = {"code.files.tra": 0.98724, "code.files.nll": 0.05734, "code.files.chunks": 2048.0}
    write(tmp_path, "tra-mini", {"params": 15968160.0, "train.seconds": 470.0, "train.tokens": 1e6, **metrics})
    lines = render("tra-mini", tmp_path).splitlines()
    assert lines[2] == "| held-out files | 98.72% | 0.057 | 2,048 |"
    assert lines[3] == "| held-out packages | – | – | – |" and len(lines[2:]) == 6 + 4
    assert lines[9] == "15,968,160 parameters; trained for 470 seconds on 1,000,000 tokens, MFU –."


def interval(key, value, low, high):
    return {key: value, f"{key}.lo": low, f"{key}.hi": high}


def difference(key, value, low, high):
    return {f"{key}.mean": value, f"{key}.lo": low, f"{key}.hi": high}


def rows_of(text):
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")][2:]


def test_hgr(tmp_path):
    metrics = {"young.n8.window.slots": 516.0, **interval("young.n8.window.hgr", 0.0, 0.0, 0.0)}
    metrics |= {"young.n8.copy.slots": 516.0, **interval("young.n8.copy.hgr", 0.7281, 0.7025, 0.7537)}
    metrics |= {
        "young.n8.copy_fitted.hgr": 0.9,
        **interval("prose.n8.retrieve2_oracle_copy_fitted.hgr", 1.365, 1.28, 1.4781),
    }
    metrics |= {f"{name}.n8.retrieve2_oracle.documents": 150.0 for name in tables.HGR_SETS} | {"young.n8.tra": 0.96071}
    write(tmp_path, "hgr-smollm2-135m", metrics)
    text = render("hgr", tmp_path)
    rows = {row[0]: row[1:] for row in rows_of(text)}
    assert rows["raw window"] == ["516", "0.0", "–", "–", "–"]
    assert rows["copying"] == ["516", "72.8 [70.2, 75.4]", "–", "–", "–"]  # the gate that ships, not the one for it
    assert rows["best 2 chunks, by an oracle, + copying †‡"] == ["–", "–", "–", "–", "136.5 [128.0, 147.8]"]
    assert "; 150 documents each" in text and "young 96.1%, files –" in text


def test_only_ways_with_a_gate_of_their_own_are_marked():
    with_gate = {arm for arm, label in tables.HGR_WAYS.items() if "†" in label}
    assert with_gate == {arm for arm in tables.HGR_WAYS if arm.endswith("_fitted")}


def test_lm_eval(tmp_path):
    metrics = {"ruler_vt.4096.full": 0.125, "ruler_vt.4096.full.se": 0.0312, "ruler_vt.8192.soft_retrieve2_copy": 1.0}
    write(tmp_path, "lm-eval", {**metrics, "slots.4096.full": 4012.0})
    text = render("lm-eval", tmp_path)
    rows = {row[0]: row[1:] for row in rows_of(text)}
    assert rows["`ruler_vt`: variables traced"] == ["12 ± 3", "–", "–", "100"]  # of two arms and two lengths
    assert rows["KV slots"] == ["4,012", "–", "–", "–"] and len(rows) == len(tables.RULER_TASKS) + 1


def test_kvpress_and_routing(tmp_path):
    metrics = interval("young.n8.snapkv.at8.hgr", -0.276, -0.449, -0.138)
    write(
        tmp_path, "hgr-smollm2-135m", {**metrics, "young.n8.snapkv.at8.slots": 580.0, "prose.n8.snapkv.at8.hgr": -0.4}
    )
    rows = {row[0]: row[1:] for row in rows_of(render("kvpress", tmp_path))}
    assert rows["SnapKV that keeps the raw window"] == ["–"] * 5
    assert ["SnapKV", "580", "−27.6 [−44.9, −13.8]", "–", "–", "−40.0"] in rows_of(render("kvpress", tmp_path))
    measured = {"chunk.argmin.accuracy": 0.98, "chunk.accuracy": 0.95, "chunk.unseen.far.auroc": 0.99,
                "baseline.ngram.accuracy": 0.97, "baseline.ngram.bytes": 16e6, "expert.bytes": 1e6,
                "baseline.perplexity.accuracy": 0.96, "expert.host.bytes": 3e6,
                "baseline.ngram.pattern.unseen.near.auroc": 0.9, "baseline.ngram.unseen.far.auroc": 0.1}  # fmt: skip
    write(tmp_path, "routing", measured)
    rows = rows_of(render("routing", tmp_path))
    assert rows[0] == ["residual", "98.0", "–", "–", "99.0", "1,000"]
    assert rows[1] == ["character n-grams", "97.0", "–", "90.0", "–", "2,000"] and len(rows) == 3
    assert rows[2] == ["host's loss under each adapter", "96.0", "–", "–", "–", "3,000"]


def test_routing_hosts_and_costs(tmp_path):
    measured = {"host.python.base": 1.5, "host.python.routed": 1.41, "host.python.oracle": 1.4,
                "host.unseen.base": 2.5, "continual.8.python.sequential": 1.75, "cost.8.all.ms": 112.4,
                "cost.8.all.flops": 2.84e11}  # fmt: skip
    write(tmp_path, "routing", measured)
    assert rows_of(render("routing-host", tmp_path)) == [["python", "1.500", "1.410", "1.400", "1.750", "–"]]
    assert rows_of(render("routing-costs", tmp_path)) == [["8", "all", "112", "–", "284"]]


def test_drafts(tmp_path):
    write(
        tmp_path, "reading-drafts", {**interval("drafts.copy.tokens_a_step", 1.5, 1.25, 2.0), "drafts.copy.same": 1.0}
    )
    assert rows_of(render("drafts", tmp_path)) == [["copying", "1.50 [1.25, 2.00]", "100"]]


def test_retrieval_questions(tmp_path):
    metrics = interval("nq.64.overlap.k2.found", 0.453, 0.414, 0.494)
    write(tmp_path, "retrieval-questions", {**metrics, "nq.64.questions": 600.0})
    text = render("retrieval-questions", tmp_path)
    assert rows_of(text)[0][1:] == ["–", "45.3 [41.4, 49.4]", "–", "–", "–"] and "Questions: –, 600, –" in text


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


def test_reading(tmp_path):
    metrics = interval("nextline.copy.exact", 0.128, 0.105, 0.151) | interval(
        "nextline.copy.right_tokens", 3.7, 3, 4.5
    )
    metrics |= interval("nextline.copy_minus_window", 0.017, -0.003, 0.032)
    metrics |= interval("passkey.32k.copy.accuracy", 0.46, 0.32, 0.6) | {"passkey.4k.copy.samples": 50.0}
    metrics |= interval("identifiers.soft_retrieve2_bm25_copy.whole", 0.32, 0.27, 0.38)
    metrics |= interval("manners.near.copy.wrong_copied", 0.96, 0.9, 1.0)
    write(tmp_path, "reading", metrics)
    assert rows_of(text := render("nextline", tmp_path))[1] == [
        "copying", "12.8 [10.5, 15.1]", "–", "3.70 [3.00, 4.50]", "–", "–"
    ]  # fmt: skip
    assert "copying +1.7 [−0.3, +3.2], all three ways –." in text
    assert ["passkey", "32k", "–", "–", "–", "46 [32, 60]", "–", "–"] in rows_of(render("retrieval", tmp_path))
    assert rows_of(render("identifiers", tmp_path))[3][1:] == ["–", "32.0 [27.0, 38.0]"]
    assert rows_of(render("near-matches", tmp_path))[1] == ["copying", "–", "96 [90, 100]"]


def test_costs(tmp_path):
    write(tmp_path, "training-gpu", {"wide.b128.mfu": 0.410646, "wide.b128.tokens_per_second": 773930.2})
    write(tmp_path, "suffix-index", {"1m.query.us": 97.1, "1m.build.seconds": 0.2527})
    write(tmp_path, "retrieval-choice", {"2k.choose.ms": 0.9025})
    assert rows_of(render("training-gpu", tmp_path))[1] == ["6 + 6 layers, 512 wide", "128", "773,930", "41.1%"]
    assert rows_of(render("suffix-index", tmp_path))[2] == ["1m", "97", "–", "0.25", "–", "–"]
    assert rows_of(render("retrieval-choice", tmp_path))[1] == ["2k", "0.9", "–", "–", "–"]


def test_demo(tmp_path):
    metrics = {"worth": 0.4925, "tra.mean": 0.933, "copied": 12.0, "soft.slots": 1135.0, "all.slots": 1135.0}
    metrics |= {"all.loss": 2.1, "all.kv_bytes": 3 * 2.0**20, "all.recovered": -0.0123}
    write(tmp_path, "demo", metrics)
    text = render("demo", tmp_path)
    assert rows_of(text)[3] == ["raw window + soft prompts + copying", "2.1000", "1,135", "3.0", "−1.2%"]
    assert rows_of(text)[0][1:] == ["–"] * 4 and "worth 0.492 nats/token" in text and "copied: 12." in text
    write(tmp_path, "demo", metrics | {"all.slots": 2159.0})
    assert rows_of(render("demo", tmp_path))[3][0] == "raw window + soft prompts + copying + recall"


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


def test_compress_cpu(tmp_path):
    metrics = {f"{length}.{arm}.seconds": 1.234 for length in ("32k", "512", "2k")
               for arm in ("encode", "residual", "prefill")}  # fmt: skip
    metrics |= {"2k.encode.ratio": 3.456, "crossover.encode.tokens": 1234.5}
    write(tmp_path, "compress-cpu", metrics)
    lines = render("compress-cpu", tmp_path).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:5]] == ["| 512", "| 2k", "| 32k"]
    assert lines[3] == "| 2k | 1.23 | 1.23 | 1.23 | 3.46x | – |"
    assert lines[6] == "Cheaper than prefill: encode from 1,234 tokens, encode with residual at no length."


def test_only_what_stands_between_the_markers_changes(tmp_path, capsys):
    file = tmp_path / "README.md"
    file.write_text(TEXT)
    words = [str(file), "--results", str(tmp_path)]
    assert main([*words, "--check"]) == 1 and file.read_text() == TEXT
    assert capsys.readouterr().err == "README.md: table tra-mini is stale; run python -m eval.tables\n"
    assert main(words) == 0
    fresh = file.read_text()
    assert fresh.startswith("Before\n<!-- table: tra-mini -->\n\n| text |")
    assert fresh.endswith("\n\n<!-- end -->\nAfter <!-- a comment -->\n") and "old" not in fresh
    assert main([*words, "--check"]) == 0
    write(tmp_path, "tra-mini", {"random.tra": 0.5})
    assert main([*words, "--check"]) == 1
    assert main(words) == 0 and "50.00%" in file.read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "tra-mini.json"]


@pytest.mark.parametrize(
    ("text", "match"),
    [(TEXT.replace("tra-mini", "nothing"), "no table is called nothing"),
     (TEXT.replace("end", "stop"), "expected <!-- end"),
     (TEXT.replace("<!-- end -->", "<!-- table: demo -->\n<!-- end -->"), "expected <!-- end")],
)  # fmt: skip
def test_wrong_markers_are_refused(text, match, tmp_path, capsys):
    with pytest.raises(InputError, match=match):
        rewrite(text, tmp_path)
    (tmp_path / "x.md").write_text(text)
    assert main([str(tmp_path / "x.md")]) == 2 and capsys.readouterr().err.count("\n") == 1


def test_a_damaged_result_is_refused(tmp_path, capsys):
    (tmp_path / "tra-mini.json").write_text("{}")
    (tmp_path / "x.md").write_text(TEXT)
    assert main([str(tmp_path / "x.md"), "--results", str(tmp_path)]) == 2
    assert "expected a result of eval.run" in capsys.readouterr().err
    assert main([str(tmp_path / "none.md")]) == 2


def test_every_result_has_the_one_format_and_no_path_of_a_machine():
    assert tables.FOLDER == FOLDER and list(FOLDER.glob("*.json"))
    for path in FOLDER.glob("*.json"):
        text = path.read_text(encoding="utf-8")
        result = json.loads(text, parse_constant=pytest.fail)
        assert list(result) == ["name", "command", "commit", "date", "device", "versions", "seed", "config", "metrics",
                                "notes"]  # fmt: skip
        assert result["name"] == path.stem and result["command"].startswith("python -m eval.run ")
        assert all(isinstance(value, int | float) for value in result["metrics"].values())
        assert not re.search(r"(^|[ \"=])(/|~/|\.\w)", result["command"]), result["command"]
