"""Questions over 8k and 16k tokens, answered by every way of reading.

Three stages. `prepare` (CPU) writes the prompts in the host's chat template; `collect` (accelerator) lets each arm
answer greedily and writes what it said, arm by arm, restartable, over shards of the questions; `report` (CPU) looks
the answers up, also in what `eval.peers` wrote, and writes `questions-HOST.json`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eval.arms import GENERATING, Reader
from eval.arrays import shard_of
from eval.questions.prompts import LENGTHS, MADE, SETS, Question, asked_at, build, is_right, load, save
from eval.results import host_key, host_note, provenance, write_result
from eval.statistics import mean_with_interval
from hf_crouter.crouter.loading import load_crouter
from hf_crouter.errors import InputError
from hf_crouter.hosts.fetch import resolve_host
from hf_crouter.hosts.loading import load_host, load_host_tokenizer
from hf_crouter.utils.io import write_json
from hf_crouter.utils.progress import Progress

ARMS = ("window", "full", "retrieve2", "retrieve4", "compact64", "compact32_retrieve2", "compact64_retrieve2",
        "compact32", "copy", "retrieve2_copy", "retrieve4_copy", "retrieve8")  # fmt: skip
MADE_BY = "made.json"  # where the answers were collected
NOTES = (
    "accuracy: share of greedy answers of at most 16 tokens in which one of the known answers stands, whole words, "
    "without case, punctuation and articles. slots: most positions in the cache. xquad: odd English paragraphs of "
    "XQuAD (even ones served to choose the retriever's constants), each asked about once; nq: Natural Questions with "
    "their gold passage; other passages fill the prompt, none of which holds an answer. The system turn stays raw. "
    "Ways with a history read the passages in a call of their own; the question comes in a second one. "
    "Intervals: bootstrap, clustered by passage. <method>.at<t>: kvpress on the whole prompt, question included."
)


def answer(reader: Reader, arm: str, questions: Sequence[Question]) -> tuple[list[list[int]], list[int]]:
    """Greedy answers of an arm, token ids, and the most slots of each row.

    With a history the passages are read in a call of their own, and the question is asked in a second one on its
    cache: what was compressed was so before the question was known.
    """
    history = reader.history(arm)
    pad = reader.tokenizer.pad_token_id
    options = {"do_sample": False, "pad_token_id": pad if pad is not None else reader.tokenizer.eos_token_id}
    try:
        with torch.inference_mode():
            if history is not None:
                options |= {"logits_processor": [history]}
                before = [question.ids[: asked_at(question, reader.tokenizer)] for question in questions]
                read = reader.host.generate(
                    **_padded(before, reader.host), max_new_tokens=1, return_dict_in_generate=True, **options
                )
                options["past_key_values"] = read.past_key_values
            inputs = _padded([question.ids for question in questions], reader.host)
            out = reader.host.generate(**inputs, max_new_tokens=MADE, **options)
        slots = [out.shape[1] - 1] * len(questions)
        if history is not None:
            peak = history.report(measure=False).peak_slots
            slots = [peak or out.shape[1] - 1] * len(questions)
    finally:
        if history is not None:
            history.detach()
    return out[:, inputs["input_ids"].shape[1] :].tolist(), slots


def _padded(rows: Sequence[Sequence[int]], host: Any) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` `[B, T]`, padded at the left."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids.to(host.device), "attention_mask": mask.to(host.device)}


def run_prepare(args: argparse.Namespace) -> None:
    """Writes the prompts."""
    config, tokenizer = load_host_tokenizer(resolve_host(args.host))
    for name in args.sets:
        for short in args.lengths:
            made = build(args.data, name, tokenizer, LENGTHS[short], args.questions, args.seed)
            path = args.save / f"{name}.{short}.json"
            save(path, made, tokenizer)
            print(f"{path.name}: {len(made)} questions, {np.mean([len(q.ids) for q in made]):.0f} tokens", flush=True)


def run_collect(args: argparse.Namespace) -> None:
    """Answers this shard's part of the questions."""
    cuda = torch.cuda.is_available()
    host, tokenizer = load_host(args.host, "cuda" if cuda else "cpu", torch.bfloat16 if cuda else torch.float32)
    crouter = None
    if args.crouter != "none":
        crouter, _ = load_crouter(args.crouter, "cuda" if cuda else "cpu")
    reader = Reader(host.requires_grad_(False), tokenizer, crouter, args.gate, keep_first="auto")
    shard, shards = args.shard
    arms = reader.readable(args.arms)
    write_json(args.save / MADE_BY, provenance())
    for name in args.sets:
        for short in args.lengths:
            questions, _ = load(args.save / f"{name}.{short}.json")
            numbers = list(range(min(len(questions), args.questions)))[shard::shards]
            path = args.save / f"answers.{name}.{short}.ours.{shard}of{shards}.json"
            done = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
            known = {(entry["arm"], entry["number"]) for entry in done}
            with Progress() as progress:
                progress.start(f"{name}.{short} {shard}/{shards}", len(numbers) * len(arms), "answers", "tokens")
                for arm in arms:
                    left = [number for number in numbers if (arm, number) not in known]
                    progress.advance(len(numbers) - len(left), 0)
                    for first in range(0, len(left), args.batch):
                        some = left[first : first + args.batch]
                        said, slots = answer(reader, arm, [questions[number] for number in some])
                        for number, ids, most in zip(some, said, slots, strict=True):
                            done.append({"number": number, "arm": arm, "ids": ids, "slots": most})
                        progress.advance(len(some), sum(len(questions[number].ids) for number in some))
                    write_json(path, done)
                progress.finish()
            for arm in arms:
                right = [is_right(text_of(tokenizer, e["ids"]), questions[e["number"]].answers)
                         for e in done if e["arm"] == arm]  # fmt: skip
                print(f"{name}.{short}.{arm} {args.shard}: {sum(right)} of {len(right)}", flush=True)


def text_of(tokenizer: Any, ids: Sequence[int]) -> str:
    """What was said, without special tokens."""
    return tokenizer.decode([i for i in ids if i >= 0], skip_special_tokens=True)


def run_report(args: argparse.Namespace) -> None:
    """Looks the answers up and writes the result.

    Raises:
        InputError: nothing was collected.
    """
    _, tokenizer = load_host_tokenizer(resolve_host(args.host))
    metrics: dict[str, float] = {}
    for name in args.sets:
        for short in args.lengths:
            entries = entries_of(args.save, f"{name}.{short}")
            if entries:
                questions, _ = load(args.save / f"{name}.{short}.json")
                metrics |= accuracies(f"{name}.{short}", entries, questions, tokenizer, args.seed)
    if not metrics:
        raise InputError(f"{args.save}: expected answers of the stage `collect`, got none")
    for key, value in metrics.items():
        if key.endswith(".accuracy"):
            print(f"{key:40} {value:.3f}, {metrics[key.replace('.accuracy', '.slots')]:,.0f} slots")
    config = {"questions": args.questions, "new_tokens": MADE, "window": 512}
    result = args.result or f"questions-{host_key(args.host)}"
    path = args.save / MADE_BY
    made = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    print(write_result(result, metrics, seed=args.seed, config=config, notes=f"{host_note(args.host)} {NOTES}",
                       device=args.device, made=made))  # fmt: skip


def entries_of(folder: Path, key: str) -> list[dict[str, Any]]:
    """What our arms and those of `eval.peers` said to the questions of a set and length: number, arm, ids, slots."""
    entries = []
    for path in sorted(folder.glob(f"answers.{key}.*.json")):
        entries += json.loads(path.read_text(encoding="utf-8"))
    for path in sorted(folder.glob(f"questions.{key}.peers.*.json")):
        for entry in json.loads(path.read_text(encoding="utf-8"))["results"]:
            entries.append({"number": entry.pop("question"), **entry})
    return entries


def accuracies(
    key: str, entries: Sequence[dict[str, Any]], questions: Sequence[Question], tokenizer: Any, seed: int
) -> dict[str, float]:
    """`<key>.<arm>.{accuracy,lo,hi,slots,questions}` of what arms said; paired differences to `full`.

    Raises:
        InputError: a question was answered twice by one arm.
    """
    said: dict[str, dict[int, dict[str, Any]]] = {}
    for entry in entries:
        if said.setdefault(entry["arm"], {}).setdefault(entry["number"], entry) is not entry:
            raise InputError(f"{key}.{entry['arm']}: question {entry['number']} was answered twice")
    metrics: dict[str, float] = {}
    right = {
        arm: {n: float(is_right(text_of(tokenizer, e["ids"]), questions[n].answers)) for n, e in found.items()}
        for arm, found in said.items()
    }
    for arm, found in right.items():
        numbers = sorted(found)
        clusters = [questions[n].cluster for n in numbers]
        share = mean_with_interval("accuracy", [found[n] for n in numbers], clusters, seed)
        metrics[f"{key}.{arm}.accuracy"] = share["accuracy"]
        metrics |= {f"{key}.{arm}.{end}": share[f"accuracy.{end}"] for end in ("lo", "hi")}
        metrics[f"{key}.{arm}.slots"] = float(np.mean([said[arm][n]["slots"] for n in numbers]))
        metrics[f"{key}.{arm}.questions"] = len(numbers)
        both = [n for n in numbers if n in right.get("full", {})]
        if arm != "full" and both:
            gaps = [found[n] - right["full"][n] for n in both]
            share = mean_with_interval("gap", gaps, [questions[n].cluster for n in both], seed)
            metrics |= {f"{key}.diff.{arm}.full.{end}": share[f"gap{'.' * bool(at)}{at}"]
                        for end, at in (("mean", ""), ("lo", "lo"), ("hi", "hi"))}  # fmt: skip
    return metrics


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    cuda = torch.cuda.device_count() > 0
    parser.add_argument("stage", choices=["prepare", "collect", "report"])
    parser.add_argument("--data", type=Path, help="prepare: folder with eval_xquad and eval_nq_oracle")
    parser.add_argument("--save", type=Path, required=True, help="folder of prompts and answers")
    parser.add_argument("--host", default="smollm2-135m", help="known name, folder or hub name")
    parser.add_argument("--crouter", help="the shipped one by default; none: arms that need one are left out")
    parser.add_argument("--gate", type=Path, help="folder of a gate that was fitted for this host")
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--lengths", nargs="+", choices=list(LENGTHS), default=list(LENGTHS))
    parser.add_argument("--arms", nargs="+", choices=GENERATING, default=list(ARMS))
    parser.add_argument("--questions", type=int, default=100, help="of a set and length, at most")
    parser.add_argument("--batch", type=int, default=8 if cuda else 2, help="prompts at once")
    parser.add_argument("--shard", type=shard_of, default=(0, 1), help="i/k: this process of k that run at once")
    parser.add_argument("--device", help="report: where answers were collected; this machine by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--result", help="questions-HOST by default")


def run(args: argparse.Namespace) -> None:
    """Prepares, collects or reports.

    Raises:
        InputError: no data to prepare from.
    """
    if args.stage == "prepare" and args.data is None:
        raise InputError("questions prepare: expected --data FOLDER, got none")
    {"prepare": run_prepare, "collect": run_collect, "report": run_report}[args.stage](args)
