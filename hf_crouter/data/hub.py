"""The corpus `hub`: a data set of a hub, or a local folder laid out like one, streamed."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from ..errors import InputError
from ..utils.progress import Progress
from .documents import Document

try:
    from datasets import load_dataset
except ImportError as error:
    raise InputError('hub data sets need the extra "train": pip install "hf_crouter[train]"') from error


@dataclass(frozen=True)
class HubCorpus:
    """How to read one data set.

    Attributes:
        name: name on the hub, or a local folder.
        config: its configuration, if it has several.
        split: which split to stream.
        field: the column of the text.
        id: the column of a document's name within its group; row numbers where None.
        group: the column of the group; the data set's name where None.
        articles: rows are lines, and a line ` = Title = ` begins a document.
        limit: documents to read; all where None.
    """

    name: str
    config: str | None = None
    split: str = "train"
    field: str = "text"
    id: str | None = None
    group: str | None = None
    articles: bool = False
    limit: int | None = None


KNOWN = {
    "codeparrot/codeparrot-clean": HubCorpus(
        "codeparrot/codeparrot-clean", None, "train", "content", "path", "repo_name"
    ),
    "wikitext": HubCorpus("Salesforce/wikitext", "wikitext-103-raw-v1", articles=True),
    "Salesforce/wikitext": HubCorpus("Salesforce/wikitext", "wikitext-103-raw-v1", articles=True),
}


def parse(argument: str) -> HubCorpus:
    """The data set that `NAME[,config=…,split=…,field=…,id=…,group=…,limit=…]` names, with defaults of known ones.

    Raises:
        InputError: if the name is missing, or an option unknown or not of its kind.
    """
    name, *options = [entry.strip() for entry in argument.split(",")]
    if not name:
        raise InputError("hub needs a data set: hub:NAME[,config=…,split=train,field=content,limit=1000]")
    chosen: dict[str, Any] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if key not in ("config", "split", "field", "id", "group", "limit") or not equals:
            raise InputError(f"hub options are config, split, field, id, group and limit as KEY=VALUE, not {option!r}")
        if key == "limit":
            if not value.isdigit() or int(value) == 0:
                raise InputError(f"limit must be a positive number of documents, not {value!r}")
            chosen[key] = int(value)
        else:
            chosen[key] = value
    return replace(KNOWN.get(name, HubCorpus(name)), **chosen)


def hub(argument: str, progress: Progress | None = None) -> Iterator[Document]:
    """Yields the documents of a data set as they arrive; nothing but the read part is downloaded.

    Args:
        argument: as `parse` reads it.
        progress: shows it.

    Raises:
        InputError: if the data set cannot be reached or has no such split, or a row lacks the field.
    """
    corpus = parse(argument)
    progress = progress or Progress(enabled=False)
    try:
        rows: Iterable[Any] = load_dataset(corpus.name, corpus.config, split=corpus.split, streaming=True)
    except Exception as error:  # datasets raises errors of many kinds: connection, missing files, unknown names
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"cannot open the data set {corpus.name} (split {corpus.split}): {reason[:200]}") from error
    documents = _articles(corpus, rows) if corpus.articles else _rows(corpus, rows)
    return _counted(itertools.islice(documents, corpus.limit), corpus, progress)


def _counted(documents: Iterable[Document], corpus: HubCorpus, progress: Progress) -> Iterator[Document]:
    progress.start(f"streaming {corpus.name}", corpus.limit, "files", "bytes")
    for document in documents:
        progress.advance(1, len(document.text))
        yield document
    progress.finish()


def _field(corpus: HubCorpus, row: Any) -> str:
    if not isinstance(row.get(corpus.field), str):
        columns = ", ".join(sorted(row))
        raise InputError(f"{corpus.name} has no text in the field {corpus.field!r}; its columns are {columns}")
    return row[corpus.field]


def _rows(corpus: HubCorpus, rows: Iterable[Any]) -> Iterator[Document]:
    for number, row in enumerate(rows):
        text = _field(corpus, row)
        group = str(row[corpus.group]) if corpus.group and corpus.group in row else corpus.name
        identity = str(row[corpus.id]) if corpus.id and corpus.id in row else f"{number:09d}"
        if text.strip():
            yield Document(f"{group}/{identity}", group, text)


def _articles(corpus: HubCorpus, rows: Iterable[Any]) -> Iterator[Document]:
    lines: list[str] = []
    number = 0
    for text in itertools.chain((_field(corpus, row) for row in rows), [None]):
        if (text is None or re.fullmatch(r" = [^=].* = \n?", text)) and "".join(lines).strip():
            yield Document(f"{corpus.name}/{corpus.split}/{number:06d}", corpus.name, "".join(lines))
            lines, number = [], number + 1
        if text is not None:
            lines.append(text)
