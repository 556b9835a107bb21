"""Corpora to token arrays: load, drop duplicates, split, encode, write; `python -m hf_crouter.data.prepare`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..utils.progress import Progress
from .corpora import load_corpus
from .dedup import deduplicate
from .documents import Document
from .split import HELD_OUT_PACKAGES, PARTS, SplitRules, make_split
from .tokens import encode_documents


def prepare(
    specs: Sequence[str],
    tokenizer: Any,
    folder: str | Path,
    *,
    separator_id: int | None = None,
    rules: SplitRules | None = None,
    threshold: float = 0.8,
    workers: int | None = None,
    progress: bool = True,
) -> dict[str, Path]:
    """Writes `train.safetensors`, the same for every held-out part, and `split.json`.

    Args:
        specs: corpora, as `load_corpus` names them; where two hold the same id, the first one's document counts.
        tokenizer: a fast tokenizer of transformers.
        folder: where to write; created if missing.
        separator_id: the token between documents; by default `<|endoftext|>`, else the tokenizer's end of text.
        rules: of the split.
        threshold: Jaccard similarity from which the later of two documents is a duplicate.
        workers: processes; by default one for each core.
        progress: whether to show it.

    Returns:
        Paths by part, and the split's as `split`.

    Raises:
        InputError: if a corpus cannot be read, nothing is left to train on, or the folder cannot be written.
    """
    folder = Path(folder)
    separator = _separator(tokenizer) if separator_id is None else separator_id
    with Progress(progress) as shown:
        documents: dict[str, Document] = {}
        repeated = 0
        for spec in specs:
            for document in load_corpus(spec, progress=shown):
                repeated += document.id in documents
                documents.setdefault(document.id, document)
        shown.start("dropping duplicates", len(documents), "files", "bytes")
        unique = deduplicate(documents.values(), threshold=threshold, workers=workers, advance=shown.advance)
        del documents
        shown.finish(f"{unique.exact:,} exact and {unique.near:,} near duplicates")
        shown.start("splitting", None, "files", "bytes")
        split, parts = make_split(unique.documents, rules, workers=workers)
        shown.advance(len(unique.documents), sum(part.characters for part in split.parts.values()))
        shown.finish(f"{sum(part.dropped for part in split.parts.values()):,} dropped for overlap with training")
        if not parts["train"]:
            raise InputError(f"no document is left to train on in {', '.join(specs)}")
        shown.start("encoding", sum(map(len, parts.values())), "files", "bytes")
        paths: dict[str, Path] = {}
        tokens: dict[str, int] = {}
        for name in PARTS:
            array = encode_documents(
                parts[name], tokenizer, separator_id=separator, workers=workers, advance=shown.advance
            )
            paths[name], tokens[name] = folder / f"{name}.safetensors", len(array)
            array.save(paths[name])
        shown.finish(f"{sum(tokens.values()):,} tokens")
    notes = {
        **split.notes,
        "corpora": list(specs),
        "duplicates": {"ids": repeated, "exact": unique.exact, "near": unique.near, "threshold": threshold},
        "tokens": tokens,
        "separator_id": separator,
    }
    paths["split"] = folder / "split.json"
    replace(split, notes=notes).save(paths["split"])
    return paths


def _separator(tokenizer: Any) -> int:
    known = tokenizer.get_vocab()
    for name in ("<|endoftext|>", tokenizer.eos_token):
        if name in known:
            return int(known[name])
    raise InputError("the tokenizer has no end-of-text token: give the id of the separator between documents")


def load_tokenizer(folder: str | Path) -> Any:
    """The fast tokenizer in a local folder that holds `tokenizer.json`.

    Raises:
        InputError: if there is none.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    file = Path(folder) / "tokenizer.json"
    if not file.is_file():
        raise InputError(f"no tokenizer.json in {folder}")
    if (Path(folder) / "tokenizer_config.json").is_file():
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    return PreTrainedTokenizerFast(tokenizer_file=str(file))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `prepare` from the command line and returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m hf_crouter.data.prepare", description=__doc__)
    parser.add_argument("--corpus", action="append", required=True, help="installed-python, wheels:…; may be repeated")
    parser.add_argument("--tokenizer", required=True, help="folder with tokenizer.json")
    parser.add_argument("--output", required=True, help="folder for the token files and split.json")
    parser.add_argument("--held-out", default=",".join(HELD_OUT_PACKAGES), help="packages held out, joined by commas")
    parser.add_argument("--separator-id", type=int, help="token between documents")
    parser.add_argument("--workers", type=int, help="processes; by default one for each core")
    options = parser.parse_args(arguments)
    begin = time.monotonic()
    try:
        held_out = tuple(name.strip() for name in options.held_out.split(",") if name.strip())
        paths = prepare(
            options.corpus,
            load_tokenizer(options.tokenizer),
            options.output,
            separator_id=options.separator_id,
            rules=SplitRules(held_out),
            workers=options.workers,
        )
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, path in paths.items():
        print(f"{name}\t{path}\t{os.path.getsize(path):,} bytes")
    print(f"{time.monotonic() - begin:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
