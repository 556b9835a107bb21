"""The documents of the HGR measurement: one safetensors file of token windows a set, and what is known of each.

A row is `[4 raw prefix tokens | 8 older chunks of 512 | raw window of 512 | 512 scored tokens]`, a piece of one file.
Fewer chunks use the same row without its oldest ones. `young`, `files`, `packages` and `prose` are for measuring;
`gate_code` and `gate_prose` are for training gates, and share no package and no record with those.

`files` are those that the split of the shipped crouter lists as held out, of packages whose other files it was trained
on. There are 825 of them, about 200 long enough, so the longest give up to three windows that do not overlap.

Not covered: code that a young package copied from an older one which is not installed here.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from eval.sources import DOMAINS, leval_documents, no_copy, package_lists, packages, records_of
from hf_crouter.data.corpora import load_corpus
from hf_crouter.data.dedup import GRAM, deduplicate, ngram_overlap, training_grams
from hf_crouter.data.documents import Document
from hf_crouter.data.shingles import gram_hashes, sorted_unique
from hf_crouter.data.split import Split
from hf_crouter.data.tokens import plain_tokenizer
from hf_crouter.errors import InputError
from hf_crouter.utils.io import replaced_file, write_json

PREFIX, CHUNK, CHUNKS, WINDOW, SCORED = 4, 512, 8, 512, 512
LENGTH = PREFIX + CHUNKS * CHUNK + WINDOW + SCORED
SHORTEST = 3 * LENGTH // 2  # characters: no text of fewer has enough tokens, not even a table of digits
MAXIMUM = 0.5  # share of 13-grams above which a document is dropped, for repetition and for both overlaps
EACH = {"files": 3}  # windows of one file, at most; one where nothing is said
# Held-out files that share most 13-grams with trained ones in the versions listed here, though not at training time.
TWINS = {"numba/cpython/cmathimpl.py", "transformers/models/mobilevit/modeling_mobilevit.py"}
FEW = 30  # a domain of fewer long documents than this gives several windows of each

EVALUATION = ("young", "files", "packages", "prose")
# Documents of one package or domain, at most. Few packages are held out, and a twentieth of the others' files.
CAPS = {"young": 12, "gate_code": 12, "prose": 30, "gate_prose": 42, "files": 48, "packages": 150}
_CHECKPOINT = Path(__file__).parent.parent / "hf_crouter" / "checkpoints" / "crouter-code-mini"


@dataclass(frozen=True)
class Shape:
    """Where what stands in a row `[prefix | chunks | window | target]`, in tokens.

    Attributes:
        prefix: raw tokens at the start.
        chunk: of a chunk.
        chunks: older chunks.
        window: raw tokens before the target.
        target: tokens that are scored.
    """

    prefix: int = PREFIX
    chunk: int = CHUNK
    chunks: int = CHUNKS
    window: int = WINDOW
    target: int = SCORED

    @property
    def old(self) -> int:
        """End of the chunks."""
        return self.prefix + self.chunks * self.chunk

    @property
    def split(self) -> int:
        """End of the window."""
        return self.old + self.window

    @property
    def length(self) -> int:
        """Of a row."""
        return self.split + self.target


@dataclass(frozen=True)
class Record:
    """What is known of one window.

    Attributes:
        name: package and file, or domain and record; `#k` for window k of a long one that gave several.
        cluster: what is drawn together in a bootstrap: the package, or the record of prose.
        domain: of prose; "code" otherwise.
        repetition: share of the scored tokens' 13-grams that already stand before them, 0 to 0.5.
        overlap: share of 13-grams that the set's reference holds, 0 to 0.5; None where it has no reference.
    """

    name: str
    cluster: str
    domain: str
    repetition: float
    overlap: float | None = None


@dataclass(frozen=True)
class Windows:
    """One set.

    Attributes:
        ids: `[D, 5124]`, uint16.
        records: one for each row.
        dropped: documents (or windows) left out, by rule.
    """

    ids: np.ndarray
    records: list[Record]
    dropped: dict[str, int]

    def save(self, folder: Path, name: str, seed: int) -> None:
        """Writes `name.safetensors` and `name.json`, each atomically.

        Raises:
            InputError: if they cannot be written.
        """
        with replaced_file(folder / f"{name}.safetensors") as temporary:
            save_file({"ids": self.ids}, temporary)
        about = {"set": name, "seed": seed, "length": LENGTH, "scored": SCORED, "gram": GRAM, "dropped": self.dropped}
        write_json(folder / f"{name}.json", {**about, "documents": [asdict(record) for record in self.records]})

    @classmethod
    def load(cls, folder: Path, name: str) -> Windows:
        """Reads what `save` wrote.

        Raises:
            InputError: if the two files do not fit each other.
        """
        about = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        records = [Record(**record) for record in about["documents"]]
        ids = load_file(folder / f"{name}.safetensors")["ids"]
        if ids.shape != (len(records), LENGTH):
            raise InputError(f"{name}: {len(records)} records do not fit ids of shape {ids.shape}: build it again")
        return cls(ids, records, about["dropped"])


def repetition(row: np.ndarray) -> float:
    """Share of the 13-grams of the last 512 tokens of a row `[L]` that already stand before them."""
    past, scored = (gram_hashes(part.astype(np.uint64), GRAM) for part in (row[:-SCORED], row[-SCORED:]))
    return float(np.isin(scored, past).mean())


def row_grams(rows: Iterable[np.ndarray]) -> np.ndarray:
    """Sorted unique hashes of the token 13-grams of all rows `[L]`, uint64."""
    grams = [gram_hashes(row.astype(np.uint64), GRAM) for row in rows]
    return sorted_unique(np.concatenate(grams)) if grams else np.empty(0, dtype=np.uint64)


def _share_within(grams: np.ndarray, known: np.ndarray) -> float:
    at = np.searchsorted(known, grams)  # `np.isin` would sort millions again for every row
    return float((known[np.minimum(at, len(known) - 1)] == grams).mean()) if len(known) else 0.0


def place(seed: int, name: str) -> int:
    """64 random bits of a name: order and offsets do not depend on which other documents there are."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode("utf-8", "surrogatepass"), digest_size=8).digest())


def cut(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    *,
    cap: int,
    each: int = 1,
    seed: int = 0,
    prose: bool = False,
    known: np.ndarray | None = None,
    forbidden: np.ndarray | None = None,
) -> Windows:
    """Cuts windows from every document that passes the rules, at most `cap` from one group.

    Args:
        documents: files of packages (group: the package), or records of prose (group: the domain).
        tokenizer: reads text only, as from `plain_tokenizer`; its ids lie below 65,536.
        cap: windows of one group, at most.
        each: windows of one document, at most, which do not overlap; every first one goes before any second one.
        seed: of order and offsets.
        prose: a group of fewer than 30 long documents may give more windows of each, up to the cap.
        known: sorted text 13-grams (`training_grams`); a document of which they hold more than half is dropped.
        forbidden: sorted token 13-grams (`row_grams`); so is a window of which they hold more than half.
    """
    dropped: Counter[str] = Counter()
    long = [document for document in documents if len(document.text) >= SHORTEST or dropped.update(["short"])]
    unique = deduplicate(long, workers=1)
    dropped["duplicate"] += unique.exact + unique.near
    overlaps: dict[tuple[str, str], float] = {}  # two packages may hold files of one name
    if known is not None:
        shares = ngram_overlap(unique.documents, known, workers=1)
        overlaps = {(d.group, d.id): float(share) for d, share in zip(unique.documents, shares, strict=True)}
    rows: list[np.ndarray] = []
    records: list[Record] = []
    for group, members in groupby(sorted(unique.documents, key=lambda d: (d.group, place(seed, d.id))), _group):
        fresh = [d for d in members if overlaps.get((d.group, d.id), 0.0) <= MAXIMUM or dropped.update(["seen"])]
        kept = 0
        for name, document, row in _group_windows(fresh, tokenizer, cap, each, seed, prose, dropped):
            overlap = overlaps.get((group, document.id))
            if forbidden is not None:
                overlap = _share_within(gram_hashes(row.astype(np.uint64), GRAM), forbidden)
            overlap = None if overlap is None else round(overlap, 4)
            share = round(repetition(row), 4)
            rule = "repetition" if share > MAXIMUM else "evaluation" if (overlap or 0.0) > MAXIMUM else ""
            if rule or kept == cap:
                dropped[rule or "cap"] += 1
                continue
            kept += 1
            cluster, domain = (document.id, group) if prose else (group, "code")
            records.append(Record(name if prose else f"{group}/{name}", cluster, domain, share, overlap))
            rows.append(row)
    ids = np.stack(rows) if rows else np.empty((0, LENGTH), dtype=np.uint16)
    return Windows(ids, records, dict(sorted(dropped.items())))


def _group(document: Document) -> str:
    return document.group


def _group_windows(
    documents: list[Document],
    tokenizer: Tokenizer,
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
        ids = np.array(tokenizer.encode(document.text, add_special_tokens=False).ids, dtype=np.uint16)
        if len(ids) >= LENGTH:
            long.append((document, ids))
        else:
            dropped["short"] += 1
    most = -(-cap // max(len(long), 1)) if prose and len(long) < FEW else each
    for number in range(most):  # first one of each document, then the second ones
        for document, ids in long:
            windows = min(most, len(ids) // LENGTH)
            if number < windows:
                name = f"{document.id}#{number}" if windows > 1 else document.id
                room = len(ids) // windows
                first = number * room + place(seed, f"{name}@") % (room - LENGTH + 1)
                yield name, document, ids[first : first + LENGTH]


def prose_records(folder: Path, part: str, seed: int, most: int) -> list[Document]:
    """Records of every domain in a seeded order, at most so many long enough ones of a domain."""
    chosen: list[Document] = []
    for domain in DOMAINS:
        long = [document for document in records_of(folder, domain, part) if len(document.text) >= SHORTEST]
        chosen += sorted(long, key=lambda document: place(seed, document.id))[:most]
    return chosen


def build(name: str, out: Path, data: Path | None, seed: int) -> Windows:
    """Builds a set; one for training the gate is compared with the evaluation sets that stand in `out`.

    Raises:
        InputError: if something to read is missing, or a package is on both sides.
    """
    tokenizer = plain_tokenizer(Tokenizer.from_file(str(_CHECKPOINT / "tokenizer.json")))
    options: dict[str, Any] = {"cap": CAPS[name], "each": EACH.get(name, 1), "seed": seed}
    if name.startswith("gate_"):
        ready = [other for other in EVALUATION if (out / f"{other}.safetensors").is_file()]
        if missing := sorted(set(EVALUATION) - set(ready)):
            print(f"{name}: not compared with {', '.join(missing)}, not built yet", file=sys.stderr)
        rows = [row for other in ready for row in Windows.load(out, other).ids]
        options["forbidden"] = row_grams(rows)
    if name in ("prose", "gate_prose"):
        if data is None:
            raise InputError(f"{name} needs --data FOLDER")
        documents = prose_records(data, "heldout" if name == "prose" else "train", seed, 4 * CAPS[name])
        documents += leval_documents(data) if name == "prose" else ()
        return cut(documents, tokenizer, prose=True, **options)
    requirements, split = package_lists(), Split.load(_CHECKPOINT / "split.json")
    if name == "young":
        options["known"] = training_grams(list(load_corpus("installed-python")), workers=1)
    if name not in split.held_out:
        return cut(packages(requirements[name], no_copy), tokenizer, **options)
    if name == "files":
        # The listed ids, not the rule: near copies of trained files were put aside before the rule dealt the rest out.
        listed = set(split.held_out[name]) - TWINS
        return cut(packages(requirements[name], lambda d: d.id in listed), tokenizer, **options)
    seen = set(split.dropped[name])
    documents = packages(requirements[name], lambda d: split.rules.part(d) == name and d.id not in seen)
    return cut(documents, tokenizer, **options)


def table(sets: dict[str, Windows]) -> str:
    """A Markdown table of the sets."""
    head = ("set", "documents", "packages or domains", "clusters", "mean repetition", "dropped")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, windows in sets.items():
        clusters = {record.cluster for record in windows.records}
        groups = {record.domain for record in windows.records} if "prose" in name else clusters
        mean = np.mean([record.repetition for record in windows.records] or [0.0])
        rules = ", ".join(f"{rule} {count}" for rule, count in windows.dropped.items() if count)
        lines.append(f"| {name} | {len(windows.ids)} | {len(groups)} | {len(clusters)} | {mean:.3f} | {rules} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Builds the sets and prints a table of them; exit status 2 on bad input."""
    parser = argparse.ArgumentParser(prog="python -m eval.documents", description=__doc__)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--data", type=Path, help="folder of the prose domains")
    parser.add_argument("--sets", nargs="+", choices=list(CAPS), default=[*EVALUATION, "gate_code", "gate_prose"])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    sets: dict[str, Windows] = {}
    try:
        for name in args.sets:
            sets[name] = build(name, args.out, args.data, args.seed)
            sets[name].save(args.out, name, args.seed)
    except (InputError, FileNotFoundError) as error:
        print(f"eval.documents: error: {error}", file=sys.stderr)
        return 2
    finally:
        print(table(sets))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
