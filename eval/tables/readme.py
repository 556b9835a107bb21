"""Which table shows which result, and how they come into the README.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; NAME is one of `TABLES`, and several may show one
result. Nothing else is touched.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from eval.results import FOLDER
from eval.tables import cost, hgr, hosts, questions, reading, reconstruction, routing
from eval.tables.cells import MISSING
from hf_crouter.errors import InputError
from hf_crouter.utils.io import replaced_file

README = Path(__file__).parents[2] / "README.md"
HOST = "SmolLM2-135M-Instruct"
QWEN = "Qwen2.5-Coder-1.5B-Instruct"
SIZES = f"{HOST}, Qwen2.5-Coder-0.5B-Instruct and 1.5B-Instruct"
_BLOCK = re.compile(r"(?P<start><!-- table: (?P<name>\S+) -->\n)(?P<body>.*?)(?P<end><!-- end -->)", re.DOTALL)


class Shown(NamedTuple):
    """What a table shows.

    Attributes:
        result: name of the result, or names of several, a blank between.
        host: the language model behind the figures.
        table: its lines, from the metrics of each result.
        experiment: that makes the result; by default the one of its name.
    """

    result: str
    host: str
    table: Callable[..., list[str]]
    experiment: str = ""


TABLES = {
    "demo": Shown("demo", HOST, reading.demo_table),
    "hgr": Shown("hgr-qwen1.5b", QWEN, hgr.gain_table, "hgr"),
    "hgr-peers": Shown("hgr-qwen1.5b", QWEN, hgr.peers_table, "hgr"),
    "hgr-differences": Shown("hgr-qwen1.5b", QWEN, hgr.difference_table, "hgr"),
    "hgr-sizes": Shown("hgr-smollm2-135m hgr-qwen0.5b hgr-qwen1.5b", SIZES, hgr.sizes_table, "hgr"),
    "hgr-small": Shown("hgr-smollm2-135m", HOST, hgr.small_table, "hgr"),
    "hgr-prose": Shown("hgr-smollm2-135m", HOST, hgr.prose_table, "hgr"),
    "questions": Shown("questions-qwen1.5b", QWEN, questions.answers_table, "questions"),
    "ruler": Shown("ruler-qwen1.5b", QWEN, questions.ruler_table, "ruler"),
    "experts": Shown("experts-qwen0.5b", "Qwen2.5-Coder-0.5B-Instruct", routing.pair_table, "experts"),
    "nextline": Shown("reading", HOST, reading.nextline_table),
    "identifiers": Shown("reading", HOST, reading.identifiers_table),
    "retrieval": Shown("reading", HOST, reading.facts_table),
    "hgr-unseen": Shown(
        "hgr-qwen1.5b hgr-unseen-qwen1.5b hgr-smollm2-135m hgr-unseen-smollm2-135m",
        f"{QWEN}; {HOST}",
        hgr.unseen_table,
        "hgr",
    ),
    "near-matches": Shown(
        "near-matches-smollm2-135m near-matches-qwen0.5b near-matches-qwen1.5b",
        SIZES,
        reading.near_table,
        "near-matches",
    ),
    "updates": Shown("updates-qwen1.5b", QWEN, reading.updates_table, "updates"),
    "free": Shown("free-qwen1.5b", QWEN, reading.free_table, "free"),
    "tra-mini": Shown("tra-mini", "none, the crouter alone", reconstruction.tra_table),
    "compress-cpu": Shown("compress-cpu", HOST, cost.compress_table),
    "generation-gpu": Shown("generation-gpu", QWEN, cost.generation_table, "compaction"),
    "suffix-index": Shown("suffix-index", "none, the index alone", cost.index_table),
    "copy-cpu": Shown("copy-cpu", HOST, cost.step_table),
    "routing": Shown("routing", HOST, routing.accuracy_table),
    "routing-host": Shown("routing", HOST, routing.host_table),
    "routing-costs": Shown("routing", HOST, routing.cost_table),
    "drafts": Shown("reading-drafts reading-drafts-qwen1.5b", f"{HOST}; {QWEN}", reading.drafts_table, "reading"),
    "retrieval-questions": Shown("retrieval-questions", "none, the choice alone", questions.retrieval_table),
    "retrieval-choice": Shown("retrieval-choice", "none, the choice alone", cost.choice_table),
    "ruler-small": Shown("ruler-smollm2-135m", HOST, questions.ruler_table, "ruler"),
    "training-gpu": Shown("training-gpu", "none, the crouter alone", cost.training_table),
}


def render(name: str, folder: Path = FOLDER) -> str:
    """A table in Markdown, with host, device and the command that made it.

    Raises:
        InputError: no table of this name, or a result that cannot be read.
    """
    if name not in TABLES:
        raise InputError(f"no table is called {name}; there are {', '.join(TABLES)}")
    source, host, table, experiment = TABLES[name]
    paths = [folder / f"{one}.json" for one in source.split()]
    path = paths[0]
    try:
        results: list[dict[str, Any]] = []
        for path in paths:
            results.append(json.loads(path.read_text(encoding="utf-8")))
        lines = table(*(result["metrics"] for result in results))
        devices = "; ".join(dict.fromkeys(result["device"] for result in results))
        made = ", ".join(f"`{result['command']}` ({result['date']})" for result in results)
        origin = f"Device: {devices}. Made by {made}."
    except FileNotFoundError:
        lines = table(*({} for _ in paths))
        origin = f"Device: {MISSING}. Made by `python -m eval.run {experiment or source}`."
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


def main(argv: list[str] | None = None) -> int:
    """Rewrites the file; with `--check` names each stale table and returns 1. Bad input: 2."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.tables",
        description="Makes the README's tables anew from eval/results, and docs/hosts.md.",
    )
    parser.add_argument("file", nargs="?", type=Path, default=README, help="README.md by default")
    parser.add_argument("--check", action="store_true", help="change nothing; status 1 where a table is stale")
    parser.add_argument("--results", type=Path, default=FOLDER, help="folder of the results")
    arguments = parser.parse_args(argv)
    try:
        text = arguments.file.read_text(encoding="utf-8")
        fresh, stale = rewrite(text, arguments.results)
        made = {arguments.file: fresh} if stale else {}
        if arguments.file == README:  # beside the results, the package's own list of hosts
            page = hosts.PAGE.read_text(encoding="utf-8")
            if (anew := hosts.rewrite_page(page)) != page:
                made[hosts.PAGE] = anew
                stale.append(hosts.PAGE.name)
        if arguments.check:
            for name in stale:
                print(f"{arguments.file.name}: table {name} is stale; run python -m eval.tables", file=sys.stderr)
            return 1 if stale else 0
        for path, content in made.items():
            with replaced_file(path) as temporary:
                temporary.write_text(content, encoding="utf-8")
    except (InputError, OSError) as error:
        print(f"eval.tables: error: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.file.name}: {', '.join(stale) or 'no table'} changed")
    return 0
