"""`python -m eval.run NAME [arguments]`: measures and writes `eval/results/NAME.json`."""

from __future__ import annotations

import argparse
import sys

from eval import demo, reconstruction
from eval.cost import compaction, copy_step, prefill, retrieval_choice, speed, suffix_index, training
from eval.hgr import experiment as hgr
from eval.questions import answers, retrieval, ruler
from eval.reading import experiment as reading
from eval.reading import free, near_matches, updates
from eval.routing import experiment as routing
from eval.routing import host_experts
from hf_crouter.errors import InputError

EXPERIMENTS = {
    "demo": demo,
    "tra-mini": reconstruction,
    "speed": speed,
    "compaction": compaction,
    "compress-cpu": prefill,
    "suffix-index": suffix_index,
    "retrieval-choice": retrieval_choice,
    "training-gpu": training,
    "ruler": ruler,
    "hgr": hgr,
    "reading": reading,
    "near-matches": near_matches,
    "updates": updates,
    "free": free,
    "questions": answers,
    "retrieval-questions": retrieval,
    "copy-cpu": copy_step,
    "routing": routing,
    "experts": host_experts,
}


def main(argv: list[str] | None = None) -> int:
    """Runs one experiment; exit status 2 on bad input."""
    parser = argparse.ArgumentParser(prog="python -m eval.run", description=__doc__)
    commands = parser.add_subparsers(dest="name", required=True)
    for name, module in EXPERIMENTS.items():
        module.configure(commands.add_parser(name, help=(module.__doc__ or "").splitlines()[0]))
    arguments = parser.parse_args(argv)
    try:
        EXPERIMENTS[arguments.name].run(arguments)
    except (InputError, FileNotFoundError) as error:
        print(f"eval.run {arguments.name}: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
