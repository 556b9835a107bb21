"""The `hf-crouter` command: picks a command, runs it, and turns bad input into one line and exit status 2."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from ..errors import InputError
from .console import quiet

COMMANDS = ("demo", "host", "compress", "restore", "expert", "generate", "train", "align", "budgets", "calibrate",
            "lm-eval", "doctor")  # fmt: skip
"""One module of this folder each: `NAME`, `HELP`, `EXAMPLE`, `configure(parser)` and `run(args) -> int`."""


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line like all others."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


def _command(name: str) -> ModuleType:
    return importlib.import_module(f".{name.replace('-', '_')}", __package__)


def _parser(names: Sequence[str]) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="hf-crouter",
        description="64x compressed history for Hugging Face language models.",
        epilog="hf-crouter COMMAND --help tells more, with an example. Start with: hf-crouter demo",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)
    for name in names:
        module = _command(name)
        sub = commands.add_parser(
            name,
            help=module.HELP,
            description=module.HELP[0].upper() + module.HELP[1:] + ".",
            epilog=f"example:\n  {module.EXAMPLE}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.configure(sub)
        sub.set_defaults(run=module.run)
    return parser


def _fail(message: str) -> int:
    print("hf-crouter: error:", " ".join(message.split()), file=sys.stderr)
    return 2


def _give_up_stdout() -> None:
    """What stdout still holds cannot be written; without this Python tries again at exit, with a traceback."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _leave_processes() -> None:
    """Ends what connects the processes of a training; one that exits connected can be aborted by its own threads."""
    distributed = sys.modules.get("torch.distributed")  # torch itself is not imported here
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: words after `hf-crouter`; those of the process by default.

    Returns:
        Exit status: 0, 1 when a check of `doctor` failed, 2 for bad input, 130 when interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that knows fewer characters is no reason to fail
    try:
        # only the command that runs is imported
        parser = _parser(words[:1] if words[:1] and words[0] in COMMANDS else COMMANDS)
        args, rest = parser.parse_known_args(words)
        if rest and not hasattr(args, "rest"):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        args.rest = rest  # for a command that hands them on
        with quiet():
            status = args.run(args)
        sys.stdout.flush()  # here, so that a full disk behind stdout is reported too
        return status
    except SystemExit as stop:  # --help
        return stop.code if isinstance(stop.code, int) else 0
    except KeyboardInterrupt:
        print("hf-crouter: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe left: no error
        _give_up_stdout()
        return 141
    except InputError as error:
        return _fail(str(error))
    except RuntimeError as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's; torch itself is not imported here
            return _fail(f"the device is out of memory ({str(error).splitlines()[0]})")
        raise
    except OSError as error:
        try:
            sys.stdout.flush()
        except OSError:
            _give_up_stdout()
        if error.filename and error.strerror:
            return _fail(f"{error.filename}: {error.strerror}")
        return _fail(str(error))
    finally:
        _leave_processes()
