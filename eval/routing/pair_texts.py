"""Texts of two experts in the crouter's tokens, and texts to test them on: `python -m eval.routing.pair_texts`.

Code is files of packages that the gates learn from, tested on young packages; prose is English Wikipedia, tested on
articles kept out. Novels and transcripts of meetings belong to neither.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from dataclasses import replace
from itertools import islice
from pathlib import Path

from transformers import AutoTokenizer

from eval.sources import no_copy, package_lists, packages, records_of
from hf_crouter.crouter.loading import shipped_crouter
from hf_crouter.data.documents import Document
from hf_crouter.data.tokens import encode_documents
from hf_crouter.errors import InputError

LENGTHS = range(4_000, 60_000)  # characters of a file of code


def code(requirements: Iterable[str], each: int) -> list[Document]:
    """At most so many files of each package, none very short or long."""
    found: list[Document] = []
    for requirement in requirements:
        found += islice((d for d in packages([requirement], no_copy) if len(d.text) in LENGTHS), each)
    return found


def texts(data: Path) -> dict[str, list[Document]]:
    """Documents by folder: `code` and `prose` to train on, `test_*` to test."""
    lists = package_lists()

    def cut(domain: str, first: int, last: int) -> list[Document]:
        return [replace(d, text=d.text[first:last]) for d in records_of(data, domain, "heldout")]

    wiki = [d for d in islice(records_of(data, "wiki_en", "train"), 6000) if len(d.text) > 4_000][:900]
    kept_out = [d for d in islice(records_of(data, "wiki_en", "heldout"), 600) if len(d.text) > 3_000][:140]
    return {
        "code": code(lists["gate_code"][:36], 30),
        "prose": wiki,
        "test_code": code(lists["young"][:24], 6),
        "test_prose": kept_out,
        "test_novels": cut("novels_en", 20_000, 60_000),
        "test_meetings": cut("meetings_qmsum", 0, 30_000),
    }


def main(argv: list[str] | None = None) -> int:
    """Writes a folder of prepared data for each; exit status 2 on bad input."""
    parser = argparse.ArgumentParser(prog="python -m eval.routing.pair_texts", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the prose domains")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(shipped_crouter()))
        for name, documents in texts(args.data).items():
            array = encode_documents(documents, tokenizer, separator_id=tokenizer.eos_token_id)
            folder = args.out / name
            folder.mkdir(parents=True, exist_ok=True)
            array.save(folder / "train.safetensors")
            if name.startswith("test_"):
                array.save(folder / "files.safetensors")  # the part that `hf-crouter expert test` reads
            print(f"{name}: {len(documents)} documents, {len(array):,} tokens", flush=True)
    except (InputError, FileNotFoundError) as error:
        print(f"eval.routing.pair_texts: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
