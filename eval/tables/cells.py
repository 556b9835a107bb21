"""Cells and rows of a table in Markdown; what was not measured is a dash."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

Metrics = Mapping[str, float]
MISSING = "not measured yet"


def table(head: list[str], rows: Iterable[list[str]]) -> list[str]:
    """Lines of a table; one row that says so where there are none."""
    rows = list(rows) or [[MISSING, *[""] * (len(head) - 1)]]
    align = ["---", *["---:"] * (len(head) - 1)]
    return ["| " + " | ".join(cells) + " |" for cells in (head, align, *rows)]


def number(value: float | None, digits: int = 0) -> str:
    """A number with so many digits behind the point."""
    return "–" if value is None else f"{value:,.{digits}f}"


def mebibytes(value: float | None) -> str:
    """Bytes as MiB."""
    return "–" if value is None else f"{value / 2**20:,.1f}"


def percent(value: float | None, digits: int) -> str:
    """A share in per cent, with its sign."""
    return "–" if value is None else f"{100 * value:.{digits}f}%".replace("-", "−")


def ratio(value: float | None) -> str:
    """How many times as much."""
    return "–" if value is None else f"{value:.2f}x"


def share(metrics: Metrics, key: str, digits: int = 1, sign: bool = False) -> str:
    """A share in per cent, without the sign of it, and its interval."""
    return with_interval(metrics, key, 100, digits, "+" if sign else "")


def plain(metrics: Metrics, key: str) -> str:
    """A figure as it is, with two digits, and its interval."""
    return with_interval(metrics, key, 1, 2, "")


def with_error(metrics: Metrics, key: str) -> str:
    """A share in per cent, without the sign of it, and its standard error."""
    error = metrics.get(f"{key}.se")
    shown = percent(metrics.get(key), 0).rstrip("%")
    return shown if error is None else f"{shown} ± {100 * error:.0f}"


def with_interval(metrics: Metrics, key: str, factor: float, digits: int, sign: str) -> str:
    """A figure times a factor and the ends of its interval, left out where it has none or no width."""
    if key not in metrics:
        return "–"
    base = key.removesuffix(".mean")
    value, *ends = (metrics.get(name) for name in (key, f"{base}.lo", f"{base}.hi"))
    shown = [f"{factor * end:{sign}.{digits}f}".replace("-", "−") for end in (value, *ends) if end is not None]
    if len(shown) < 3 or value == ends[0] == ends[1]:
        return shown[0]
    return f"{shown[0]} [{shown[1]}, {shown[2]}]"
