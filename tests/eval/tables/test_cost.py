from eval.tables.cost import generation_table
from eval.tables.readme import render

from .results import rows_of, write


def test_costs(tmp_path):
    write(tmp_path, "training-gpu", {"wide.b128.mfu": 0.410646, "wide.b128.tokens_per_second": 773930.2})
    write(tmp_path, "suffix-index", {"1m.query.us": 97.1, "1m.build.seconds": 0.2527})
    write(tmp_path, "retrieval-choice", {"2k.choose.ms": 0.9025})
    assert rows_of(render("training-gpu", tmp_path))[1] == ["6 + 6 layers, 512 wide", "128", "773,930", "41.1%"]
    assert rows_of(render("suffix-index", tmp_path))[2] == ["1m", "97", "–", "0.25", "–", "–"]
    assert rows_of(render("retrieval-choice", tmp_path))[1] == ["2k", "0.9", "–", "–", "–"]


def test_compress_cpu(tmp_path):
    metrics = {f"{length}.{arm}.seconds": 1.234 for length in ("32k", "512", "2k")
               for arm in ("encode", "reconstruction_nll", "prefill")}  # fmt: skip
    metrics |= {"2k.encode.ratio": 3.456, "crossover.encode.tokens": 1234.5}
    write(tmp_path, "compress-cpu", metrics)
    lines = render("compress-cpu", tmp_path).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:5]] == ["| 512", "| 2k", "| 32k"]
    assert lines[3] == "| 2k | 1.23 | 1.23 | 1.23 | 3.46x | – |"
    assert lines[6] == "Cheaper than prefill: encode from 1,234 tokens, encode with NLL at no length."


def test_generation():
    metrics = {"qwen1.5b.128k.b1.full_ttft_seconds": 20.0, "qwen1.5b.8k.b1.full_ttft_seconds": 0.5}
    metrics |= {
        "qwen1.5b.8k.b1.ttft_seconds": 0.125,
        "qwen1.5b.8k.b1.ttft_speedup": 4.0,
        "qwen1.5b.8k.b1.kv_ratio": 4.02,
    }
    metrics |= {"qwen1.5b.32k.b1.full_decode_ms": 21.04, "qwen1.5b.8k.b1.compact_bound_gib": 0.158}
    rows = rows_of("\n".join(generation_table(metrics)))
    assert [row[0] for row in rows] == ["8k", "8k", "32k", "128k"]
    assert rows[1] == ["8k", "`Retrieve(2)`", "0.12", "4.00x", "–", "4.0", "–"] and rows[2][-1] == "21.0"
    metrics |= {"compact.ms": 3.14, "compact.read_ms": 12.5, "compact.cost_ratio": 0.2512}
    lines = generation_table(metrics)
    assert "3.1 ms beside 12.5 ms of the read itself (25%) in a prompt" in lines[-3]
    assert lines[-1].endswith("GiB: 0.16 at 8k.")
    assert "not measured yet" in generation_table({})[2]
