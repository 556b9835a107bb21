"""What evaluation documents are cut from: packages' wheels, records of prose, inputs of L-Eval."""

from __future__ import annotations

import gzip
import io
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from hf_crouter.data.corpora import load_corpus
from hf_crouter.data.documents import Document
from hf_crouter.errors import InputError

JOINED = 26_000  # characters to which short records are joined
DOMAINS = ("novels_en", "meetings_qmsum", "latex_math", "tech_peps", "wiki_en", "de_law", "json_config", "csv_tables",
           "logs", "dialogue_sgd", "speeches_en")  # fmt: skip
LEVAL = ("gov_report_summ", "paper_assistant", "tv_show_summ", "patent_summ", "legal_contract_qa", "review_summ",
         "financial_qa", "news_summ")  # fmt: skip
_COPIES = {"_vendor", "vendor", "_vendored", "vendored", "third_party", "thirdparty", "extern", "externals"}
_HERE = Path(__file__).parent


def packages(requirements: Iterable[str], keep: Callable[[Document], bool]) -> Iterator[Document]:
    """Yields the kept source files of packages' wheels, one package after another.

    Raises:
        InputError: if a package cannot be downloaded.
    """
    for requirement in requirements:
        print(f"reading {requirement}", file=sys.stderr, flush=True)
        yield from filter(keep, load_corpus(f"wheels:{requirement}"))


def no_copy(document: Document) -> bool:
    """True unless the file stands in a folder of other packages' copies."""
    return not _COPIES & set(document.id.lower().split("/")[:-1])


def records_of(folder: Path, domain: str, part: str) -> Iterator[Document]:
    """Yields the records of a domain; short dialogues and log chunks are joined in file order.

    Args:
        folder: holds a folder for every domain.
        domain: its name.
        part: `train` or `heldout`.

    Raises:
        InputError: if there are no such records, or zstandard is missing.
    """
    try:
        import zstandard  # for these sets only
    except ImportError as error:
        raise InputError("prose needs zstandard: pip install zstandard") from error
    paths = sorted((folder / domain).glob(f"{part}*.jsonl.zst"))
    if not paths:
        raise InputError(f"no {part} records of {domain} in {folder}")
    joins = domain in ("logs", "dialogue_sgd")
    held: list[dict[str, Any]] = []
    with paths[0].open("rb") as file:  # the first shard is a fair sample of the others
        for line in io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(file), encoding="utf-8"):
            record = json.loads(line)
            if held and (not joins or record.get("system") != held[0].get("system") or _size(held) >= JOINED):
                yield _joined(domain, held)
                held = []
            held.append(record)
    if held:
        yield _joined(domain, held)


def _size(records: list[dict[str, Any]]) -> int:
    return sum(len(record["text"]) for record in records)


def _joined(domain: str, records: list[dict[str, Any]]) -> Document:
    return Document(f"{domain}/{records[0]['id']}", domain, "\n\n".join(record["text"] for record in records))


def leval_documents(folder: Path) -> Iterator[Document]:
    """Yields the distinct long inputs of the chosen L-Eval tasks; a task is a domain of its own.

    Raises:
        InputError: if a task's file is missing.
    """
    for task in LEVAL:
        path = folder / "eval_leval" / f"{task}.jsonl.gz"
        if not path.is_file():
            raise InputError(f"no such file: {path}")
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for index, line in enumerate(file):
                yield Document(f"leval_{task}/{index}", f"leval_{task}", json.loads(line)["input"])


def package_lists() -> dict[str, list[str]]:
    """Requirements of every code set, from the two lists beside this file.

    Raises:
        InputError: if a package stands in more than one set.
    """
    young = json.loads((_HERE / "young_packages.json").read_text(encoding="utf-8"))
    lists = json.loads((_HERE / "gate_packages.json").read_text(encoding="utf-8"))
    lists["young"] = [f"{entry['package']}=={entry['version']}" for entry in young]
    names = Counter(requirement.partition("==")[0] for requirements in lists.values() for requirement in requirements)
    if twice := [package for package, count in names.items() if count > 1]:
        raise InputError(f"packages of more than one set: {', '.join(twice)}")
    return lists
