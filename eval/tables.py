"""The README's tables, made from `eval/results/*.json`: `python -m eval.tables [--check] [FILE]`.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; NAME is one of `TABLES`, and several may show one
result. Nothing else is touched.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from eval.results import FOLDER
from hf_crouter.errors import InputError
from hf_crouter.utils.io import replaced_file

README = Path(__file__).parent.parent / "README.md"
MISSING = "not measured yet"
HOST = "SmolLM2-135M-Instruct"
SETS = {
    "code.files": "held-out files",
    "code.packages": "held-out packages",
    "code.stdlib": "standard library",
    "wikitext2": "WikiText-2 (valid)",
    "prose": "prose",
    "random": "random ids",
}
HGR_SETS = ("young", "files", "packages", "prose")
FITTED = " †"  # behind arms whose gate was fitted for them, where the others use the shipped one
HGR_WAYS = {
    "window": "raw window",
    "longer_same_slots": "more raw tokens in the soft prompts' slots",
    "soft": "soft prompts",
    "shuffled": "soft prompts of another file",
    "copy": "copying",
    "copy_rebuilt": "copying from rebuilt latents",
    "soft_copy": "soft prompts + copying (the defaults)",
    "longer_same_slots_copy_fitted": "more raw tokens in their slots + copying" + FITTED,
    "retrieve2_last_copy_fitted": "last 2 chunks raw + copying" + FITTED,
    "retrieve2_bm25_copy": "recall of 2 by BM25 + copying",
    "soft_retrieve2_bm25_copy": "soft prompts + copying + recall of 2 by BM25",
    "soft_retrieve2_learned_copy": "the same, recall by a learned scorer",
    "soft_retrieve2_copy": "the same, recall as it is by default §",
    "longer_same_slots_retrieve2_copy_fitted": "a window longer by their slots + copying" + FITTED,
    "retrieve2_oracle_copy_fitted": "best 2 chunks, by an oracle, + copying" + FITTED + "‡",
    "full": "full history",
    "full_copy": "full history + copying",
}
LONGER = "a longer window (1,604 slots) + copying" + FITTED
HGR_DIFFERENCES = {  # an arm and the other one
    "soft.shuffled": ("soft prompts", "soft prompts of another file"),
    "soft_copy.longer_same_slots_copy_fitted": (
        "soft prompts + copying",
        "more raw tokens in their slots + copying" + FITTED,
    ),
    "soft_copy_fitted.longer_same_slots_copy_fitted": (
        "soft prompts + copying" + FITTED,
        "more raw tokens in their slots + copying" + FITTED,
    ),
    "retrieve2_bm25_copy.longer_same_slots_retrieve2_copy_fitted": ("recall of 2 by BM25 + copying", LONGER),
    "soft_retrieve2_bm25_copy.longer_same_slots_retrieve2_copy_fitted": ("all three ways, recall by BM25", LONGER),
    "soft_retrieve2_bm25_copy_fitted.longer_same_slots_retrieve2_copy_fitted": (
        "all three ways, recall by BM25" + FITTED,
        LONGER,
    ),
    "soft_retrieve2_learned_copy.longer_same_slots_retrieve2_copy_fitted": ("all three ways, learned recall", LONGER),
    "soft_retrieve2_copy.longer_same_slots_retrieve2_copy_fitted": ("all three ways, default recall §", LONGER),
    "soft_retrieve2_learned_copy.soft_retrieve2_bm25_copy": (
        "all three ways, learned recall",
        "all three ways, recall by BM25",
    ),
    "soft_retrieve2_copy.soft_retrieve2_bm25_copy": (
        "all three ways, default recall §",
        "all three ways, recall by BM25 §",
    ),
}
KVPRESS_WAYS = {  # at the slots of the soft prompts, then at those of retrieved chunks as well
    "streaming.at8": "StreamingLLM",
    "snapkv.at8": "SnapKV",
    "snapkv_window.at8": "SnapKV that keeps the raw window",
    "expected_attention.at8": "ExpectedAttention",
    "knorm.at8": "Knorm",
    "longer_same_slots": "as many raw tokens, read anew",
    "soft_copy": "ours: soft prompts + copying",
    "streaming.at8_retrieve2": "StreamingLLM",
    "snapkv.at8_retrieve2": "SnapKV",
    "snapkv_window.at8_retrieve2": "SnapKV that keeps the raw window",
    "expected_attention.at8_retrieve2": "ExpectedAttention",
    "knorm.at8_retrieve2": "Knorm",
    "longer_same_slots_retrieve2": "as many raw tokens, read anew",
    "soft_retrieve2_bm25_copy": "ours: soft prompts + copying + recall of 2 by BM25",
}
PROSE = {
    "csv_tables": "CSV tables",
    "de_law": "German statutes",
    "dialogue_sgd": "dialogues with assistants",
    "json_config": "JSON configuration",
    "latex_math": "LaTeX, mathematics",
    "logs": "logs",
    "meetings_qmsum": "transcripts of meetings",
    "novels_en": "English novels",
    "speeches_en": "English speeches",
    "tech_peps": "Python Enhancement Proposals",
    "wiki_en": "English Wikipedia",
    "leval_financial_qa": "L-Eval: earnings calls",
    "leval_gov_report_summ": "L-Eval: government reports",
    "leval_legal_contract_qa": "L-Eval: contracts",
    "leval_news_summ": "L-Eval: news",
    "leval_paper_assistant": "L-Eval: papers",
    "leval_patent_summ": "L-Eval: patents",
    "leval_review_summ": "L-Eval: reviews",
    "leval_tv_show_summ": "L-Eval: television transcripts",
}
READERS = {
    "full": "full history",
    "window": "raw window",
    "soft": "soft prompts",
    "copy": "copying",
    "copy_rebuilt": "copying from rebuilt latents",
    "soft_retrieve2_bm25_copy": "soft prompts + copying + recall of 2",
}
DRAFTERS = {"copy": "copying", "soft_retrieve2_copy": "soft prompts + copying + recall of 2"}
RULER_TASKS = {
    "niah_single_1": "one needle in repeated noise",
    "niah_multikey_2": "one needle among needles",
    "niah_multikey_3": "the same with UUIDs",
    "ruler_vt": "variables traced",
    "ruler_cwe": "most common words",
    "ruler_fwe": "most frequent coded words",
}
RULER_ARMS = {"full": "full", "window": "window", "soft_copy": "ours", "soft_retrieve2_copy": "ours + recall of 2"}
RULER_LENGTHS = {"4096": "4k", "8192": "8k"}
QUESTION_SETS = {"nq": "Natural Questions", "xquad": "XQuAD"}
QUESTION_CELLS = (("nq", 8), ("nq", 64), ("nq", 256), ("xquad", 8), ("xquad", 64))
QUESTION_SCORERS = {
    "overlap": "words and phrases, later ones first, and recency (the default)",
    "bm25": "BM25 of the last 128 tokens",
    "bm25_32": "BM25 of the last 32 tokens",
    "learned": "a network fitted on what recall gains in likelihood",
    "last": "the last two",
    "random": "chance",
}
SHAPES = {"wide": "6 + 6 layers, 512 wide", "mini": "the shipped one: 2 + 3 layers twice, 448 wide"}
_BLOCK = re.compile(r"(?P<start><!-- table: (?P<name>\S+) -->\n)(?P<body>.*?)(?P<end><!-- end -->)", re.DOTALL)


def tra_table(metrics: dict[str, float]) -> list[str]:
    """Token reconstruction accuracy by kind of text."""
    rows = [
        [label, _percent(metrics.get(f"{key}.tra"), 2), _number(metrics.get(f"{key}.nll"), 3),
         _number(metrics.get(f"{key}.chunks"))]
        for key, label in SETS.items()
    ]  # fmt: skip
    lines = _table(["text", "TRA", "nats/token", "chunks"], rows if metrics else [])
    if metrics:
        params, seconds, tokens = (_number(metrics.get(key)) for key in ("params", "train.seconds", "train.tokens"))
        mfu = _percent(metrics.get("train.mfu"), 1)
        lines += ["", f"{params} parameters; trained for {seconds} seconds on {tokens} tokens, MFU {mfu}."]
    return lines


def hgr_table(metrics: dict[str, float]) -> list[str]:
    """What each way recovers of history's worth at 8 chunks, by set, beside the slots that it takes."""
    rows = [
        [label, _number(metrics.get(f"young.n8.{arm}.slots")),
         *(_share(metrics, f"{name}.n8.{arm}.hgr") for name in HGR_SETS)]
        for arm, label in HGR_WAYS.items()
    ]  # fmt: skip
    lines = _table(["way", "KV slots", *HGR_SETS], rows if metrics else [])
    if metrics:
        worth = [_per_set(metrics, f"loss.{arm}", lambda value: _number(value, 3)) for arm in ("window", "full")]
        oracle = {metrics.get(f"{name}.n8.retrieve2_oracle.documents") for name in HGR_SETS}
        few = ", ".join(sorted(_number(value) for value in oracle))
        lines += ["", f"HGR in %, with 95% intervals. † A gate fitted for this way; else the shipped one. "
                      f"‡ The pair of least loss on the very tokens that are scored; {few} documents each. "
                      f"{_partly(metrics)}Prose: mean of {_number(metrics.get('prose.n8.domains'))} kinds in which "
                      f"full history is worth at least 0.01 nats/token and that have 8 documents. "
                      f"Documents: {_per_set(metrics, 'documents', _number)}. Tokens rebuilt, which copying from "
                      f"latents draws on: {_per_set(metrics, 'tra', lambda value: _percent(value, 1))}. Loss in "
                      f"nats/token: raw window {worth[0]}; full history {worth[1]}."]  # fmt: skip
    return lines


def _partly(metrics: dict[str, float]) -> str:
    """What is to be known of the arm that was read on fewer documents; nothing where it was read on all."""
    key = "soft_retrieve2_copy"
    counts = {name: metrics.get(f"{name}.n8.{key}.documents") for name in HGR_SETS}
    if not any(counts.values()):
        return ""
    shown = ", ".join(f"{name} {_number(count)}" for name, count in counts.items() if count)
    kinds = _number(metrics.get(f"prose.n8.{key}.domains"))
    return (f"§ The default scorer, read on a CPU on fewer documents ({shown}; of prose {kinds} kinds are left): "
            "only the next table compares it. ")  # fmt: skip


def kvpress_table(metrics: dict[str, float]) -> list[str]:
    """Methods of kvpress beside ours, on the same documents and slots."""
    rows = [
        [label, _number(metrics.get(f"young.n8.{arm}.slots")),
         *(_share(metrics, f"{name}.n8.{arm}.hgr") for name in HGR_SETS)]
        for arm, label in KVPRESS_WAYS.items()
    ]  # fmt: skip
    lines = _table(["way", "KV slots", *HGR_SETS], rows if metrics else [])
    return [*lines, "", "HGR in %, with 95% intervals, on the same documents."] if metrics else lines


ROUTERS = {
    "chunk": "residual",
    "baseline.ngram": "character n-grams",
    "baseline.tfidf": "TF-IDF centroids",
    "baseline.probe": "linear probe on latents",
    "baseline.perplexity": "host's loss under each adapter",
    "baseline.arrow": "PEFT's Arrow",
}


def routing_table(metrics: dict[str, float]) -> list[str]:
    """What tells domains apart, and texts of none."""
    rows = []
    for key, label in ROUTERS.items():
        if key != "chunk" and f"{key}.accuracy" not in metrics:
            continue  # not measured yet
        right = ("chunk.argmin.accuracy", "span128.argmin.accuracy") if key == "chunk" else (
            f"{key}.accuracy", f"{key}.span128.accuracy")  # fmt: skip
        ours = {"chunk": "expert.bytes", "baseline.perplexity": "expert.host.bytes"}  # of one domain
        size, per = metrics.get(ours.get(key, f"{key}.bytes")), 1 if key in ours else 8
        rule = "" if key == "chunk" else ".pattern"
        rows.append([
            label, *(_share(metrics, name) for name in right),
            *(_share(metrics, f"{key}{rule}.unseen.{end}.auroc") for end in ("near", "far")),
            MISSING if size is None else f"{size / per / 1e3:,.0f}",
        ])  # fmt: skip
    head = ["router", "512-token chunks right", "128-token spans right", "AUROC, near unknown", "AUROC, far unknown",
            "kB a domain"]  # fmt: skip
    lines = _table(head, rows if metrics else [])
    note = "In %, with 95% intervals. Everybody always answers; AUROC by the pattern of scores (–: not measured)."
    return [*lines, "", note] if metrics else lines


def routing_host_table(metrics: dict[str, float]) -> list[str]:
    """The host's loss under routed adapters, and under what else one could train."""
    keys = ("host.{}.base", "host.{}.routed", "host.{}.oracle", "continual.8.{}.sequential", "continual.joint.{}")
    names = [key.split(".")[1] for key in metrics if key.startswith("host.") and key.endswith(".oracle")]
    rows = [[name, *(_number(metrics.get(key.format(name)), 3) for key in keys)] for name in names]
    head = ["domain", "plain host", "routed", "its own adapter", "one adapter, trained in turn", "one, on all at once"]
    lines = _table(head, rows)
    note = "Loss in nats/token of the chunk after the one that was routed, held-out documents; in order of mounting."
    return [*lines, "", note] if rows else lines


def routing_costs_table(metrics: dict[str, float]) -> list[str]:
    """What a decision costs by number of experts."""
    rows = []
    for count in (2, 8, 32):
        for key, label in (("all", "all"), ("shortlist", "nearest 2")):
            cost = f"cost.{count}.{key}"
            if f"{cost}.ms" in metrics:
                times = _number(metrics[f"{cost}.ms"]), _number(metrics.get(f"{cost}.ms_batched"), 1)
                rows.append([f"{count}", label, *times, _number(metrics[f"{cost}.flops"] / 1e9)])
    return _table(["experts", "rebuilt under", "ms, one chunk", "ms a chunk, 32 at once", "GFLOPs a chunk"], rows)


def difference_table(metrics: dict[str, float]) -> list[str]:
    """Paired differences of HGR at 8 chunks: what wins against what."""
    rows = [
        [*labels, *(_share(metrics, f"{name}.n8.diff.{key}.mean", sign=True) for name in HGR_SETS)]
        for key, labels in HGR_DIFFERENCES.items()
    ]
    lines = _table(["way", "minus", *HGR_SETS], rows if metrics else [])
    return [*lines, "", "HGR in points, paired, with 95% intervals."] if metrics else lines


def prose_table(metrics: dict[str, float]) -> list[str]:
    """What copying recovers by kind of text that is no Python."""
    rows = [
        [label, *(_share(metrics, f"prose.{key}.n8.{arm}.hgr") for arm in ("copy", "copy_rebuilt_fitted")),
         *(_number(metrics.get(f"prose.{key}.n8.loss.{arm}"), 3) for arm in ("window", "full")),
         _number(metrics.get(f"prose.{key}.n8.documents"))]
        for key, label in PROSE.items()
    ]  # fmt: skip
    unknown = {key.split(".")[1] for key in metrics if re.match(r"prose\.(?!n\d)\w+\.n8\.", key)} - set(PROSE)
    if unknown:
        raise ValueError(f"no name for the prose of {', '.join(sorted(unknown))}")
    head = ["text", "copying", "copying from rebuilt latents" + FITTED, "loss, raw window", "loss, full history",
            "documents"]  # fmt: skip
    return _table(head, rows if metrics else [])


def nextline_table(metrics: dict[str, float]) -> list[str]:
    """The next line of code, written greedily."""
    columns = ("exact", "edit", "right_tokens", "repetition", "known_names")
    rows = []
    for arm in ("window", "copy", "soft_retrieve2_bm25_copy", "full"):
        keys = [f"nextline.{arm}.{column}" for column in columns]
        rows.append([READERS[arm], *(_plain(metrics, key) if key.endswith("right_tokens") else _share(metrics, key)
                                     for key in keys)])  # fmt: skip
    head = ["what the host reads", "line exact", "edit similarity", "right tokens before the first mistake",
            "repeated trigrams", "names that the file knows"]  # fmt: skip
    lines = _table(head, rows if metrics else [])
    if metrics:
        gains = [
            _share(metrics, f"nextline.{arm}_minus_window", sign=True) for arm in ("copy", "soft_retrieve2_bm25_copy")
        ]
        lines += ["", f"In %, but for the tokens. {_number(metrics.get('nextline.lines'))} lines of "
                      f"{_number(metrics.get('nextline.packages'))} packages younger than the host. Exact lines "
                      f"beyond those of the raw window: copying {gains[0]}, all three ways {gains[1]}."]  # fmt: skip
    return lines


def retrieval_table(metrics: dict[str, float]) -> list[str]:
    """A fact far back, asked for in the words in which it stands."""
    rows = []
    for task, label in (("passkey", "passkey"), ("kv", "value of a key")):
        for length in ("4k", "8k", "32k", "128k"):
            keys = [f"{task}.{length}.{arm}.accuracy" for arm in READERS]
            rows.append([label, length, *(_share(metrics, key, 0) for key in keys)])
    lines = _table(["what is asked", "prompt", *READERS.values()], rows if metrics else [])
    if metrics:
        samples = _number(metrics.get("passkey.4k.copy.samples"))
        lines += ["", f"Right answers in %, {samples} prompts a row. –: more than the host's positions hold, or not "
                      f"measured."]  # fmt: skip
    return lines


def identifiers_table(metrics: dict[str, float]) -> list[str]:
    """Names that the raw window does not hold."""
    rows = [
        [READERS[arm], *(_share(metrics, f"identifiers.{arm}.{key}") for key in ("accuracy", "whole"))]
        for arm in ("window", "soft", "copy", "soft_retrieve2_bm25_copy", "full")
    ]
    lines = _table(["what the host reads", "tokens right", "whole names right"], rows if metrics else [])
    if metrics:
        auroc = [_plain(metrics, f"residual.{name}predicts_errors.auroc") for name in ("", "young.", "prose.")]
        counts = [_number(metrics.get(f"identifiers.{key}")) for key in ("tokens", "names")]
        lines += ["", f"In %. {counts[0]} tokens of {counts[1]} names that last stood in compressed chunks. How well "
                      f"a chunk's residual tells the tokens that copying from rebuilt latents loses, AUROC: "
                      f"{auroc[0]} over code and prose, {auroc[1]} within code, {auroc[2]} within prose."]  # fmt: skip
    return lines


def near_table(metrics: dict[str, float]) -> list[str]:
    """Records that nearly match: the window holds the corrected value, the compressed past the old one."""
    rows = [
        [READERS[arm], *(_share(metrics, f"manners.near.{arm}.{key}", 0) for key in ("right", "wrong_copied"))]
        for arm in ("window", "copy", "full")
    ]
    return _table(["what the host reads", "right value", "the old record's value"], rows if metrics else [])


def training_table(metrics: dict[str, float]) -> list[str]:
    """Throughput of stage 1 by shape and batch."""
    rows = [
        [label, batch, _number(metrics.get(f"{shape}.b{batch}.tokens_per_second")),
         _percent(metrics.get(f"{shape}.b{batch}.mfu"), 1)]
        for shape, label in SHAPES.items() for batch in ("64", "128")
    ]  # fmt: skip
    lines = _table(["crouter", "chunks a step", "tokens/s", "MFU"], rows if metrics else [])
    if metrics:
        rate = _number(metrics.get("matrix.flops_per_second", 0) / 1e12)
        lines += [
            "",
            f"MFU: matrix FLOPs of the tokens, over a bfloat16 product timed in the same run: {rate} TFLOP/s.",
        ]
    return lines


def index_table(metrics: dict[str, float]) -> list[str]:
    """What copying costs a token, by the length of the past."""
    columns = (("query.us", 0), ("query.p99.us", 0), ("build.seconds", 2), ("ids.bytes_per_token", 1),
               ("index.bytes_per_token", 1))  # fmt: skip
    rows = [
        [size, *(_number(metrics.get(f"{size}.{key}"), digits) for key, digits in columns)]
        for size in ("10k", "100k", "1m")
    ]
    head = ["tokens archived", "match, µs a token", "99% of them below, µs", "index built, s", "ids, bytes a token",
            "index, bytes a token"]  # fmt: skip
    return _table(head, rows if metrics else [])


def step_table(metrics: dict[str, float]) -> list[str]:
    """What copying adds to a decode step of the host, in its faster dtype."""
    rows = []
    for size in ("10k", "100k", "1m") if metrics else ():
        hosts = [
            metrics[key] for dtype in ("float32", "bfloat16") if (key := f"host.step_ms.{dtype}.{size}") in metrics
        ]
        share = metrics.get(f"copy.step_share.{size}")
        rows.append([size, _number(metrics.get(f"copy.step_ms.{size}"), 2), _number(min(hosts, default=None), 1),
                     MISSING if share is None else f"{share:.1%}"])  # fmt: skip
    return _table(["tokens archived", "copying, ms a step", "the host's step, ms", "share"], rows)


def choice_table(metrics: dict[str, float]) -> list[str]:
    """What choosing the recalled chunks costs, by how many there are."""
    columns = (("choose.ms", 1), ("choose.p99.ms", 1), ("append.us", 0), ("bytes_per_chunk", 0))
    rows = [
        [size, *(_number(metrics.get(f"{size}.{key}"), digits) for key, digits in columns)]
        for size in ("100", "2k", "20k")
    ]
    head = ["compressed chunks", "choice, ms", "99% of them below, ms", "another chunk, µs", "bytes a chunk"]
    return _table(head, rows if metrics else [])


def drafts_table(metrics: dict[str, float]) -> list[str]:
    """Tokens a step of the host with drafts from the history."""
    arms = [arm for arm in DRAFTERS if f"drafts.{arm}.tokens_a_step" in metrics]
    rows = [
        [DRAFTERS[arm], _with_interval(metrics, f"drafts.{arm}.tokens_a_step", 1, 2, ""),
         _share(metrics, f"drafts.{arm}.same", 0)]
        for arm in arms
    ]  # fmt: skip
    lines = _table(["what the host reads", "tokens a step", "prompts with the same tokens, %"], rows)
    if metrics:
        ahead, prompts = (_number(metrics.get(f"drafts.{key}")) for key in ("ahead", "prompts"))
        lines += ["", f"Up to {ahead} tokens drafted; {prompts} prompts of young code; without drafts 1 token a step."]
    return lines


def questions_table(metrics: dict[str, float]) -> list[str]:
    """How often recall finds the chunk that answers a question."""
    rows = [
        [label, *(_share(metrics, f"{name}.{chunks}.{scorer}.k2.found") for name, chunks in QUESTION_CELLS)]
        for scorer, label in QUESTION_SCORERS.items()
    ]
    head = ["chosen by", *(f"{QUESTION_SETS[name]}, {chunks} chunks" for name, chunks in QUESTION_CELLS)]
    lines = _table(head, rows if metrics else [])
    if metrics:
        counts = ", ".join(_number(metrics.get(f"{name}.{chunks}.questions")) for name, chunks in QUESTION_CELLS)
        lines += ["", f"Answer's chunk among the two recalled, in %, with 95% intervals. Questions: {counts}."]
    return lines


def compress_table(metrics: dict[str, float]) -> list[str]:
    """Seconds to compress beside the host's own prefill, and where the one becomes cheaper than the other."""
    lengths = {match[1] for key in metrics if (match := re.match(r"(\d+k?)\.encode\.seconds$", key))}
    rows = []
    for length in sorted(lengths, key=lambda name: int(name.rstrip("k")) * (1024 if name.endswith("k") else 1)):
        times = [_number(metrics.get(f"{length}.{arm}.seconds"), 2) for arm in ("prefill", "encode", "residual")]
        ratios = [_times(metrics.get(f"{length}.{arm}.ratio")) for arm in ("encode", "residual")]
        rows.append([length, *times, *ratios])
    lines = _table(
        ["tokens", "host's prefill, s", "encode, s", "encode with residual, s", "prefill ÷ encode",
         "prefill ÷ encode with residual"], rows
    )  # fmt: skip
    if rows:
        points = [metrics.get(f"crossover.{arm}.tokens") for arm in ("encode", "residual")]
        lines += ["", f"Cheaper than prefill: encode {_from(points[0])}, encode with residual {_from(points[1])}."]
    return lines


def demo_table(metrics: dict[str, float]) -> list[str]:
    """One file, read seven ways: loss, KV slots and KV bytes."""
    retrieve = " + recall" if metrics.get("all.slots", 0) > metrics.get("soft.slots", 0) else ""
    labels = {
        "window": "raw window only",
        "soft": "raw window + soft prompts of the compressed past",
        "copy": "raw window + copying",
        "all": "raw window + soft prompts + copying" + retrieve,
        "experts": "the same under the shipped experts' adapters",
        "more_raw": "raw window + as many more raw tokens",
        "full": "full history",
    }
    rows = [
        [label, _number(metrics.get(f"{arm}.loss"), 4), _number(metrics.get(f"{arm}.slots")),
         _mebibytes(metrics.get(f"{arm}.kv_bytes")), _percent(metrics.get(f"{arm}.recovered"), 1)]
        for arm, label in labels.items()
    ]  # fmt: skip
    head = ["what the host sees", "loss, nats/token", "KV slots", "KV, MiB", "recovered of full history's worth"]
    lines = _table(head, rows if metrics else [])
    if metrics:
        worth = f"Full history is worth {_number(metrics.get('worth'), 3)} nats/token on this file"
        lines += ["", f"{worth}: one file, no interval. Tokens of the continuation that were copied: "
                      f"{_number(metrics.get('copied'))}. The chunks' mean TRA is "
                      f"{_percent(metrics.get('tra.mean'), 1)}."]  # fmt: skip
    return lines


def ruler_table(metrics: dict[str, float]) -> list[str]:
    """RULER's accuracy by task, and the KV slots behind it."""
    there = {key.rpartition(".")[2] for key in metrics}
    arms = {arm: label for arm, label in RULER_ARMS.items() if arm in there or not metrics}
    columns = [f"{length}.{arm}" for length in RULER_LENGTHS for arm in arms]
    rows = [
        [f"`{task}`: {label}", *(_with_error(metrics, f"{task}.{column}") for column in columns)]
        for task, label in RULER_TASKS.items()
    ]
    rows.append(["KV slots", *(_number(metrics.get(f"slots.{column}")) for column in columns)])
    head = ["task", *(f"{size}: {label}" for size in RULER_LENGTHS.values() for label in arms.values())]
    lines = _table(head, rows if metrics else [])
    return [*lines, "", "Accuracy in % ± its standard error over documents."] if metrics else lines


class Shown(NamedTuple):
    """What a table shows.

    Attributes:
        result: name of the result.
        host: the language model behind the figures.
        table: its lines, from the metrics.
        experiment: that makes the result; by default the one of its name.
    """

    result: str
    host: str
    table: Callable[[dict[str, float]], list[str]]
    experiment: str = ""


TABLES = {
    "demo": Shown("demo", HOST, demo_table),
    "hgr": Shown("hgr-smollm2-135m", HOST, hgr_table, "hgr"),
    "hgr-differences": Shown("hgr-smollm2-135m", HOST, difference_table, "hgr"),
    "kvpress": Shown("hgr-smollm2-135m", HOST, kvpress_table, "hgr"),
    "hgr-prose": Shown("hgr-smollm2-135m", HOST, prose_table, "hgr"),
    "nextline": Shown("reading", HOST, nextline_table),
    "identifiers": Shown("reading", HOST, identifiers_table),
    "retrieval": Shown("reading", HOST, retrieval_table),
    "near-matches": Shown("reading", HOST, near_table),
    "tra-mini": Shown("tra-mini", "none, the crouter alone", tra_table),
    "compress-cpu": Shown("compress-cpu", HOST, compress_table),
    "suffix-index": Shown("suffix-index", "none, the index alone", index_table),
    "copy-cpu": Shown("copy-cpu", HOST, step_table),
    "routing": Shown("routing", HOST, routing_table),
    "routing-host": Shown("routing", HOST, routing_host_table),
    "routing-costs": Shown("routing", HOST, routing_costs_table),
    "drafts": Shown("reading-drafts", HOST, drafts_table, "reading"),
    "retrieval-questions": Shown("retrieval-questions", "none, the choice alone", questions_table),
    "retrieval-choice": Shown("retrieval-choice", "none, the choice alone", choice_table),
    "lm-eval": Shown("lm-eval", HOST, ruler_table),
    "training-gpu": Shown("training-gpu", "none, the crouter alone", training_table),
}


def render(name: str, folder: Path = FOLDER) -> str:
    """A table in Markdown, with host, device and the command that made it.

    Raises:
        InputError: no table of this name, or a result that cannot be read.
    """
    if name not in TABLES:
        raise InputError(f"no table is called {name}; there are {', '.join(TABLES)}")
    source, host, table, experiment = TABLES[name]
    path = folder / f"{source}.json"
    try:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        lines = table(result["metrics"])
        origin = f"Device: {result['device']}. Made by `{result['command']}` ({result['date']})."
    except FileNotFoundError:
        lines, origin = table({}), f"Device: {MISSING}. Made by `python -m eval.run {experiment or source}`."
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: expected a result of eval.run, got {error!r}") from error
    return "\n".join([*lines, "", f"Host: {host}. {origin}"]) + "\n"


def rewrite(text: str, folder: Path = FOLDER) -> tuple[str, list[str]]:
    """The text with every table made anew, and the names of those that had been stale.

    Raises:
        InputError: a marker without its end, or of an unknown table.
    """
    stale = []

    def replace(match: re.Match[str]) -> str:
        body = f"\n{render(match['name'], folder)}\n"
        if body != match["body"]:
            stale.append(match["name"])
        return match["start"] + body + match["end"]

    found = [match["body"] for match in _BLOCK.finditer(text)]
    if len(found) != text.count("<!-- table: ") or any("<!-- table: " in body for body in found):
        raise InputError("expected <!-- end --> behind every <!-- table: NAME -->")
    return _BLOCK.sub(replace, text), stale


def _table(head: list[str], rows: Iterable[list[str]]) -> list[str]:
    rows = list(rows) or [[MISSING, *[""] * (len(head) - 1)]]
    align = ["---", *["---:"] * (len(head) - 1)]
    return ["| " + " | ".join(cells) + " |" for cells in (head, align, *rows)]


def _number(value: float | None, digits: int = 0) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _mebibytes(value: float | None) -> str:
    return "–" if value is None else f"{value / 2**20:,.1f}"


def _percent(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f}%".replace("-", "−")


def _times(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}x"


def _from(tokens: float | None) -> str:
    if tokens is None:
        return "at no length"
    return f"from {tokens:,.0f} tokens" if tokens else "at every length"


def _per_set(metrics: dict[str, float], key: str, text: Callable[[float | None], str]) -> str:
    return ", ".join(f"{name} {text(metrics.get(f'{name}.n8.{key}'))}" for name in HGR_SETS)


def _share(metrics: dict[str, float], key: str, digits: int = 1, sign: bool = False) -> str:
    """A share in per cent, without the sign of it, and its interval."""
    return _with_interval(metrics, key, 100, digits, "+" if sign else "")


def _plain(metrics: dict[str, float], key: str) -> str:
    return _with_interval(metrics, key, 1, 2, "")


def _with_error(metrics: dict[str, float], key: str) -> str:
    error = metrics.get(f"{key}.se")
    shown = _percent(metrics.get(key), 0).rstrip("%")
    return shown if error is None else f"{shown} ± {100 * error:.0f}"


def _with_interval(metrics: dict[str, float], key: str, factor: float, digits: int, sign: str) -> str:
    if key not in metrics:
        return "–"
    base = key.removesuffix(".mean")
    value, *ends = (metrics.get(name) for name in (key, f"{base}.lo", f"{base}.hi"))
    shown = [f"{factor * end:{sign}.{digits}f}".replace("-", "−") for end in (value, *ends) if end is not None]
    if len(shown) < 3 or value == ends[0] == ends[1]:
        return shown[0]
    return f"{shown[0]} [{shown[1]}, {shown[2]}]"


def main(argv: list[str] | None = None) -> int:
    """Rewrites the file; with `--check` names each stale table and returns 1. Bad input: 2."""
    parser = argparse.ArgumentParser(prog="python -m eval.tables", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", nargs="?", type=Path, default=README, help="README.md by default")
    parser.add_argument("--check", action="store_true", help="change nothing; status 1 where a table is stale")
    parser.add_argument("--results", type=Path, default=FOLDER, help="folder of the results")
    arguments = parser.parse_args(argv)
    try:
        text = arguments.file.read_text(encoding="utf-8")
        fresh, stale = rewrite(text, arguments.results)
        if arguments.check:
            for name in stale:
                print(f"{arguments.file.name}: table {name} is stale; run python -m eval.tables", file=sys.stderr)
            return 1 if stale else 0
        if stale:
            with replaced_file(arguments.file) as temporary:
                temporary.write_text(fresh, encoding="utf-8")
    except (InputError, OSError) as error:
        print(f"eval.tables: error: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.file.name}: {', '.join(stale) or 'no table'} changed")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
