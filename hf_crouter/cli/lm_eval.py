"""`hf-crouter lm-eval`: lm-evaluation-harness on a host that reads its past compressed."""

from __future__ import annotations

import argparse
import re
import sys

from ..errors import InputError
from ..hosts.fetch import KNOWN_HOSTS, fetch_host

NAME = "lm-eval"
HELP = "run lm-evaluation-harness on a host, its past beyond a raw window compressed"
EXAMPLE = """hf-crouter lm-eval --model_args pretrained=smollm2-135m,window=512,retrieve=2,copy=true \\
    --tasks niah_single_1 --limit 10 --metadata '{"max_seq_lengths":[4096]}'

model_args: those of the harness's own model `hf`, crouter=FOLDER (or none), modes by name and their settings
(retrieve=2, retrieve_every=64, copy=true, soft_prompts=true; modes=auto where none is named), window= and keep_first=.
--model hf evaluates the plain host. All other words are the harness's:
  hf-crouter lm-eval run --help
  hf-crouter lm-eval ls tasks"""
OTHER_COMMANDS = ("ls", "validate")  # of the harness; they take no model


def configure(parser: argparse.ArgumentParser) -> None:
    """Takes whatever words there are: the harness has a parser of its own."""
    parser.usage = "hf-crouter lm-eval [-h] --model_args NAME=VALUE,... --tasks TASK ... [words of lm_eval]"
    parser.set_defaults(rest=[])


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    try:
        from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports] # an optional dependency

        from ..integrations import lm_eval as harness  # noqa: F401 # registers the model `crouter`
    except ModuleNotFoundError as error:
        raise InputError(
            f'lm-eval: {error.name} is not installed; it comes with an extra: pip install "hf_crouter[lm-eval]"'
        ) from error
    before = sys.argv
    sys.argv = ["hf-crouter lm-eval", *words(args.rest)]  # the harness reads no other words
    try:
        cli_evaluate()
    except (ValueError, TypeError, FileNotFoundError) as error:
        if not _about_words(error):
            raise
        raise InputError(str(error)) from error
    finally:
        sys.argv = before
    return 0


def words(rest: list[str]) -> list[str]:
    """What the harness is called with.

    Args:
        rest: words after `hf-crouter lm-eval`.
    """
    if rest[:1] and rest[0] in OTHER_COMMANDS:
        return rest
    given = rest[1:] if rest[:1] == ["run"] else rest
    return ["run", "--model", "crouter", *map(_known_host, given)]


def _known_host(word: str) -> str:
    """The word with a known host's folder for its name: tasks that write their own text read the tokenizer there."""
    names = "|".join(map(re.escape, KNOWN_HOSTS))
    pattern = rf"""(?<![\w-])(pretrained["']?\s*[=:]\s*["']?)({names})(?![\w./-])"""
    return re.sub(pattern, lambda found: found[1] + str(fetch_host(found[2])), word)


def _about_words(error: Exception) -> bool:
    """Whether the harness raised it while it read its words; anything else is a bug, and its traceback is wanted."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = trace.tb_frame.f_globals.get("__name__", "") if trace is not None else ""
    return module.startswith(("lm_eval.config.", "lm_eval._cli."))
