from eval.tables.readme import render

from .results import interval, rows_of, write


def test_reading(tmp_path):
    metrics = interval("nextline.copy.exact", 0.128, 0.105, 0.151) | interval(
        "nextline.copy.right_tokens", 3.7, 3, 4.5
    )
    metrics |= interval("nextline.copy_minus_window", 0.017, -0.003, 0.032)
    metrics |= interval("passkey.32k.copy.accuracy", 0.46, 0.32, 0.6) | {"passkey.4k.copy.samples": 50.0}
    metrics |= interval("identifiers.soft_retrieve2_bm25_copy.whole", 0.32, 0.27, 0.38)
    write(tmp_path, "reading", metrics)
    assert rows_of(text := render("nextline", tmp_path))[1] == [
        "copying", "12.8 [10.5, 15.1]", "–", "3.70 [3.00, 4.50]", "–", "–"
    ]  # fmt: skip
    assert "copying +1.7 [−0.3, +3.2], all three ways –." in text
    assert ["passkey", "32k", "–", "–", "–", "46 [32, 60]", "–", "–"] in rows_of(render("retrieval", tmp_path))
    assert rows_of(render("identifiers", tmp_path))[3][1:] == ["–", "32.0 [27.0, 38.0]"]


def test_near_matches(tmp_path):
    write(tmp_path, "near-matches-smollm2-135m", interval("copy.old", 0.96, 0.9, 1.0))
    write(tmp_path, "near-matches-qwen0.5b", {"copy.old": 0.25})
    write(tmp_path, "near-matches-qwen1.5b", {"copy.new": 0.5})
    rows = [["raw window, copying", "–", "96 [90, 100]", "–", "25", "50", "–"]]  # of ways that were measured
    assert rows_of(render("near-matches", tmp_path)) == rows


def test_drafts(tmp_path):
    write(
        tmp_path, "reading-drafts", {**interval("drafts.copy.tokens_a_step", 1.5, 1.25, 2.0), "drafts.copy.same": 1.0}
    )
    write(tmp_path, "reading-drafts-qwen1.5b", {"drafts.window.tokens_a_step": 2.0, "drafts.window.speedup": 1.5})
    assert rows_of(render("drafts", tmp_path)) == [
        ["135M, float32 on a CPU", "copying", "1.50 [1.25, 2.00]", "–", "100"],
        ["1.5B, bfloat16 on a GPU", "raw window", "2.00", "1.50", "–"],
    ]


def test_updates(tmp_path):
    write(tmp_path, "updates-qwen1.5b", {"u3.full.new": 0.25, "u3.full.old": 0.5, "u3.copy.new": 1.0})
    text = render("updates", tmp_path)
    assert "| set 3 times: latest | set 3 times: older |" in text
    assert rows_of(text) == [["raw window, copying", "100", "–"], ["full history", "25", "50"]]


def test_free_generation_and_the_difference(tmp_path):
    metrics = {"young.window.repetition": 0.5, **interval("young.copy.repetition", 0.25, 0.2, 0.3)}
    metrics |= interval("young.copy.repetition.minus_plain", -0.25, -0.3, -0.2)
    write(tmp_path, "free-qwen1.5b", metrics)
    assert rows_of(render("free", tmp_path)) == [
        ["raw window", "50", "–", "–", "–"],
        ["raw window, copying", "25 [20, 30]", "–", "–", "–"],
        ["– the difference", "−25 [−30, −20]", "–", "–", "–"],
    ]


def test_demo(tmp_path):
    metrics = {"worth": 0.4925, "tra.mean": 0.933, "copied": 12.0, "soft.slots": 1135.0, "all.slots": 1135.0}
    metrics |= {"all.loss": 2.1, "all.kv_bytes": 3 * 2.0**20, "all.recovered": -0.0123}
    write(tmp_path, "demo", metrics)
    text = render("demo", tmp_path)
    assert rows_of(text)[4] == ["raw window + soft prompts + copying", "2.1000", "1,135", "3.0", "−1.2%"]
    assert rows_of(text)[0][1:] == ["–"] * 4 and "worth 0.492 nats/token" in text and "copied: 12." in text
