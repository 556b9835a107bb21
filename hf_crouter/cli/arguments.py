"""Command-line options from a dataclass, so that a setting and its help text are written once.

Not by `transformers.HfArgumentParser`: there a flag takes the word behind it for its value (`--bf16 NAME`), only flags
that are on by default have a `--no-FLAG`, lists may not be empty, names of several words are offered twice, with `_`
and with `-`, and no public method adds a dataclass to a parser that exists.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from ..data.prepare import prepare
from ..errors import InputError

T = TypeVar("T")


def add_options(parser: argparse.ArgumentParser, cls: type) -> None:
    """Adds an option for every field; a field without default is required.

    Args:
        parser: gets the options.
        cls: a dataclass whose fields are str, int, float, bool, optional ones of these, or lists of them; their help
            stands in `metadata["help"]`.
    """
    hints = get_type_hints(cls)
    for field in fields(cls):
        options: dict[str, Any] = {"help": field.metadata.get("help", "")}
        kind, default = _kind(hints[field.name]), _default(field)
        if kind is bool:
            options |= {"action": argparse.BooleanOptionalAction, "default": default}
        else:
            options |= {
                "type": kind,
                "required": default is MISSING,
                "default": None if default is MISSING else default,
            }
            if isinstance(default, list):
                options["nargs"] = "*"
            if default not in (MISSING, None, "", []):
                options["help"] += " (default: %(default)s)"
        parser.add_argument("--" + field.name.replace("_", "-"), **options)


def from_options(cls: type[T], options: argparse.Namespace) -> T:
    """The dataclass from parsed options."""
    return cls(**{field.name: getattr(options, field.name) for field in fields(cls)})  # type: ignore[arg-type]


def prepared_data(corpora: list[str], data: str, output: str, tokenizer: Any) -> str:
    """Folder of the prepared corpus: `data`, else `output`/data; prepares `corpora` into it first, if there are any.

    Raises:
        InputError: several processes would prepare the same corpora.
    """
    folder = data or str(Path(output) / "data")
    if corpora:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise InputError("--corpus: expected one process, got several; run hf_crouter.data.prepare first")
        prepare(corpora, tokenizer, folder)
    return folder


def _default(field: Field) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _kind(hint: Any) -> type:
    known = [kind for kind in (get_args(hint) or (hint,)) if kind is not type(None)]
    return known[0]
