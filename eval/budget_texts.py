"""Text that layer budgets are measured on, in a host's tokens: `python -m eval.budget_texts`.

Half code, half prose: windows of gate packages' files, and long documents of four prose domains. None of it is in an
evaluation set. `hf-crouter budgets --data` draws from the two in turn.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

from eval.sources import records_of
from hf_crouter.data.documents import Document
from hf_crouter.data.tokens import TokenArray, encode_documents, join
from hf_crouter.errors import InputError
from hf_crouter.hosts.fetch import resolve_host
from hf_crouter.hosts.loading import load_host_tokenizer

PROSE = ("wiki_en", "novels_en", "tech_peps", "meetings_qmsum")
LEAST, MOST, EACH = 30_000, 200_000, 24  # characters of a document, and documents of a domain


def prose(folder: Path) -> Iterator[Document]:
    """As many long documents of each domain, cut."""
    for domain in PROSE:
        records = (record for record in records_of(folder, domain, "train") if len(record.text) >= LEAST)
        for document in islice(records, EACH):
            yield replace(document, text=document.text[:MOST])


def main(argv: list[str] | None = None) -> int:
    """Writes train.safetensors; exit status 2 on bad input."""
    parser = argparse.ArgumentParser(prog="python -m eval.budget_texts", description=__doc__)
    parser.add_argument("--host", default="qwen2.5-coder-1.5b", help="known name, folder or hub name: whose tokens")
    parser.add_argument("--code", type=Path, required=True, help="folder of eval.documents --corpus, in its tokens")
    parser.add_argument("--data", type=Path, required=True, help="folder of the prose domains")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    try:
        code = TokenArray.load(args.code / "train.safetensors")
        tokenizer = load_host_tokenizer(resolve_host(args.host))[1]
        if len(tokenizer) != code.vocab_size:
            raise InputError(f"--code: expected tokens of {args.host}, got {code.vocab_size} of {len(tokenizer)}")
        words = encode_documents(list(prose(args.data)), tokenizer, separator_id=code.separator_id)
        words = replace(words, vocab_size=code.vocab_size)
        halves = [replace(some, groups=(name,) * len(some.names)) for some, name in ((code, "code"), (words, "prose"))]
        args.out.mkdir(parents=True, exist_ok=True)
        join(halves).save(args.out / "train.safetensors")
        for some, name in zip(halves, ("code", "prose"), strict=True):
            print(f"{name}: {len(some.names)} documents, {len(some):,} tokens")
    except (InputError, FileNotFoundError) as error:
        print(f"eval.budget_texts: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
