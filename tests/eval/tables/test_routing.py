from eval.tables.readme import render

from .results import rows_of, write


def test_routing(tmp_path):
    measured = {"chunk.argmin.accuracy": 0.98, "chunk.accuracy": 0.95, "chunk.unseen.far.auroc": 0.99,
                "baseline.ngram.accuracy": 0.97, "baseline.ngram.bytes": 16e6, "expert.bytes": 1e6,
                "baseline.perplexity.accuracy": 0.96, "expert.host.bytes": 3e6,
                "baseline.ngram.pattern.unseen.near.auroc": 0.9, "baseline.ngram.unseen.far.auroc": 0.1}  # fmt: skip
    write(tmp_path, "routing", measured)
    rows = rows_of(render("routing", tmp_path))
    assert rows[0] == ["reconstruction NLL", "98.0", "–", "–", "99.0", "1,000"]
    assert rows[1] == ["character n-grams", "97.0", "–", "90.0", "–", "2,000"] and len(rows) == 3
    assert rows[2] == ["host's loss under each adapter", "96.0", "–", "–", "–", "3,000"]


def test_routing_hosts_and_costs(tmp_path):
    measured = {"host.python.base": 1.5, "host.python.routed": 1.41, "host.python.oracle": 1.4,
                "host.unseen.base": 2.5, "continual.8.python.sequential": 1.75, "cost.8.all.ms": 112.4,
                "cost.8.all.flops": 2.84e11}  # fmt: skip
    write(tmp_path, "routing", measured)
    assert rows_of(render("routing-host", tmp_path)) == [["python", "1.500", "1.410", "1.400", "1.750", "–"]]
    assert rows_of(render("routing-costs", tmp_path)) == [["8", "all", "112", "–", "284"]]
