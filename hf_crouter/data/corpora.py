"""Corpora by name: `installed-python`, `wheels:…`, `text-files:…`, `hub:…`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ..errors import InputError
from ..utils.progress import Progress
from .documents import Document
from .installed import installed_python
from .text_files import text_files
from .wheels import wheels

__all__ = ["Document", "load_corpus", "register_corpus"]

CorpusReader = Callable[[str, Progress], Iterator[Document]]


def load_corpus(spec: str, *, progress: Progress | None = None) -> Iterator[Document]:
    """Yields the documents of a corpus, in an order that is the same in every run.

    Args:
        spec: `name` or `name:argument`: `installed-python`, `wheels:numpy==2.1.0,flask`, `text-files:PATH,PATH`,
            `hub:NAME,config=…,split=train,field=content`.
        progress: shows files and MB as they are read.

    Raises:
        InputError: if there is no such corpus, or its argument is wrong.
    """
    name, _, argument = spec.partition(":")
    if name not in _READERS:
        raise InputError(f"no corpus is called {name!r}; there are {', '.join(sorted(_READERS))}")
    return _READERS[name](argument.strip(), progress or Progress(enabled=False))


def register_corpus(name: str, reader: CorpusReader) -> None:
    """Makes `reader(argument, progress) -> documents` a corpus called `name`."""
    _READERS[name] = reader


def _hub(argument: str, progress: Progress) -> Iterator[Document]:
    from .hub import hub  # only when asked for: `datasets` belongs to an extra

    return hub(argument, progress)


_READERS: dict[str, CorpusReader] = {}
register_corpus("installed-python", installed_python)
register_corpus("wheels", wheels)
register_corpus("text-files", text_files)
register_corpus("hub", _hub)
