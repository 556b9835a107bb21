"""Pictures by matplotlib whose bytes depend on nothing but what they show."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hf_crouter.errors import InputError
from hf_crouter.utils.io import replaced_file


@contextmanager
def drawing(salt: str) -> Iterator[None]:
    """Inside, equal figures become equal bytes of SVG.

    Args:
        salt: of the names inside the file.

    Raises:
        InputError: no matplotlib.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise InputError("figures: expected matplotlib, which the extra 'eval' brings") from error
    with matplotlib.rc_context({"svg.hashsalt": salt, "svg.fonttype": "path", "font.family": "DejaVu Sans"}):
        yield


def save(figure: Any, path: Path, **about: str) -> None:
    """Writes a matplotlib figure atomically, as SVG or PNG by suffix.

    Args:
        figure: made inside `drawing`, which still holds.
        path: where to.
        about: metadata of an SVG, such as `Title`.
    """
    kind = path.suffix.removeprefix(".") or "svg"
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced_file(path) as temporary:
        figure.savefig(temporary, format=kind, metadata={**about, "Date": None} if kind == "svg" else None)
