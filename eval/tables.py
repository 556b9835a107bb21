"""The README's tables, made from `eval/results/*.json`: `python -m eval.tables [--check] [FILE]`.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; NAME is a result's. Nothing else is touched.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from eval.results import FOLDER
from hf_crouter.errors import InputError
from hf_crouter.storage import replaced_file

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
PARTS = {"files": "held-out files", "packages": "held-out packages", "stdlib": "standard library"}
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


def soft_table(metrics: dict[str, float]) -> list[str]:
    """Loss of the host by what it reads, and the share of history's worth that soft prompts recover."""
    found = {match.groups() for key in metrics if (match := re.match(r"(.+)\.n(\d+)\.loss\.window$", key))}
    rows = []
    for part, chunks in sorted(found, key=lambda row: (row[0], int(row[1]))):
        key = f"{part}.n{chunks}"
        losses = [
            _number(metrics.get(f"{key}.loss.{arm}"), 4)
            for arm in ("window", "recent_same_slots", "soft", "shuffled", "full")
        ]
        gains = [_interval(metrics, f"{key}.{name}.hgr") for name in ("soft", "soft_minus_shuffled")]
        rows.append([PARTS.get(part, part), chunks, *losses, *gains, _number(metrics.get(f"{key}.documents"))])
    head = ["text", "chunks", "window", "more raw tokens, same slots", "soft", "shuffled", "full",
            "HGR soft", "HGR soft − shuffled", "documents"]  # fmt: skip
    lines = _table(head, rows)
    if rows:
        lines += ["", "Loss in nats/token; HGR with 95% intervals, clustered by package."]
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
    """One file, read four ways: loss, KV slots and KV bytes."""
    labels = {
        "window": "raw window only",
        "compressed": "raw window + soft prompts of the compressed past",
        "more_raw_tokens": "raw window + as many more raw tokens",
        "full_history": "full history",
    }
    rows = [
        [label, _number(metrics.get(f"{arm}.loss"), 4), _number(metrics.get(f"{arm}.slots")),
         _number(metrics.get(f"{arm}.kv_bytes", 0) / 2**20, 1)]
        for arm, label in labels.items()
    ]  # fmt: skip
    lines = _table(["what the host sees", "loss, nats/token", "KV slots", "KV, MiB"], rows if metrics else [])
    if metrics:
        shares = [_percent(metrics.get(f"{arm}.recovered"), 1) for arm in ("compressed", "more_raw_tokens")]
        worth = f"Full history is worth {_number(metrics.get('worth'), 3)} nats/token on this file"
        lines += ["", f"{worth}; soft prompts recover {shares[0]} of it, as many raw tokens {shares[1]}. One file, no "
                      f"interval. The chunks' mean TRA is {_percent(metrics.get('tra.mean'), 1)}."]  # fmt: skip
    return lines


TABLES: dict[str, tuple[str, Callable[[dict[str, float]], list[str]]]] = {
    "tra-mini": ("none, the crouter alone", tra_table),
    "soft-mini": (HOST, soft_table),
    "compress-cpu": (HOST, compress_table),
    "demo": (HOST, demo_table),
}


def render(name: str, folder: Path = FOLDER) -> str:
    """A table in Markdown, with host, device and the command that made it.

    Raises:
        InputError: no table of this name, or a result that cannot be read.
    """
    if name not in TABLES:
        raise InputError(f"no table is called {name}; there are {', '.join(TABLES)}")
    host, table = TABLES[name]
    path = folder / f"{name}.json"
    try:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        lines = table(result["metrics"])
        origin = f"Device: {result['device']}. Made by `{result['command']}` ({result['date']})."
    except FileNotFoundError:
        lines, origin = table({}), f"Device: {MISSING}. Made by `python -m eval.run {name}`."
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


def _percent(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f}%".replace("-", "−")


def _times(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}x"


def _from(tokens: float | None) -> str:
    if tokens is None:
        return "at no length"
    return f"from {tokens:,.0f} tokens" if tokens else "at every length"


def _interval(metrics: dict[str, float], key: str) -> str:
    value, low, high = (metrics.get(name) for name in (key, f"{key}.lo", f"{key}.hi"))
    if low is None or high is None:
        return _percent(value, 1)
    return f"{_percent(value, 1)} [{_percent(low, 1)}, {_percent(high, 1)}]"


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
