"""Measures of generated code beside the text that really follows."""

from __future__ import annotations

import re
from collections.abc import Sequence

NAME = re.compile(r"[A-Za-z_]\w{3,}")
QUOTED = re.compile(r"\"[^\"\n]*\"|'[^'\n]*'")
STRING = re.compile(r"\"[^\"\n]{4,}\"|'[^'\n]{4,}'")


def first_line(text: str) -> str:
    """The first line that is not empty, without the space around it."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def similarity(made: str, wanted: str) -> float:
    """Edit similarity, 0 to 1: 1 - Levenshtein distance over the longer length."""
    if made == wanted:
        return 1.0
    row = list(range(len(wanted) + 1))
    for i, a in enumerate(made, 1):
        before, row[0] = row[0], i
        for j, b in enumerate(wanted, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (a != b))
    return 1.0 - row[-1] / max(len(made), len(wanted))


def statement(text: str) -> str:
    """The first statement: lines from the first one that is not empty until brackets are closed."""
    lines: list[str] = []
    for line in text.splitlines():
        if line.strip():
            lines.append(line.strip())
        bare = QUOTED.sub("", " ".join(lines))
        if lines and sum(map(bare.count, "([{")) <= sum(map(bare.count, ")]}")):
            break
    return " ".join(lines)


def repeated_trigrams(ids: Sequence[int]) -> float:
    """Share of the trigrams of ids that stood earlier among them."""
    grams = list(zip(ids, ids[1:], ids[2:], strict=False))
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def right_before_mistake(made: Sequence[int], wanted: Sequence[int]) -> int:
    """Tokens up to the first that differs."""
    return next((i for i, (a, b) in enumerate(zip(made, wanted, strict=False)) if a != b), min(len(made), len(wanted)))


def known_names(made: str, *sources: str) -> tuple[int, int]:
    """Names and strings of at least 4 characters in generated text: how many a source holds, and how many in all."""
    names = set().union(*(NAME.findall(source) for source in sources))
    found = [name in names for name in NAME.findall(STRING.sub(" ", made))]
    found += [any(string in source for source in sources) for string in STRING.findall(made)]
    return sum(found), len(found)
