"""Joins parts of a result that several processes measured: `python -m eval.merge NAME PART.json...`.

What a part measured replaces or joins what `eval/results/NAME.json` holds of it; the rest stays. Commands, commits and
devices of all are named.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.results import FOLDER
from hf_crouter.errors import InputError
from hf_crouter.utils.io import write_json

_NAMED = {"command": "; ", "commit": ", ", "device": "; "}  # said of every part, and what stands between


def merged(name: str, parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One result of several: later figures count where two have the same; notes and versions are the first's.

    Args:
        name: of the result.
        parts: results, of one seed.

    Raises:
        InputError: seeds differ.
    """
    seeds = {part["seed"] for part in parts}
    if len(seeds) != 1:
        raise InputError(f"{name}: expected parts of one seed, got {sorted(seeds)}")
    result = {**parts[0], "name": name, "date": max(part["date"] for part in parts), "config": {}, "metrics": {}}
    for key, between in _NAMED.items():
        said = ""
        for one in (one for part in parts for one in part[key].split(between)):
            if f", {one}, " not in f", {said.replace(between, ', ')}, ":  # devices have commas of their own
                said += between * bool(said) + one
        result[key] = said
    for part in parts:
        result["metrics"] |= part["metrics"]
        for key, value in part["config"].items():
            old = result["config"].get(key)
            both = isinstance(old, list) and isinstance(value, list)
            result["config"][key] = list(dict.fromkeys([*old, *value])) if both else value
    return result


def main(argv: list[str] | None = None) -> int:
    """Joins the parts; exit status 2 on bad input."""
    parser = argparse.ArgumentParser(prog="python -m eval.merge", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", help="of the result in eval/results; made where there is none")
    parser.add_argument("parts", type=Path, nargs="+", help="files of results")
    parser.add_argument("--drop", nargs="+", default=[], help="beginnings of keys that no longer count")
    args = parser.parse_args(argv)
    path = FOLDER / f"{args.name}.json"
    try:
        found = [json.loads(p.read_text(encoding="utf-8")) for p in [*([path] if path.exists() else []), *args.parts]]
        result = merged(args.name, found)
    except (OSError, ValueError, KeyError, InputError) as error:
        reason = f"expected files of results, got one without {error}" if isinstance(error, KeyError) else error
        print(f"eval.merge: error: {reason}", file=sys.stderr)
        return 2
    result["metrics"] = {k: v for k, v in result["metrics"].items() if not k.startswith(tuple(args.drop))}
    write_json(path, result)
    print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
