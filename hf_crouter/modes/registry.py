"""Modes by name, and what a list of them comes to for one history."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import InputError
from ..types import Adapters, ChunkRouter, Compressor, Fitted, Mode, Parts, Retriever, ScoreMode, Setting

MODES: dict[str, type] = {}
ONE_OF_A_KIND = ("entries", "chunks", "adapters")  # changes of the scores may follow one another


def register_mode(cls: type) -> type:
    """Makes a mode known by its `name`; usable as a decorator.

    Raises:
        InputError: no mode, or a name that another one has.
    """
    name = getattr(cls, "name", None)
    if not dataclasses.is_dataclass(cls) or not isinstance(name, str) or not hasattr(cls, "bind"):
        raise InputError(f"mode: expected a dataclass with a name and bind(), got {cls.__name__}")
    if MODES.setdefault(name, cls) is not cls:
        raise InputError(f"mode {name!r}: expected a name of its own, got that of {MODES[name].__name__}")
    return cls


@dataclass(frozen=True, eq=False)
class BoundModes:
    """The parts of all modes of one history; see `Parts`."""

    compressor: Compressor | None = None
    scores: tuple[ScoreMode, ...] = ()
    retriever: Retriever | None = None
    router: ChunkRouter | None = None
    adapters: Adapters | None = None
    adapters_key: tuple[str, ...] = ()
    tokenizers: tuple[str, str] = ("", "")
    fitted: tuple[Fitted, ...] = ()
    closes: tuple[Callable[[], None], ...] = field(default=(), repr=False)

    def close(self) -> None:
        """Undoes what binding did to the models."""
        for close in self.closes:
            close()


def resolve_modes(modes: str | Sequence[Mode | str], setting: Setting) -> list[Mode]:
    """The modes that a history reads by.

    Args:
        modes: "auto", what works at once with what is there; "fast", retrieval alone; or modes, each by itself or by
            its name.
        setting: of the history.

    Raises:
        InputError: unknown names, one mode twice, modes that exclude each other, or a crouter missing.
    """
    if isinstance(modes, str) and modes in ("auto", "fast"):
        return _auto(setting) if modes == "auto" else [MODES["retrieve"]()]
    if isinstance(modes, str) or not isinstance(modes, Sequence):
        raise InputError(f"modes: expected 'auto', 'fast' or a list of modes ({', '.join(MODES)}), got {modes!r}")
    found: list[Mode] = []
    for mode in modes:
        if isinstance(mode, str):
            if mode not in MODES:
                raise InputError(f"modes: expected names among {', '.join(MODES)}, got {mode!r}")
            mode = MODES[mode]()
        if isinstance(mode, type) or not isinstance(mode, Mode):
            raise InputError(f"modes: expected a mode such as Retrieve(2), or its name, got {mode!r}")
        found.append(mode)
    for mode in found:
        title = type(mode).__name__
        if [type(other) for other in found].count(type(mode)) > 1:
            raise InputError(f"modes: expected {title} once, got it twice")
        if mode.needs_crouter and setting.crouter is None:
            raise InputError(f"{title}: expected a crouter, got None")
    for what in ONE_OF_A_KIND:
        some = [type(mode).__name__ for mode in found if what in mode.gives]
        if len(some) > 1:
            raise InputError(f"modes: expected one that gives {what}, got {' and '.join(some)}")
    return found


def _auto(setting: Setting) -> list[Mode]:
    """Each registered mode that is ready without being told anything; of a kind the first."""
    found: list[Mode] = []
    for cls in MODES.values():
        mode = cls.ready(setting) if hasattr(cls, "ready") else None
        given = {what for other in found for what in other.gives}
        if mode is not None and not given & set(mode.gives) & set(ONE_OF_A_KIND):
            found.append(mode)
    return found


def bound_modes(modes: Sequence[Mode], setting: Setting) -> BoundModes:
    """What the modes come to; where one cannot be bound, those before it are closed again.

    Raises:
        InputError: something that a mode needs cannot be read.
        MismatchError: something that a mode needs was made for another host or crouter.
    """
    parts: list[Parts] = []
    try:
        for mode in modes:
            parts.append(mode.bind(setting))
    except BaseException:
        for part in parts:
            if part.close is not None:
                part.close()
        raise

    def only(name: str) -> Any:
        return next((getattr(part, name) for part in parts if getattr(part, name) is not None), None)

    first = sorted(parts, key=lambda part: part.compressor is None)  # what makes entries knows its tokenizers best
    return BoundModes(
        compressor=only("compressor"),
        scores=tuple(part.scores for part in parts if part.scores is not None),
        retriever=only("retriever"),
        router=only("router"),
        adapters=only("adapters"),
        adapters_key=tuple(key for part in parts for key in part.adapters_key),
        tokenizers=next((part.tokenizers for part in first if part.tokenizers is not None), ("", "")),
        fitted=tuple(one for part in parts for one in part.fitted),
        closes=tuple(part.close for part in parts if part.close is not None),
    )


def modes_from_options(options: Mapping[str, Any]) -> tuple[str | list[Mode], dict[str, Any]]:
    """Modes from flat options, as a command line gives them, and the options that are none of theirs.

    `retrieve=2` sets a mode's first option, `copy=True` takes its defaults, `retrieve_every=64` sets another one, and
    `modes="fast"` names a choice; "auto" where no mode is named.

    Args:
        options: values as words, numbers or booleans; None, False and 0 leave a mode out.

    Raises:
        InputError: a value of the wrong kind, an unknown setting, one of a mode that is not on, or `modes` beside
            single modes.
    """
    rest = dict(options)
    chosen = rest.pop("modes", None)
    found: list[Mode] = []
    for name, cls in MODES.items():
        settings = [f for f in dataclasses.fields(cls) if f.init]
        value = rest.pop(name, None)
        given = {f.name: rest.pop(f"{name}_{f.name}") for f in settings if rest.get(f"{name}_{f.name}") is not None}
        for f in settings:
            rest.pop(f"{name}_{f.name}", None)
        unknown = next((key for key in rest if key.startswith(f"{name}_") and key not in MODES), None)
        if unknown is not None:
            expected = ", ".join(f"{name}_{f.name}" for f in settings)
            raise InputError(f"{unknown}: expected one of {name}'s settings ({expected}), got another word")
        if _off(value):
            if given:
                raise InputError(f"{name}_{next(iter(given))}: expected {name} as well, got it alone")
            continue
        if not _on(value):
            given[settings[0].name] = value
        kinds = {f.name: f for f in settings}
        found.append(cls(**{key: _converted(kinds[key], word, name) for key, word in given.items()}))
    if found and chosen is not None:
        raise InputError(f"modes: expected {chosen!r} or single modes, got both ({', '.join(m.name for m in found)})")
    return (found if found else _chosen(chosen)), rest


def _chosen(word: Any) -> str | list[Mode]:
    if word is None:
        return "auto"
    return [] if str(word).lower() == "none" else str(word)


def _off(value: Any) -> bool:
    return (
        value is None or value in (False, 0) or (isinstance(value, str) and value.lower() in ("false", "none", "off"))
    )


def _on(value: Any) -> bool:
    return value is True or (isinstance(value, str) and value.lower() in ("true", "on", ""))


def _converted(setting: dataclasses.Field, value: Any, mode: str) -> Any:
    """A word as the number or switch that the mode's option is; by the kind of its default."""
    kind = type(setting.default)
    if not isinstance(value, str) or kind not in (int, float, bool):
        return value
    words = {"true": True, "false": False}
    try:
        return words[value.lower()] if kind is bool else kind(value)
    except (KeyError, ValueError):
        expected = {int: "a whole number", float: "a number", bool: "true or false"}[kind]
        raise InputError(f"{mode}_{setting.name}: expected {expected}, got {value!r}") from None
