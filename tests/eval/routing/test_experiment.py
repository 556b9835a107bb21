"""The whole routing measurement on tiny models and two kinds of text of the standard library."""

import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from eval import run as command
from eval.routing import cost
from eval.routing.data import excerpts
from eval.routing.mixed import mixed_documents
from eval.routing.report.figures import Figures
from eval.routing.report.picture import draw_confusion
from eval.routing.report.routes import compared_figures, shortlist_figures
from eval.routing.windows import Record, TestWindows
from hf_crouter.data.documents import Document
from hf_crouter.data.tokens import encode_documents, plain_tokenizer
from hf_crouter.errors import InputError

from ...data.samples import LIBRARY
from ...tiny import tiny_crouter, tiny_host
from ...trained_crouter import make_tokenizer

CHUNK = 32
KNOWN = ("python", "wiki_en")
SOURCES = ("argparse", "ast", "calendar", "cmd", "codecs", "configparser", "csv", "difflib", "dis", "gettext", "glob",
           "heapq", "inspect", "mailbox", "netrc", "pdb", "pprint", "queue", "random", "sched", "shelve", "trace",
           "uuid", "zipapp")  # fmt: skip


def texts(kind):
    for i, name in enumerate(SOURCES):
        text = (LIBRARY / f"{name}.py").read_text(encoding="utf-8")[:4000]
        if kind == "wiki_en":
            text = " ".join(reversed(text.upper().split()))
        elif kind == "csv_tables":
            text = ",".join(str(i * number) for number in range(900))
        elif kind == "speeches_en":
            text = text.replace("e", "o").replace("(", ";")
        yield Document(f"{kind}/{name}", name, text)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("routing")
    tokenizer = make_tokenizer(text="".join(document.text for document in texts("python"))[:60_000])
    crouter = tiny_crouter(vocab_size=len(tokenizer), chunk_length=CHUNK)
    host = tiny_host(vocab_size=len(tokenizer))
    for model, name in ((crouter, "crouter"), (host, "host")):
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    plain, data = plain_tokenizer(tokenizer), root / "data"
    rows, records = [], []
    for domain in (*KNOWN, "speeches_en", "csv_tables"):
        documents = list(texts(domain))
        parts = {"train": documents[:10], "calibration": documents[10:18]} if domain in KNOWN else {}
        for part, some in parts.items():
            (data / domain).mkdir(parents=True, exist_ok=True)
            encode_documents(some, plain, separator_id=0, workers=1).save(data / domain / f"{part}.safetensors")
        for document in documents[18:]:
            ids = np.array(plain.encode(document.text, add_special_tokens=False).ids, dtype=np.uint16)
            for start in (0, 2 * CHUNK):
                rows.append(ids[start : start + 2 * CHUNK])
                records.append(Record(domain, document.id, start, 0.0))
    TestWindows(np.stack(rows), records).save(data)
    mixed_documents(list(texts("python")), plain, seed=0, archives=False, chunk=CHUNK).save(data)
    mixed_documents(list(texts("python"))[10:18], plain, seed=0, archives=False, chunk=CHUNK).save(data, "mixed_fit")
    return root


def arguments(world, stage, *more):
    return ["routing", stage, "--data", str(world / "data"), "--save", str(world / "save"), "--host",
            str(world / "host"), "--crouter", str(world / "crouter"), "--domains", *KNOWN, "--pieces", "6", "--limit",
            "30", "--draws", "20", *more]  # fmt: skip


OPTIONS = {"window": 64, "compressor_batch_size": 4, "host_batch_size": 2, "compressor_rank": 2, "host_rank": 2,
           "calibration_chunks": 16}  # fmt: skip


@pytest.mark.slow
def test_trains_measures_and_reports(world, monkeypatch):
    monkeypatch.setenv("CROUTER_RESULTS", str(world / "results"))
    monkeypatch.setattr(cost, "SIZES", (2, 3))
    torch.set_num_threads(1)
    options = ("--steps", "3", "3", "--options", json.dumps(OPTIONS), "--continual")
    for shard in ("0/2", "1/2"):
        assert command.main(arguments(world, "train", *options, "--compared", *KNOWN, "--shard", shard)) == 0
    assert command.main(arguments(world, "text")) == 0
    assert command.main(arguments(world, "measure")) == 0
    assert command.main(arguments(world, "decide")) == 0
    made = {path.stem for path in (world / "save" / "parts").glob("*.safetensors")}
    assert made == {
        "reconstruction",
        "routes",
        "borders",
        "changing",
        "host",
        "probe",
        "shortlist",
        "shortlisted",
        "arrow",
        "latency",
        "compared",
        "text",
    }
    assert command.main(arguments(world, "report")) == 0
    result = json.loads((world / "results" / "routing.json").read_text())
    found = result["metrics"]
    wanted = ["chunk.accuracy", "chunk.accuracy.lo", "span128.accuracy", "unseen.near.auroc", "unseen.far.auroc",
              "unseen.far.false_accepts", "border.median_tokens", "border.docstrings.median_tokens",
              "border.own.docstrings.median_tokens",
              "forgetting.max_abs_delta", "forgetting.sequential.max_abs_delta", "oracle.loss_ratio", "cost.switch.ms",
              "lag.chunks", "cost.2.all.ms", "cost.3.shortlist.flops", "expert.bytes", "joint.loss_ratio",
              "shortlist2.recall", "shortlist2.accuracy", "host.python.oracle", "host.unseen.routed",
              "compared.full.accuracy",
              "compared.small.bytes", "compared.expert.margin", "host.python.large",
              "chunk.gain.unseen.far.auroc"]  # fmt: skip
    wanted += [f"baseline.{name}.accuracy" for name in ("ngram", "tfidf", "perplexity", "probe", "arrow")]
    assert [key for key in wanted if key not in found] == []
    assert found["added.bit_difference"] == 0
    assert found["baseline.ngram.accuracy"] > 0.9  # upper case against code
    shares = [found[f"confusion.python.{name}"] for name in (*KNOWN, "base")]
    assert sum(shares) == pytest.approx(1, abs=1e-5)
    picture = world / "results" / "routing-confusion.svg"
    first = picture.read_bytes()
    draw_confusion(found, picture)
    assert picture.read_bytes() == first
    assert str(world) not in json.dumps(result)


def test_goes_on_with_what_is_missing(world, capsys):
    part = world / "save" / "parts" / "text.safetensors"
    part.parent.mkdir(parents=True, exist_ok=True)
    assert command.main(arguments(world, "text")) == 0
    capsys.readouterr()
    assert command.main(arguments(world, "text")) == 0
    assert "done before" in capsys.readouterr().out


def test_says_what_is_missing(world, tmp_path, capsys):
    assert command.main(["routing", "report", "--data", str(tmp_path), "--save", str(tmp_path)]) == 2
    assert "eval.routing.data" in capsys.readouterr().err


def test_measuring_needs_experts(world, tmp_path, capsys):
    words = arguments(world, "measure")
    words[words.index("--save") + 1] = str(tmp_path)
    assert command.main(words) == 2
    assert "run the stage `train`" in capsys.readouterr().err


def test_a_picture_needs_figures(tmp_path):
    with pytest.raises(InputError, match="confusion"):
        draw_confusion({"chunk.accuracy": 1.0}, tmp_path / "a.svg")


def test_excerpts_stop_at_the_limit():
    tokenizer = plain_tokenizer(Tokenizer.from_str(make_tokenizer().backend_tokenizer.to_str()))
    array = excerpts(list(texts("python"))[:4], tokenizer, 0, 1500, seed=0)
    assert len(array) == 1500 + len(array.names)
    assert array.starts[-1] == len(array.ids)


def synthetic_figures():
    """Two windows of two chunks each, of domains `a` and `b`."""
    records = [Record(name, f"{name}{n}", 0, 0.0) for name in "ab" for n in range(2)]
    return Figures(TestWindows(np.zeros((4, 8), np.uint16), records), ("a", "b", "c"), seed=0, draws=5)


def test_a_shortlist_holds_the_nearest():
    figures = synthetic_figures()
    distance = np.array([[0, 1, 2]] * 4 + [[0, 1, 2]] * 2 + [[0, 2, 1]] * 2, float)  # b: second twice, third twice
    routes = np.array([0, 0, 0, -1, 1, 1, 0, 0])
    shortlist_figures(figures, distance, {"2.route": routes, "2.choice": np.maximum(routes, 0)})
    assert figures.found["shortlist2.recall"] == pytest.approx((1 + 0.5) / 2)
    assert figures.found["shortlist2.accuracy"] == pytest.approx((0.75 + 0.5) / 2)
    assert figures.found["shortlist2.argmin.accuracy"] == pytest.approx((1 + 0.5) / 2)


def test_compared_compressors_are_told_by_their_logarithms():
    figures, one = synthetic_figures(), np.ones(8)
    part = {f"{kind}.{name}.{what}": np.array([4.0]) for kind in ("full", "small") for name in "ab" for what in
            ("bytes", "ms")}  # fmt: skip
    for kind in ("full", "small"):
        part |= {f"{kind}.a.chunk": np.stack([one, -one], 1), f"{kind}.b.chunk": np.stack([0.5 * one, 0 * one], 1)}
    ours = {"chunk.nll": np.stack([3 * one, one, one], 1), "chunk.log_nll": np.stack([one, 0 * one, one], 1)}
    compared_figures(figures, part, ours)
    found = figures.found
    assert found["compared.full.accuracy"] == found["compared.expert.accuracy"] == 0.5  # all to a, all to b
    assert found["compared.full.margin"] == pytest.approx(0)
    assert found["compared.expert.reconstruction_nll"] == pytest.approx(2)
    assert found["compared.small.bytes"] == 4
