"""RULER's tasks that write their own text, through lm-evaluation-harness: full history, window alone, ours.

Documents are made once a length and read by every arm. Accuracy is the share of the answers that stand in the text.
"""

from __future__ import annotations

import argparse
import gc
import random
from collections.abc import Callable
from importlib import metadata
from typing import Any

import numpy as np
import torch

from eval.results import write_result
from hf_crouter.errors import InputError
from hf_crouter.host.fetch import resolve_host

TASKS = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe")
LENGTHS = (4096, 8192)
ARMS = ("full", "window", "ours")
NOTES = (
    "RULER by lm-evaluation-harness, accuracy 0..1, greedy. full: the plain host on the whole prompt; window: the raw "
    "window alone, older chunks dropped; ours: CompressedHistory with the options of config.ours."
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("--host", default="smollm2-135m", help="known name or folder")
    parser.add_argument("--crouter", default="crouter-code-mini")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument(
        "--lengths", nargs="+", type=int, default=list(LENGTHS), help="tokens a prompt with its answer"
    )
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--limit", type=int, default=50, help="documents a task and length, at most 500")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--ours", nargs="*", default=[], metavar="NAME=VALUE", help="options of CompressedHistory")
    parser.add_argument("--chat", action="store_true", help="wrap prompts in the host's chat template")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--result", default="lm-eval")


def run(args: argparse.Namespace) -> None:
    """Measures and writes the result.

    Raises:
        InputError: the extra `lm-eval` is not installed.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import simple_parse_args_string

        from hf_crouter.harness import CompressedHFLM
    except ModuleNotFoundError as error:
        raise InputError(f'{error.name} is not installed; it comes with: pip install -e ".[lm-eval]"') from error
    host = resolve_host(args.host)
    ours = simple_parse_args_string(",".join(args.ours))
    common = {"pretrained": host, "device": "cuda:0", "batch_size": args.batch_size}
    makers: dict[str, Callable[[], Any]] = {
        "full": lambda: HFLM(**common),
        "window": lambda: CompressedHFLM(**common, crouter="none", window=args.window),
        "ours": lambda: CompressedHFLM(**common, crouter=args.crouter, **{"window": args.window, **ours}),
    }
    tasks = {}
    for length in args.lengths:
        random.seed(args.seed)
        np.random.seed(args.seed)
        manager = TaskManager(metadata={"pretrained": host, "max_seq_lengths": [length]})
        tasks[length] = manager.load(args.tasks)["tasks"]
    metrics: dict[str, float] = {}
    for arm in args.arms:
        lm = makers[arm]()
        for length, loaded in tasks.items():
            found = lm_eval.simple_evaluate(
                lm,
                tasks=list(loaded.values()),
                task_manager=manager,
                limit=args.limit,
                apply_chat_template=args.chat,
                log_samples=False,
                bootstrap_iters=0,
            )
            for task, values in (found or {})["results"].items():
                metrics[f"{task}.{length}.{arm}"] = values[f"{length},none"]
                print(f"{task}.{length}.{arm}: {values[f'{length},none']:.3f}", flush=True)
        del lm
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    config = {
        "limit": args.limit, "window": args.window, "ours": ours, "chat": args.chat, "batch_size": args.batch_size,
        "lm_eval": metadata.version("lm_eval"),
    }  # fmt: skip
    print(write_result(args.result, metrics, seed=args.seed, config=config, notes=NOTES))
