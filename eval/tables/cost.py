"""Tables of what compressing, copying, retrieval and training cost."""

from __future__ import annotations

import re

from eval.results import size_of
from eval.tables.cells import MISSING, Metrics, number, percent, ratio, table

COMPRESSING = ("encode", "reconstruction_nll")  # the second with decoder and loss
SHAPES = {"wide": "6 + 6 layers, 512 wide", "mini": "the shipped one: 2 + 3 layers twice, 448 wide"}
WAYS = {
    "full_": "full history, in pieces of 2,048",
    "full_once_": "full history, in one piece",
    "": "`Retrieve(2)`",
    "compact_": "`Compact(64)`",
    "mix_": "`Compact(32), Retrieve(2)`, the default",
}


def generation_table(metrics: Metrics) -> list[str]:
    """First token, memory and decoding by prompt and way of reading it, and what compaction adds to a read."""
    rows, bounds = [], []
    found = [match for key in metrics if (match := re.match(r"(.+\.(\d+k?)\.b1\.)full_(?:ttft|decode)", key))]
    for key, length in sorted({match[1]: match[2] for match in found}.items(), key=lambda item: size_of(item[1])):
        for way, label in WAYS.items():
            cells = [("ttft_seconds", 2), ("peak_gib", 2), ("kv_ratio", 1), ("decode_ms", 1)]
            if f"{key}{way}ttft_seconds" in metrics or f"{key}{way}decode_ms" in metrics:
                shown = [number(metrics.get(f"{key}{way}{name}"), digits) for name, digits in cells]
                rows.append([length, label, shown[0], ratio(metrics.get(f"{key}{way}ttft_speedup")), *shown[1:]])
        if (bound := metrics.get(f"{key}compact_bound_gib")) is not None:
            bounds.append(f"{number(bound, 2)} at {length}")
    lines = table(
        ["prompt", "what the host reads", "first token, s", "faster than full in pieces", "peak over the weights, GiB",
         "tokens a slot", "decoding, ms a token"], rows
    )  # fmt: skip
    if "compact.ms" in metrics:
        plain = number(metrics.get("compact.plain_ms"), 1)
        lines += [
            "",
            f"Choosing the pairs of a 512-token chunk: {_beside(metrics, 'compact.')} in a prompt, which the plain "
            f"host reads in {plain} ms; {_beside(metrics, 'compact.decode_')} while decoding, the window read "
            "with it.",
        ]
    if bounds:
        lines += ["", f"Pairs, two blocks and the raw part of `Compact(64)`, GiB: {', '.join(bounds)}."]
    return lines


def _beside(metrics: Metrics, key: str) -> str:
    own, more, over = (metrics.get(f"{key}{name}") for name in ("read_ms", "ms", "cost_ratio"))
    return f"{number(more, 1)} ms beside {number(own, 1)} ms of the read itself ({percent(over, 0)})"


def training_table(metrics: Metrics) -> list[str]:
    """Throughput of stage 1 by shape and batch."""
    rows = [
        [label, batch, number(metrics.get(f"{shape}.b{batch}.tokens_per_second")),
         percent(metrics.get(f"{shape}.b{batch}.mfu"), 1)]
        for shape, label in SHAPES.items() for batch in ("64", "128")
    ]  # fmt: skip
    lines = table(["crouter", "chunks a step", "tokens/s", "MFU"], rows if metrics else [])
    if metrics:
        rate = number(metrics.get("matrix.flops_per_second", 0) / 1e12)
        lines += [
            "",
            f"MFU: matrix FLOPs of the tokens, over a bfloat16 product timed in the same run: {rate} TFLOP/s.",
        ]
    return lines


def index_table(metrics: Metrics) -> list[str]:
    """What copying costs a token, by the tokens archived."""
    columns = (("query.us", 0), ("query.p99.us", 0), ("build.seconds", 2), ("ids.bytes_per_token", 1),
               ("index.bytes_per_token", 1))  # fmt: skip
    rows = [
        [size, *(number(metrics.get(f"{size}.{key}"), digits) for key, digits in columns)]
        for size in ("10k", "100k", "1m")
    ]
    head = ["tokens archived", "match, µs a token", "99% of them below, µs", "index built, s", "ids, bytes a token",
            "index, bytes a token"]  # fmt: skip
    return table(head, rows if metrics else [])


def step_table(metrics: Metrics) -> list[str]:
    """What copying adds to a decode step of the host, in its faster dtype."""
    rows = []
    for size in ("10k", "100k", "1m") if metrics else ():
        hosts = [
            metrics[key] for dtype in ("float32", "bfloat16") if (key := f"host.step_ms.{dtype}.{size}") in metrics
        ]
        share = metrics.get(f"copy.step_share.{size}")
        rows.append([size, number(metrics.get(f"copy.step_ms.{size}"), 2), number(min(hosts, default=None), 1),
                     MISSING if share is None else f"{share:.1%}"])  # fmt: skip
    return table(["tokens archived", "copying, ms a step", "the host's step, ms", "share"], rows)


def choice_table(metrics: Metrics) -> list[str]:
    """What choosing the chunks to retrieve costs, by how many there are."""
    columns = (("choose.ms", 1), ("choose.p99.ms", 1), ("append.us", 0), ("bytes_per_chunk", 0))
    rows = [
        [size, *(number(metrics.get(f"{size}.{key}"), digits) for key, digits in columns)]
        for size in ("100", "2k", "20k")
    ]
    head = ["compressed chunks", "choice, ms", "99% of them below, ms", "another chunk, µs", "bytes a chunk"]
    return table(head, rows if metrics else [])


def compress_table(metrics: Metrics) -> list[str]:
    """Seconds to compress beside the host's own prefill, and where the one becomes cheaper than the other."""
    lengths = {match[1] for key in metrics if (match := re.match(r"(\d+k?)\.encode\.seconds$", key))}
    rows = []
    for length in sorted(lengths, key=size_of):
        times = [number(metrics.get(f"{length}.{arm}.seconds"), 2) for arm in ("prefill", *COMPRESSING)]
        ratios = [ratio(metrics.get(f"{length}.{arm}.ratio")) for arm in COMPRESSING]
        rows.append([length, *times, *ratios])
    lines = table(
        ["tokens", "host's prefill, s", "encode, s", "encode with NLL, s", "prefill ÷ encode",
         "prefill ÷ encode with NLL"], rows
    )  # fmt: skip
    if rows:
        points = [metrics.get(f"crossover.{arm}.tokens") for arm in COMPRESSING]
        lines += ["", f"Cheaper than prefill: encode {since(points[0])}, encode with NLL {since(points[1])}."]
    return lines


def since(tokens: float | None) -> str:
    """From how many tokens something holds."""
    if tokens is None:
        return "at no length"
    return f"from {tokens:,.0f} tokens" if tokens else "at every length"
