"""Measures documents and questions: one stage of arms on all of them before the next, written after every block."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file

from eval.peers.arms import Arm
from eval.peers.host import Host
from eval.peers.presses import Wanted
from eval.peers.reading import answer, read_targets
from eval.peers.rows import BadInput, Questions, Rows, about_of, same_about, save_arrays, save_json

FIGURES = {"loss": np.float32, "right": np.int16, "lines": np.int16, "slots": np.float32}


class Progress:
    """A line now and then: how far, how fast, how long still."""

    def __init__(self, what: str, total: int, host: Host):
        self.what, self.total, self.host = what, total, host
        self.start, self.before, self.said = time.monotonic(), host.forwarded, 0.0

    def __call__(self, done: int) -> None:
        """Prints at most every two seconds, and at the end."""
        now = time.monotonic()
        if done < self.total and now - self.said < 2:
            return
        self.said, passed = now, now - self.start
        rate = (self.host.forwarded - self.before) / max(passed, 1e-9)
        left = passed / max(done, 1) * (self.total - done)
        print(f"{self.what}: {done}/{self.total}, {rate:,.0f} tokens of context/s, {passed:.0f} s, {left:.0f} s left",
              flush=True)  # fmt: skip


class DocumentResults:
    """Figures by document and key `n<chunks>.<arm>.<figure>`; a file that was begun is gone on with.

    Args:
        path: of the safetensors file.
        about: that must be the same.
    """

    def __init__(self, path: Path, about: dict[str, Any]):
        self.path, self.about = path, about
        self.found: dict[int, dict[str, Any]] = {}
        if path.exists():
            same_about(path, about_of(path), about)
            arrays = load_file(path)
            documents = arrays.pop("documents")
            for i, document in enumerate(documents.tolist()):
                row = {key: values[i] for key, values in arrays.items()}
                self.found[document] = {k: v for k, v in row.items() if v >= 0}  # neither nan nor -1

    def lacks(self, document: int, key: str) -> bool:
        """Whether `n<chunks>.<arm>` is still to be measured."""
        return f"{key}.loss" not in self.found.get(document, {})

    def add(self, document: int, key: str, figures: dict[str, Any]) -> None:
        """Notes figures of `n<chunks>.<arm>`."""
        self.found.setdefault(document, {}).update({f"{key}.{name}": value for name, value in figures.items()})

    def write(self) -> None:
        """Writes the file; what a document lacks is nan, or -1."""
        arrays = {"documents": np.array(list(self.found), np.int64)}
        for key in sorted(set().union(*self.found.values())):
            kind = FIGURES[key.rpartition(".")[2]]
            none = np.nan if kind is np.float32 else -1
            arrays[key] = np.array([row.get(key, none) for row in self.found.values()], kind)
        save_arrays(self.path, arrays, self.about)


class AnswerResults:
    """Generated ids by question and arm; a file that was begun is gone on with, as with `DocumentResults`."""

    def __init__(self, path: Path, about: dict[str, Any]):
        self.path, self.about = path, about
        self.found: dict[tuple[int, str], dict[str, Any]] = {}
        if path.exists():
            content = json.loads(path.read_text(encoding="utf-8"))
            same_about(path, content["about"], about)
            self.found = {(row["question"], row["arm"]): row for row in content["results"]}

    def add(self, question: int, arm: str, ids: list[int], slots: float) -> None:
        """Notes an answer."""
        self.found[question, arm] = {"question": question, "arm": arm, "ids": ids, "slots": slots}

    def write(self) -> None:
        """Writes the file."""
        save_json(self.path, {"about": self.about, "results": list(self.found.values())})


def measure_block(
    host: Host, rows: Rows, documents: Sequence[int], count: int, arms: Sequence[Arm], results: DocumentResults
) -> None:
    """Reads documents behind `count` chunks under every arm."""
    layout, model = rows.layout, host.model
    index = np.asarray(documents, np.int64)
    contexts = torch.from_numpy(layout.context(rows.ids[index], count).astype(np.int64)).to(model.device)
    targets = torch.from_numpy(rows.ids[index, -layout.target :].astype(np.int64)).to(model.device)
    length, size = contexts.shape[1], max(1, host.tokens // contexts.shape[1])
    wanted = [Wanted(a, a.kept(layout.prefix, layout.window, count, length), layout.prefix) for a in arms]
    for start in range(0, len(index), size):
        some = index[start : start + size]
        context, target = contexts[start : start + size], targets[start : start + size]
        read = torch.cat([context[:, -1:], target], 1)
        for short in host.shorten(context, wanted):
            cache = (short.cache, short.valid)
            told = read_targets(model, host.attention, cache, read, rows.lines[some], length - 1)
            for i, document in enumerate(some.tolist()):
                figures = {"loss": told.loss[i], "right": told.right[i], "lines": told.lines[i]}
                results.add(document, f"n{count}.{short.name}", {**figures, "slots": short.slots[i]})


def measure_documents(
    host: Host,
    name: str,
    rows: Rows,
    index: np.ndarray,
    counts: Sequence[int],
    arms: Sequence[Arm],
    results: DocumentResults,
    block: int,
) -> None:
    """Measures a stage of arms on documents.

    Args:
        host: that reads.
        name: of the set.
        rows: of the set.
        index: numbers of the documents, in order.
        counts: of chunks.
        arms: of one stage.
        results: where they go; written after every block.
        block: documents.
    """
    what, left = f"{name} {' '.join(arm.name for arm in arms)}", {}
    for count in counts:
        for document in index.tolist():
            lacking = tuple(arm for arm in arms if results.lacks(document, f"n{count}.{arm.name}"))
            if lacking:
                left.setdefault(document, {})[count] = lacking
    if not left:
        print(f"{what}: done before", flush=True)
        return
    progress, order = Progress(what, len(left), host), list(left)
    for start in range(0, len(order), block):
        some = order[start : start + block]
        for count in counts:
            for lacking in dict.fromkeys(left[document].get(count, ()) for document in some):
                alike = [document for document in some if left[document].get(count, ()) == lacking]
                if lacking:
                    measure_block(host, rows, alike, count, lacking, results)
        results.write()
        progress(start + len(some))
    keys = [f"n{count}.{arm.name}" for count in counts for arm in arms]
    for key in keys:
        found = [results.found[document] for document in index.tolist()]
        loss, slots = (np.mean([row[f"{key}.{figure}"] for row in found]) for figure in ("loss", "slots"))
        print(f"{name}.{key:32} {loss:.4f} nats/token at {slots:.1f} slots", flush=True)


def measure_questions(
    host: Host,
    name: str,
    questions: Questions,
    index: np.ndarray,
    arms: Sequence[Arm],
    results: AnswerResults,
    block: int,
) -> None:
    """Answers questions under a stage of arms; arguments as in `measure_documents`."""
    what = f"{name} {' '.join(arm.name for arm in arms)}"
    left = {i: [arm for arm in arms if (i, arm.name) not in results.found] for i in index.tolist()}
    left = {i: lacking for i, lacking in left.items() if lacking}
    if not left:
        print(f"{what}: done before", flush=True)
        return
    progress = Progress(what, len(left), host)
    for done, (number, lacking) in enumerate(left.items(), 1):
        question = questions.questions[number]
        length, last = len(question.ids), question.ids[-1]
        context = torch.tensor([question.ids], device=host.model.device)
        wanted = [
            Wanted(arm, arm.kept(question.prefix, questions.window, question.count, length), question.prefix)
            for arm in lacking
        ]
        for short in host.shorten(context, wanted):
            cache = (short.cache, short.valid)
            ids = answer(host.model, host.attention, cache, last, length - 1, questions.most, questions.stop)
            results.add(number, short.name, ids, float(short.slots[0]))
        if done % block == 0 or done == len(left):
            results.write()
            progress(done)


def check_ids(host: Host, what: str, largest: int) -> None:
    """Raises unless a host has embeddings for all ids.

    Raises:
        BadInput: it has not.
    """
    size = host.model.get_input_embeddings().num_embeddings
    if largest >= size:
        raise BadInput(f"{what}: expected ids below {size}, the host's vocabulary, got {largest}")
