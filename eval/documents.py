"""Builds the sets of rows that readings are measured on, in the tokens of any host: `python -m eval.documents`.

`young` (one file of code), `repo` (a file behind other files of its package), `files`, `packages` and `prose` are for
measuring; `gate_code`, `gate_repo` and `gate_prose` are for training gates, and share no package and no record with
those. Rows stand in an order of which any first part is a fair sample.

`young` and `repo` are packages first published in 2025 or later. `files` are those that the split of the shipped
crouter lists as held out, of packages whose other files it was trained on. There are 825 of them, about 200 long
enough, so the longest give up to three windows that do not overlap.

Not covered: code that a young package copied from an older one which is not installed here.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from eval.repositories import repository_rows
from eval.rows import Record, Rows, Shape, breaks_lines, in_turns, line_numbers, place, repetition, row_grams
from eval.sources import DOMAINS, leval_documents, no_copy, package_lists, packages, records_of
from hf_crouter.chunking import tokenizer_fingerprint
from hf_crouter.data.corpora import load_corpus
from hf_crouter.data.dedup import GRAM, deduplicate, ngram_overlap, training_grams
from hf_crouter.data.documents import Document
from hf_crouter.data.shingles import gram_hashes
from hf_crouter.data.split import Split
from hf_crouter.data.tokens import TokenArray, plain_tokenizer
from hf_crouter.errors import InputError
from hf_crouter.hosts.fetch import resolve_host
from hf_crouter.hosts.loading import load_host_tokenizer

MAXIMUM = 0.5  # share of 13-grams above which a document is dropped, for repetition and for both overlaps
EACH = {"files": 3}  # windows of one file, at most; one where nothing is said
# Held-out files that share most 13-grams with trained ones in the versions listed here, though not at training time.
TWINS = {"numba/cpython/cmathimpl.py", "transformers/models/mobilevit/modeling_mobilevit.py"}
FEW = 30  # a domain of fewer long documents than this gives several windows of each

EVALUATION = ("young", "repo", "files", "packages", "prose")
REPOSITORY = 40  # chunks of `repo`
# Documents of one package or domain, at most. Few packages are held out, and a twentieth of the others' files.
CAPS = {"young": 12, "repo": 4, "gate_code": 12, "gate_repo": 2, "prose": 30, "gate_prose": 42, "files": 48,
        "packages": 150}  # fmt: skip
_CHECKPOINT = Path(__file__).parent.parent / "hf_crouter" / "checkpoints" / "crouter-code-mini"


def shape_of(name: str, chunks: int = REPOSITORY) -> Shape:
    """Of a set's rows; `chunks` are those of the sets of repositories."""
    return Shape(chunks=chunks) if name.endswith("repo") else Shape()


def _share_within(grams: np.ndarray, known: np.ndarray) -> float:
    at = np.searchsorted(known, grams)  # `np.isin` would sort millions again for every row
    return float((known[np.minimum(at, len(known) - 1)] == grams).mean()) if len(known) else 0.0


def cut(
    documents: Iterable[Document],
    tokenizer: Any,
    *,
    cap: int,
    each: int = 1,
    seed: int = 0,
    prose: bool = False,
    known: np.ndarray | None = None,
    forbidden: np.ndarray | None = None,
    shape: Shape | None = None,
    repository: bool = False,
) -> Rows:
    """Cuts rows from every document that passes the rules, at most `cap` from one group.

    Args:
        documents: files of packages (group: the package), or records of prose (group: the domain).
        tokenizer: of the host, of transformers.
        cap: rows of one group, at most.
        each: windows of one document, at most, which do not overlap; every first one goes before any second one.
        seed: of order and offsets.
        prose: a group of fewer than 30 long documents may give more windows of each, up to the cap.
        known: sorted text 13-grams (`training_grams`); a document of which they hold more than half is dropped.
        forbidden: sorted token 13-grams (`row_grams`); so is a row of which they hold more than half.
        shape: of the rows; that of one file's by default.
        repository: what stands before a file's own beginning is other files of its group.
    """
    shape = shape or Shape()
    encode = _encoder(plain_tokenizer(tokenizer))
    shortest = 3 * ((shape.window + shape.target) if repository else shape.length) // 2  # a table of digits has more
    dropped: Counter[str] = Counter()
    kept_all = list(documents)
    long = [document for document in kept_all if len(document.text) >= shortest or dropped.update(["short"])]
    unique = deduplicate(long, workers=1)
    dropped["duplicate"] += unique.exact + unique.near
    overlaps: dict[tuple[str, str], float] = {}  # two packages may hold files of one name
    if known is not None:
        shares = ngram_overlap(unique.documents, known, workers=1)
        overlaps = {(d.group, d.id): float(share) for d, share in zip(unique.documents, shares, strict=True)}
    groups: dict[str, list[Document]] = {}
    for document in kept_all if repository else ():
        groups.setdefault(document.group, []).append(document)
    rows: list[np.ndarray] = []
    records: list[Record] = []
    for group, members in groupby(sorted(unique.documents, key=lambda d: (d.group, place(seed, d.id))), _group):
        fresh = [d for d in members if overlaps.get((d.group, d.id), 0.0) <= MAXIMUM or dropped.update(["seen"])]
        kept = 0
        found = (
            repository_rows(fresh, groups[group], encode, shape, 2 * cap, seed, dropped)
            if repository
            else _file_rows(fresh, encode, shape, cap, each, seed, prose, dropped)
        )
        for name, document, row in found:
            overlap = overlaps.get((group, document.id))
            if forbidden is not None:
                overlap = _share_within(gram_hashes(row.astype(np.uint64), GRAM), forbidden)
            overlap = None if overlap is None else round(overlap, 4)
            share = round(repetition(row, shape.target), 4)
            rule = "repetition" if share > MAXIMUM else "evaluation" if (overlap or 0.0) > MAXIMUM else ""
            if rule or kept == cap:
                dropped[rule or "cap"] += 1
                continue
            kept += 1
            cluster, domain = (document.id, group) if prose else (group, "code")
            records.append(Record(name if prose else f"{group}/{name}", cluster, domain, share, overlap))
            rows.append(row)
    order, breaks = in_turns(records, seed), breaks_lines(tokenizer)
    ids = np.stack([rows[i] for i in order]) if rows else np.empty((0, shape.length), dtype=np.uint32)
    lines = [line_numbers(row[-shape.target :], breaks) for row in ids]
    return Rows(
        ids,
        np.stack(lines) if lines else np.empty((0, shape.target), np.int16),
        [records[i] for i in order],
        shape,
        tokenizer_fingerprint(tokenizer),
        dict(sorted(dropped.items())),
    )


def _group(document: Document) -> str:
    return document.group


def _encoder(tokenizer: Tokenizer) -> Callable[[str], np.ndarray]:
    return lambda text: np.array(tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.uint32)


def _file_rows(
    documents: list[Document],
    encode: Callable[[str], np.ndarray],
    shape: Shape,
    cap: int,
    each: int,
    seed: int,
    prose: bool,
    dropped: Counter[str],
) -> Iterator[tuple[str, Document, np.ndarray]]:
    long: list[tuple[Document, np.ndarray]] = []
    for index, document in enumerate(documents):
        if len(long) == 2 * cap:  # enough for what the rules will drop; the rest need not be encoded
            dropped["cap"] += len(documents) - index
            break
        ids = encode(document.text)
        if len(ids) >= shape.length:
            long.append((document, ids))
        else:
            dropped["short"] += 1
    most = -(-cap // max(len(long), 1)) if prose and len(long) < FEW else each
    for number in range(most):  # first one of each document, then the second ones
        for document, ids in long:
            windows = min(most, len(ids) // shape.length)
            if number < windows:
                name = f"{document.id}#{number}" if windows > 1 else document.id
                room = len(ids) // windows
                first = number * room + place(seed, f"{name}@") % (room - shape.length + 1)
                yield name, document, ids[first : first + shape.length]


def prose_records(folder: Path, part: str, seed: int, most: int) -> list[Document]:
    """Records of every domain in a seeded order, at most so many long enough ones of a domain."""
    chosen: list[Document] = []
    for domain in DOMAINS:
        long = [d for d in records_of(folder, domain, part) if len(d.text) >= 3 * Shape().length // 2]
        chosen += sorted(long, key=lambda document: place(seed, document.id))[:most]
    return chosen


def build(name: str, out: Path, data: Path | None, seed: int, tokenizer: Any, chunks: int = REPOSITORY) -> Rows:
    """Builds a set; one for training the gate is compared with the evaluation sets that stand in `out`.

    Raises:
        InputError: if something to read is missing, a package is on both sides, or a set there has other tokens.
    """
    own = tokenizer_fingerprint(tokenizer)
    options: dict[str, Any] = {"cap": CAPS[name], "each": EACH.get(name, 1), "seed": seed}
    options |= {"shape": shape_of(name, chunks), "repository": name.endswith("repo")}
    if name.startswith("gate_"):
        ready = [other for other in EVALUATION if (out / f"{other}.safetensors").is_file()]
        if missing := sorted(set(EVALUATION) - set(ready)):
            print(f"{name}: not compared with {', '.join(missing)}, not built yet", file=sys.stderr)
        options["forbidden"] = row_grams(row for other in ready for row in Rows.load(out, other, own).ids)
    if name in ("prose", "gate_prose"):
        if data is None:
            raise InputError(f"{name} needs --data FOLDER")
        documents = prose_records(data, "heldout" if name == "prose" else "train", seed, 4 * CAPS[name])
        documents += leval_documents(data) if name == "prose" else ()
        return cut(documents, tokenizer, prose=True, **options)
    requirements, split = package_lists(), Split.load(_CHECKPOINT / "split.json")
    source = {"repo": "young", "gate_repo": "gate_code"}.get(name, name)
    if source == "young":
        options["known"] = training_grams(list(load_corpus("installed-python")), workers=1)
    if name not in split.held_out:
        return cut(packages(requirements[source], no_copy), tokenizer, **options)
    if name == "files":
        # The listed ids, not the rule: near copies of trained files were put aside before the rule dealt the rest out.
        listed = set(split.held_out[name]) - TWINS
        return cut(packages(requirements[name], lambda d: d.id in listed), tokenizer, **options)
    seen = set(split.dropped[name])
    documents = packages(requirements[name], lambda d: split.rules.part(d) == name and d.id not in seen)
    return cut(documents, tokenizer, **options)


def corpus(sets: Iterable[Rows], tokenizer: Any) -> TokenArray:
    """Rows of sets as documents that `hf-crouter align` learns a gate from.

    Raises:
        InputError: no rows, a tokenizer without an end of text, or a row that holds it.
    """
    separator = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    pieces, names, groups = [], [], []
    for rows in sets:
        if separator is None or (rows.ids == separator).any():
            raise InputError(f"corpus: expected a separator that no row holds, got {separator}")
        pieces += [np.append(row, np.uint32(separator)) for row in rows.ids]
        names += [record.name for record in rows.records]
        groups += [record.cluster for record in rows.records]
    if not pieces:
        raise InputError("corpus: expected rows of gate sets, got none")
    starts = np.concatenate([[0], np.cumsum([len(piece) for piece in pieces])]).astype(np.int64)
    return TokenArray(np.concatenate(pieces), starts, tuple(names), tuple(groups), separator, len(tokenizer))


def table(sets: dict[str, Rows]) -> str:
    """A Markdown table of the sets."""
    head = ("set", "documents", "packages or domains", "clusters", "whole lines", "mean repetition", "dropped")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, rows in sets.items():
        clusters = {record.cluster for record in rows.records}
        groups = {record.domain for record in rows.records} if "prose" in name else clusters
        mean = np.mean([record.repetition for record in rows.records] or [0.0])
        whole = int((rows.lines.max(1, initial=-1) + 1).sum())
        rules = ", ".join(f"{rule} {count}" for rule, count in rows.dropped.items() if count)
        lines.append(
            f"| {name} | {len(rows.ids)} | {len(groups)} | {len(clusters)} | {whole} | {mean:.3f} | {rules} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Builds the sets and prints a table of them; exit status 2 on bad input."""
    parser = argparse.ArgumentParser(prog="python -m eval.documents", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--host", default="smollm2-135m", help="known name, folder or hub name: whose tokens")
    parser.add_argument("--data", type=Path, help="folder of the prose domains")
    parser.add_argument("--sets", nargs="+", choices=list(CAPS), default=list(CAPS))
    parser.add_argument("--chunks", type=int, default=REPOSITORY, help="older chunks of repo and gate_repo")
    parser.add_argument("--corpus", type=Path, help="folder for train.safetensors of the gate sets: hf-crouter align")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    sets: dict[str, Rows] = {}
    try:
        tokenizer = load_host_tokenizer(resolve_host(args.host))[1]
        for name in args.sets:
            sets[name] = build(name, args.out, args.data, args.seed, tokenizer, args.chunks)
            sets[name].save(args.out, name, args.seed)
        if args.corpus:
            args.corpus.mkdir(parents=True, exist_ok=True)
            some = [rows for name, rows in sets.items() if name.startswith("gate_")]
            corpus(some, tokenizer).save(args.corpus / "train.safetensors")
    except (InputError, FileNotFoundError) as error:
        print(f"eval.documents: error: {error}", file=sys.stderr)
        return 2
    finally:
        print(table(sets))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
