"""Options of the command line for ways to read: one for every mode, and one for each of its simple settings."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re

from ..modes import MODES, modes_from_options
from ..types import Mode

SIMPLE = (int, float, bool, str)  # settings by the kind of their default; others are for Python


def add_modes(parser: argparse.ArgumentParser) -> None:
    """Adds `--modes`, and `--NAME [VALUE]` and `--NAME-SETTING VALUE` for every registered mode."""
    group = parser.add_argument_group("ways to read the past", "without any of them: --modes auto")
    choices = "auto: what works at once with what is there; fast: retrieval alone; none: drops what leaves the window"
    group.add_argument("--modes", choices=["auto", "fast", "none"], help=choices)
    for name, cls in MODES.items():
        texts, option = _described(cls), "--" + name.replace("_", "-")
        first, *others = [field for field in dataclasses.fields(cls) if field.init]
        words = f"{_first_sentence(cls)} {first.name}: {texts[first.name]}".replace("%", "%%")
        group.add_argument(option, nargs="?", const=True, metavar=first.name.upper(), help=words)
        for field in others:
            if type(field.default) in SIMPLE:
                switch = {"nargs": "?", "const": True} if type(field.default) is bool else {}
                words = f"{texts[field.name]} (default: {field.default})".replace("%", "%%")
                group.add_argument(f"{option}-{field.name.replace('_', '-')}", metavar="VALUE", help=words, **switch)


def modes_of(args: argparse.Namespace) -> str | list[Mode]:
    """The modes that the options name; "auto" where they name none.

    Raises:
        InputError: a value of the wrong kind, or a setting of a mode that is not on.
    """
    names = {f"{name}_{field.name}" for name, cls in MODES.items() for field in dataclasses.fields(cls)}
    options = {key: value for key, value in vars(args).items() if key in {"modes", *MODES, *names}}
    return modes_from_options(options)[0]


def _described(cls: type) -> dict[str, str]:
    """What the docstring says of each attribute, in one line."""
    text = inspect.getdoc(cls) or ""
    part = text.partition("Attributes:\n")[2].partition("\n\n")[0]
    found = re.findall(r"^    (\w+): (.*?)(?=^    \w+: |\Z)", part, re.MULTILINE | re.DOTALL)
    return {name: " ".join(words.split()) for name, words in found}


def _first_sentence(cls: type) -> str:
    return (inspect.getdoc(cls) or "").partition("\n")[0]
