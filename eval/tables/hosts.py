"""The table of host families in `docs/hosts.md`, from the package's one list of them."""

from __future__ import annotations

import re
from pathlib import Path

from hf_crouter.errors import InputError
from hf_crouter.hosts.families import CHECKS, FAMILIES, Family

PAGE = Path(__file__).parents[2] / "docs" / "hosts.md"
_BLOCK = re.compile(r"(<!-- families: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def served_table() -> list[str]:
    """Families that are served, by kind: how many checks each passes, whether `Compact` reads it, what to know."""
    lines = ["| family (`model_type`) | layers | checks | `Compact` | to know |", "| --- | --- | --- | --- | --- |"]
    families = sorted((f for f in FAMILIES.values() if not f.refused), key=lambda f: (f.kind, f.name))
    return [*lines, *(f"| {f.name} | {f.kind} | {_passed(f)} | {_compact(f)} | {f.note} |" for f in families)]


def refused_table() -> list[str]:
    """Families that are refused when a history is made, and why."""
    families = sorted((f for f in FAMILIES.values() if f.refused), key=lambda f: f.name)
    return ["| family (`model_type`) | why |", "| --- | --- |", *(f"| {f.name} | {f.refused} |" for f in families)]


TABLES = {"served": served_table, "refused": refused_table}


def rewrite_page(text: str) -> str:
    """The page with its tables made anew.

    Raises:
        InputError: a marker of an unknown table, or without its end.
    """
    names = re.findall(r"<!-- families: (\w+) -->", text)
    if set(names) != set(TABLES) or len(_BLOCK.findall(text)) != len(names):
        raise InputError(f"expected <!-- families: {' / '.join(TABLES)} --> with an <!-- end --> each, got {names}")
    return _BLOCK.sub(lambda found: "\n".join([found[1], *TABLES[found[2]](), "", found[3]]), text)


def _compact(family: Family) -> str:
    return f"no: {family.compact}" if family.compact else "yes"


def _passed(family: Family) -> str:
    missing = ", ".join(CHECKS[number] for number in family.without)
    return f"{len(CHECKS) - len(family.without)} of {len(CHECKS)}" + (
        f" (plain host: no {missing})" if missing else ""
    )
