"""RULER's tasks that write their own text, through lm-evaluation-harness: full history, window alone, each mode.

Documents are made once a length and read by every arm. Accuracy is the share of the answers that stand in the text.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import random
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eval.results import host_key, host_note, write_result
from hf_crouter.errors import InputError
from hf_crouter.hosts.fetch import resolve_host

TASKS = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe")
LENGTHS = {"4k": 4096, "8k": 8192, "16k": 16384}
ARMS: dict[str, dict[str, Any]] = {
    "full": {},
    "window": {"modes": "none"},
    "retrieve4": {"retrieve": 4},
    "compact128": {"compact": 128},
    "compact64_retrieve2": {"compact": 64, "retrieve": 2},
    "compact64": {"compact": 64},
    "compact32_retrieve2": {"compact": 32, "retrieve": 2},
    "compact32_retrieve2_copy": {"compact": 32, "retrieve": 2, "copy": True},
    "retrieve2": {"retrieve": 2},
    "retrieve2_copy": {"retrieve": 2, "copy": True},
    "soft_retrieve2_copy": {"soft_prompts": True, "retrieve": 2, "copy": True},
}
"""Modes of `CompressedHFLM`, as lm-eval's `--model_args` say them; `full` is the plain host."""
FAILED = 0.2  # accuracy of the full host below which a task is no test of reading: left out of the mean
ROOM = 128  # tokens of a prompt that RULER does not count: how the answer begins, fwe's whole answer, a chat template
NOTES = (
    "RULER by lm-evaluation-harness, accuracy 0..1, greedy; .se: standard error over documents. full: the plain host "
    "on the whole prompt; window: the raw window alone, older chunks dropped; other arms: "
    "the modes of config.arms, and the options of config.options. mean: over the tasks that the "
    "full host does at 20% or more. slots.*: most KV slots of a prompt and its answer. Documents are RULER's, written "
    "for 128 tokens less than the length, so that no arm has to cut a prompt."
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("--host", default="smollm2-135m", help="known name or folder")
    parser.add_argument("--crouter", default="crouter-code-mini", help="none: arms that need one fail")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument(
        "--lengths", nargs="+", choices=list(LENGTHS), default=["8k"], help="tokens a prompt with its answer"
    )
    parser.add_argument("--arms", nargs="+", default=["full", "compact32_retrieve2"], choices=list(ARMS))
    parser.add_argument("--limit", type=int, default=25, help="documents a task and length")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument(
        "--options", nargs="*", default=[], metavar="NAME=VALUE", help="of every history, beside modes"
    )
    parser.add_argument("--chat", action="store_true", help="wrap prompts in the host's chat template")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="that ran it, if this machine's name does not say so")
    parser.add_argument("--result", help="ruler-HOST by default")


def run(args: argparse.Namespace) -> None:
    """Measures and writes the result, anew after every arm and length.

    Raises:
        InputError: the extra `lm-eval` is not installed.
        RuntimeError: an arm failed; what the others gave is written.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import simple_parse_args_string

        from hf_crouter.integrations.lm_eval import CompressedHFLM
    except ModuleNotFoundError as error:
        raise InputError(f'{error.name} is not installed; it comes with: pip install -e ".[lm-eval]"') from error
    host = resolve_host(args.host)
    options = simple_parse_args_string(",".join(args.options))
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    common = {"pretrained": host, "device": device, "batch_size": args.batch_size}
    result = args.result or f"ruler-{host_key(args.host)}"

    def write() -> Path:
        found = metrics | means(metrics)
        notes = f"{host_note(args.host)} {NOTES}"
        return write_result(result, found, seed=args.seed, config=config, notes=notes, device=args.device)

    def made(arm: str) -> Any:
        if arm == "full":
            return HFLM(**common)
        return CompressedHFLM(**common, crouter=args.crouter, window=args.window, **ARMS[arm], **options)

    manager = TaskManager(include_path=ruler_folder(), include_defaults=False)  # all defaults take long to index
    tasks = {n: load_tasks(manager, args.tasks, host, LENGTHS[n], args.limit, args.seed) for n in args.lengths}
    config = {
        "limit": args.limit, "window": args.window, "arms": {arm: ARMS[arm] for arm in args.arms}, "options": options,
        "chat": args.chat, "batch_size": args.batch_size,
        "lm_eval": metadata.version("lm_eval"),
    }  # fmt: skip
    metrics: dict[str, float] = {}
    failed = []
    for arm in args.arms:
        try:
            lm = made(arm)
            for length, loaded in tasks.items():
                start, slots = time.perf_counter(), count_slots(lm)
                found = lm_eval.simple_evaluate(
                    lm,
                    tasks=list(loaded.values()),
                    task_manager=manager,
                    apply_chat_template=args.chat,
                    bootstrap_iters=0,
                )
                for task, samples in (found or {})["samples"].items():
                    key = f"{task}.{length}.{arm}.accuracy"
                    metrics |= scores(key, [sample[str(LENGTHS[length])] for sample in samples])
                    print(f"{key}: {metrics[key]:.3f}", flush=True)
                metrics[f"slots.{length}.{arm}"] = max(slots)
                write()
                seconds = time.perf_counter() - start
                print(f"slots.{length}.{arm}: {max(slots)}; {seconds:.0f} seconds", flush=True)
        except Exception:  # the other arms are worth having without this one
            traceback.print_exc()
            failed.append(arm)
        lm = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if failed:
        raise RuntimeError(f"failed: {', '.join(failed)}; the other arms are written")
    print(write())


def means(metrics: Mapping[str, float]) -> dict[str, float]:
    """`mean.<length>.<arm>.accuracy` over the tasks that the full host does well enough, and how many they are."""
    out: dict[str, float] = {}
    for length in LENGTHS:
        able = [task for task in TASKS if metrics.get(f"{task}.{length}.full.accuracy", 0) >= FAILED]
        for arm in ARMS:
            found = [metrics[key] for task in able if (key := f"{task}.{length}.{arm}.accuracy") in metrics]
            if found and len(found) == len(able):
                out |= {f"mean.{length}.{arm}.accuracy": statistics.fmean(found), f"mean.{length}.tasks": len(able)}
    return out


def ruler_folder() -> str:
    """Where the harness keeps RULER's tasks."""
    import lm_eval.tasks

    return str(Path(lm_eval.tasks.__file__).parent / "ruler")


def load_tasks(manager: Any, names: list[str], host: str, length: int, count: int, seed: int) -> dict[str, Any]:
    """Tasks of the harness, each with documents of its own.

    Args:
        manager: the harness's `TaskManager`.
        names: of `TASKS`.
        host: folder or hub name of the tokenizer.
        length: tokens of a prompt with its answer, at most.
        count: documents a task; the harness alone always writes 500.
        seed: each task's documents depend on it, on length and on count, not on the other tasks.
    """

    def documents(name: str) -> Callable[..., Any]:
        def made(**_: Any) -> Any:
            import datasets

            start = time.perf_counter()
            split = datasets.Dataset.from_list(write_documents(name, host, length, count, seed))
            print(f"{name}.{length}: {len(split)} documents in {time.perf_counter() - start:.1f} seconds", flush=True)
            return {"test": split}

        return made

    with _no_download():
        group = {"group": "own", "task": [{"task": name, "custom_dataset": documents(name)} for name in names]}
        return manager.load([group])["tasks"]


def write_documents(name: str, host: str, length: int, count: int, seed: int) -> list[dict[str, Any]]:
    """Documents of one task, as the harness writes them but as many as wanted; arguments of `load_tasks`."""
    from lm_eval.tasks.ruler import common_utils, cwe_utils, fwe_utils, niah_utils, prepare_niah, vt_utils

    tokenizer, most = common_utils.get_tokenizer(host), length - ROOM

    def needles(haystack: str, keys: str, values: str) -> list[dict[str, Any]]:
        return prepare_niah.generate_samples(
            prepare_niah.get_haystack(type_haystack=haystack), max_seq_length=most, template=niah_utils.TEMPLATE,
            type_haystack=haystack, type_needle_k=keys, type_needle_v=values, num_samples=count, TOKENIZER=tokenizer,
        )  # fmt: skip

    def variables() -> list[dict[str, Any]]:
        write = vt_utils.sys_vartrack_w_noise_random
        example = write(tokenizer=tokenizer, num_samples=1, max_seq_length=500, incremental=5)[0]
        return write(tokenizer=tokenizer, num_samples=count, max_seq_length=most, icl_example=example)

    writers: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "niah_single_1": lambda: needles("repeat", "words", "numbers"),
        "niah_multikey_2": lambda: needles("needle", "words", "numbers"),
        "niah_multikey_3": lambda: needles("needle", "uuids", "uuids"),
        "ruler_vt": variables,
        "ruler_cwe": lambda: cwe_utils.sys_word_pair_random(count, most, tokenizer=tokenizer),
        "ruler_fwe": lambda: fwe_utils.sys_kwext(tokenizer, most, count),
    }
    random.seed(seed)
    np.random.seed(seed)
    cwe_utils.RNG.seed(seed)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # a line a try
        documents = writers[name]()
    return [{**document, "max_length": length} for document in documents]


@contextlib.contextmanager
def _no_download():
    """RULER fetches data to cut essays into sentences when it is imported; these tasks have no essays."""
    import nltk

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tokenizers" / "punkt_tab").mkdir(parents=True)
        nltk.data.path.append(folder)
        try:
            yield
        finally:
            nltk.data.path.remove(folder)


def count_slots(lm: Any) -> list[int]:
    """A list to which the model adds the most KV slots of a row, for each batch that it generates from now on."""
    slots, generate = [], lm._model_generate

    def counted(*args: Any, **options: Any) -> torch.Tensor:
        out = generate(*args, **options)
        history = getattr(lm, "history", None)
        compressed = history.report(measure=False).peak_slots if history is not None else 0
        slots.append(compressed or out.shape[1] - 1)  # the last token is not read
        return out

    lm._model_generate = counted
    return slots


def scores(key: str, values: list[float]) -> dict[str, float]:
    """Mean of the documents' scores and its standard error."""
    found = {key: statistics.fmean(values)}
    if len(values) > 1:
        found[f"{key}.se"] = statistics.stdev(values) / len(values) ** 0.5
    return found
