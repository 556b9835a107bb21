"""The texts of the routing measurement as tokens: `train`, `calibration` and test windows of every domain.

`python -m eval.routing.data --data FOLDER --out FOLDER` writes `DOMAIN/{train,calibration}.safetensors` of each known
domain, `windows` (1024 test tokens each, of known and unknown domains), `mixed` (real documents that change between
code and prose, with their borders) and `manifest.json`, and packs all of them into one `.tar.xz` beside the folder.

Parts share no document, and no group of them where there is one: an author, a disease, a schema, a package. A
calibration document of which training holds more than half of the 13-grams is dropped, and so is a test document of
which training or calibration does. Python comes from the packages that the shipped crouter was trained on
(`train`, `calibration`) and from those and the standard library that its split holds out (test).

Not covered: documents shorter than a window, which are 1024 tokens; the domains' tests need that much.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from eval.documents import MAXIMUM
from eval.routing.mixed import mixed_documents
from eval.routing.windows import DOMAINS, KNOWN, WINDOW, Record, TestWindows
from eval.rows import place
from eval.sources import no_copy, package_lists, packages, records_of
from hf_crouter.crouter.loading import SHIPPED
from hf_crouter.data.corpora import load_corpus
from hf_crouter.data.dedup import deduplicate, ngram_overlap, training_grams
from hf_crouter.data.documents import Document
from hf_crouter.data.installed import STDLIB
from hf_crouter.data.shingles import sorted_unique
from hf_crouter.data.split import Split
from hf_crouter.data.tokens import TokenArray, encode_documents, plain_tokenizer
from hf_crouter.errors import InputError
from hf_crouter.utils.io import replaced_file, write_json

EXCERPT = 48_000  # tokens of one document in training, at most: few long novels would be all of it
TRAIN, CALIBRATION = 4_000_000, 150_000  # tokens of a domain, at most
WINDOWS = {"known": 120, "unknown": 60}  # of a domain, at most
EACH = 12  # windows of one document, at most


def group_of(document: Document, domain: str) -> str:
    """What must not stand on both sides of a border between parts."""
    if domain == "python":
        return document.group
    if domain == "medquad":
        return document.text.split("\n", 1)[0].lower()  # "Topic: NAME"
    if domain == "json_config":
        found = re.match(r"src/(?:schemas/json|test|negative_test)/([^/]+)", document.id.split("/", 1)[-1])
        return re.sub(r"([-_.]v?\d[\d.]*)*(\.json)?$", "", found.group(1)) if found else document.id
    if domain == "csv_tables":
        return document.id.split("/")[1]
    if domain == "novels_en":
        return document.id.rpartition("_")[2]  # the author's name
    return document.id


def text_candidates(data: Path, domain: str) -> dict[str, list[Document]]:
    """Documents of a text domain by part; an unknown domain has a test only."""
    test = list(records_of(data, domain, "heldout"))
    train = list(records_of(data, domain, "train"))
    if domain not in KNOWN:
        return {"train": [], "calibration": [], "test": [*test, *train]}
    groups = sorted({group_of(d, domain) for d in train}, key=lambda name: place(1, f"{domain}/{name}"))
    # A tenth of the groups, and not fewer than ten: some domains have a hundred.
    chosen = set(groups[: max(10, len(groups) // 10)])
    calibration = [d for d in train if group_of(d, domain) in chosen]
    return {"train": [d for d in train if group_of(d, domain) not in chosen], "calibration": calibration, "test": test}


def python_candidates(per_package: int = 40) -> dict[str, list[Document]]:
    """Python files by part, following the split of the shipped crouter; at most so many trained ones of a package."""
    split, lists = Split.load(SHIPPED / "split.json"), package_lists()
    calibration, seen = (
        set(split.held_out["calibration"]),
        set(split.dropped["packages"]) | set(split.dropped["stdlib"]),
    )
    parts: dict[str, list[Document]] = {"train": [], "calibration": [], "test": []}
    taken: Counter[str] = Counter()
    for document in packages(lists["files"], no_copy):
        if document.id in calibration:
            parts["calibration"].append(document)
        elif split.rules.part(document) == "train" and place(0, document.id) % 4 == 0:
            taken[document.group] += 1
            if taken[document.group] <= per_package:
                parts["train"].append(document)
    parts["test"] = [d for d in packages(lists["packages"], no_copy) if split.rules.part(d) == "packages"]
    parts["test"] += [d for d in load_corpus("installed-python") if d.group == STDLIB]
    parts["test"] = [d for d in parts["test"] if d.id not in seen]
    return parts


def within(documents: Iterable[Document], tokens: int, seed: int) -> list[Document]:
    """Documents in a seeded order until they hold about so many tokens, of a long one an excerpt's worth counted."""
    chosen, held = [], 0
    for document in sorted(documents, key=lambda d: place(seed, d.id)):
        if held >= tokens:
            break
        chosen.append(document)
        held += min(len(document.text) // 4, EXCERPT)
    return chosen


def excerpts(documents: Sequence[Document], tokenizer: Tokenizer, separator: int, limit: int, seed: int) -> TokenArray:
    """Tokens of the documents, of a long one only a random excerpt, until `limit` is reached."""
    whole = encode_documents(documents, tokenizer, separator_id=separator, workers=1)
    pieces, names, groups, held = [], [], [], 0
    for name, group, ids in whole.documents():
        if held >= limit:
            break
        first = place(seed, f"{name}@") % (len(ids) - EXCERPT) if len(ids) > EXCERPT else 0
        piece = ids[first : first + min(EXCERPT, limit - held)]
        pieces += [piece, np.array([separator], dtype=whole.ids.dtype)]
        names.append(name)
        groups.append(group)
        held += len(piece)
    starts = np.cumsum([0, *(len(piece) + 1 for piece in pieces[::2])])
    return TokenArray(np.concatenate(pieces), starts, tuple(names), tuple(groups), separator, whole.vocab_size)


def cut_windows(
    documents: Sequence[tuple[Document, float]], tokenizer: Tokenizer, domain: str, cap: int, seed: int
) -> tuple[list[np.ndarray], list[Record]]:
    """At most `cap` windows that do not overlap: first one of every document, then second ones; groups take turns.

    Args:
        documents: with the overlap of each.
        tokenizer: reads text only.
        domain: name of theirs.
        cap: windows, at most.
        seed: of order and offsets.
    """
    turns: Counter[str] = Counter()
    order = []
    for document, overlap in sorted(documents, key=lambda pair: place(seed, pair[0].id)):
        group = document.group if domain == "python" else domain
        turns[group] += 1
        order.append((turns[group], document, overlap))
    order.sort(key=lambda entry: entry[0])  # stable: packages take turns
    encoded: list[tuple[Document, float, np.ndarray]] = []
    for _, document, overlap in order:
        if len(encoded) >= cap:
            break
        if len(document.text) < WINDOW:
            continue
        ids = np.array(tokenizer.encode(document.text[: 40 * EXCERPT], add_special_tokens=False).ids, dtype=np.uint16)
        if len(ids) >= WINDOW:
            encoded.append((document, overlap, ids))
    rows: list[np.ndarray] = []
    records: list[Record] = []
    for number in range(EACH):
        for document, overlap, ids in encoded:
            count = min(EACH, len(ids) // WINDOW, max(1, -(-cap // len(encoded))))
            if number < count and len(rows) < cap:
                room = len(ids) // count
                first = number * room + place(seed, f"{document.id}#{number}") % (room - WINDOW + 1)
                rows.append(ids[first : first + WINDOW])
                records.append(Record(domain, document.id, int(first), round(overlap, 4)))
    return rows, records


def fresh(documents: Sequence[Document], known: np.ndarray) -> list[tuple[Document, float]]:
    """Documents of which the known 13-grams hold at most half, with that share."""
    shares = ngram_overlap(documents, known, workers=1)
    return [(d, float(share)) for d, share in zip(documents, shares, strict=True) if share <= MAXIMUM]


def build(
    data: Path, out: Path, *, train: int, calibration: int, scale: float, seed: int
) -> dict[str, dict[str, int]]:
    """Writes everything but the archive; returns counts by domain.

    Args:
        data: folder of the domains' records.
        out: where to.
        train: tokens of a domain's training part, at most.
        calibration: of its calibration part.
        scale: of the numbers of test windows.
        seed: of all choices.
    """
    tokenizer = plain_tokenizer(Tokenizer.from_file(str(SHIPPED / "tokenizer.json")))
    separator = int(json.loads((SHIPPED / "split.json").read_text())["notes"]["separator_id"])
    counts: dict[str, dict[str, int]] = defaultdict(dict)
    grams: list[np.ndarray] = []
    tests: dict[str, list[Document]] = {}
    for domain in DOMAINS:
        found = python_candidates() if domain == "python" else text_candidates(data, domain)
        tests[domain] = found["test"]
        if domain == "python":
            mixed_documents(found["calibration"], tokenizer, seed=seed, archives=False).save(out, "mixed_fit")
        if domain not in KNOWN:
            continue
        chosen = deduplicate(within(found["train"], 2 * train, seed), workers=1).documents
        chosen = sorted(chosen, key=lambda d: place(seed, d.id))
        array = excerpts(chosen, tokenizer, separator, train, seed)
        used = [d for d in chosen if d.id in set(array.names)]
        own = training_grams(used, workers=1)
        several = deduplicate(within(found["calibration"], 3 * calibration, seed), workers=1).documents
        several = sorted((d for d, _ in fresh(several, own)), key=lambda d: place(seed, d.id))
        limit = max(2 * 512, calibration // 10)  # at least ten documents
        quantiles = excerpts([_cut(d, limit) for d in several], tokenizer, separator, calibration, seed)
        grams += [own, training_grams([d for d in several if d.id in set(quantiles.names)], workers=1)]
        for part, tokens in (("train", array), ("calibration", quantiles)):
            (out / domain).mkdir(parents=True, exist_ok=True)
            tokens.save(out / domain / f"{part}.safetensors")
            counts[domain] |= {f"{part}.documents": len(tokens.names), f"{part}.tokens": len(tokens)}
        print(f"{domain}: {counts[domain]}", file=sys.stderr, flush=True)
    known = sorted_unique(np.concatenate(grams))
    rows: list[np.ndarray] = []
    records: list[Record] = []
    for domain, documents in tests.items():
        kept = fresh(documents := _enough(documents, seed), known)
        cap = round(scale * WINDOWS["known" if domain in KNOWN else "unknown"])
        some, about = cut_windows(kept, tokenizer, domain, cap, seed)
        rows, records = rows + some, records + about
        counts[domain] |= {
            "test.windows": len(some),
            "test.documents": len({record.document for record in about}),
            "test.dropped": len(documents) - len(kept),
        }
        print(f"{domain}: {counts[domain]}", file=sys.stderr, flush=True)
    TestWindows(np.stack(rows), records).save(out)
    mixed = mixed_documents(list(_python_test(tests["python"], known)), tokenizer, seed=seed)
    mixed.save(out)
    counts["mixed"] = dict(Counter(mixed.kinds))
    return dict(counts)


def _cut(document: Document, tokens: int) -> Document:
    return Document(document.id, document.group, document.text[: 5 * tokens])


def _enough(documents: Sequence[Document], seed: int, most: int = 600) -> list[Document]:
    return sorted(documents, key=lambda d: place(seed, d.id))[:most]


def _python_test(documents: Sequence[Document], known: np.ndarray) -> Iterator[Document]:
    for document, _ in fresh(_enough(documents, 2), known):
        yield document


def pack(folder: Path) -> Path:
    """Packs the folder into `FOLDER.tar.xz`, which any Python unpacks; returns its path."""
    path = folder.with_name(f"{folder.name}.tar.xz")
    with replaced_file(path) as temporary, tarfile.open(temporary, "w:xz", preset=9) as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                entry = archive.gettarinfo(file, file.relative_to(folder.parent).as_posix())
                entry.uid = entry.gid = entry.mtime = 0
                entry.uname = entry.gname = ""
                with file.open("rb") as stream:
                    archive.addfile(entry, stream)
    return path


def main(argv: list[str] | None = None) -> int:
    """Builds and packs; exit status 2 on bad input."""
    parser = argparse.ArgumentParser(prog="python -m eval.routing.data", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True, type=Path, help="folder of the domains")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--train", type=int, default=TRAIN, help="tokens of a domain, at most")
    parser.add_argument("--calibration", type=int, default=CALIBRATION, help="tokens of a domain, at most")
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of test windows")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    options = {"train": args.train, "calibration": args.calibration, "scale": args.scale, "seed": args.seed}
    try:
        counts = build(args.data, args.out, **options)
    except (InputError, FileNotFoundError) as error:
        print(f"eval.routing.data: error: {error}", file=sys.stderr)
        return 2
    write_json(args.out / "manifest.json", {"window": WINDOW, "excerpt": EXCERPT, **options, "domains": counts})
    path = pack(args.out)
    print(json.dumps(counts, indent=1))
    print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
