"""Which host a part was fitted to, and whether it serves another: this very copy, a twin of it, or neither.

A twin has other weights of the same architecture and the same tokenizer: the hub's weights beside the same ones at
four bits, or a fine-tune. A gate, a projector and an adapter belong to what twins share, not to bytes of weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from .chunking import tokenizer_fingerprint
from .errors import InputError, MismatchError
from .hosts.fingerprint import ARCHITECTURE, architecture_fields, host_architecture, host_fingerprint
from .hosts.tokenizers import local_tokenizer
from .hosts.unwrap import display_name, unwrap
from .types import Fit, Fitted, Setting

SERVES = ("exact", "twin", "either")


class HostIdentity(Protocol):
    """What is known of a host: of one in use, or of the one that a part's description names.

    Attributes:
        host_name: for people.
        host_fingerprint: of its weights; empty where they cannot be read, or for a part that was fitted to no host.
        host_architecture: see `hosts.fingerprint.host_architecture`; empty in files of 0.2 and before.
        host_tokenizer: fingerprint; empty where none was known.
    """

    @property
    def host_name(self) -> str:
        """See above."""
        ...

    @property
    def host_fingerprint(self) -> str:
        """See above."""
        ...

    @property
    def host_architecture(self) -> str:
        """See above."""
        ...

    @property
    def host_tokenizer(self) -> str:
        """See above."""
        ...


class HostInUse:
    """The identity of a host in memory or offloaded; each part of it is found out when it is asked for.

    Args:
        host: wrapped or plain.
        tokenizer: its own; looked for beside the host (never on the network) where it is needed.

    Raises:
        InputError: no decoder.
    """

    def __init__(self, host: Any, tokenizer: Any = None):
        self.host = unwrap(host)
        self._tokenizer = tokenizer
        self._found: dict[str, str] = {}

    @classmethod
    def of(cls, setting: Setting) -> HostInUse:
        """That of a history's host; one for all of its modes."""
        return _IN_USE.setdefault(setting, cls(setting.host, setting.tokenizer))

    @property
    def host_name(self) -> str:
        """For people."""
        return display_name(self.host)

    @property
    def host_fingerprint(self) -> str:
        """Of its weights; empty where there are none to read."""
        return self._once("fingerprint", self._read_weights)

    @property
    def host_architecture(self) -> str:
        """See `hosts.fingerprint.host_architecture`."""
        return self._once("architecture", lambda: host_architecture(self.host))

    @property
    def host_tokenizer(self) -> str:
        """Fingerprint; empty where there is no tokenizer beside the host either."""
        return self._once("tokenizer", self._read_tokenizer)

    def _once(self, name: str, find: Callable[[], str]) -> str:
        if name not in self._found:
            self._found[name] = find()
        return self._found[name]

    def _read_weights(self) -> str:
        with contextlib.suppress(InputError):
            return host_fingerprint(self.host)
        return ""

    def _read_tokenizer(self) -> str:
        tokenizer = self._tokenizer if self._tokenizer is not None else local_tokenizer(self.host.name_or_path)
        return tokenizer_fingerprint(tokenizer) if tokenizer is not None else ""


_IN_USE: WeakKeyDictionary[Setting, HostInUse] = WeakKeyDictionary()


def in_use(host: Any, tokenizer: Any = None) -> HostInUse:
    """A host's identity; what is one already is given back."""
    return host if isinstance(host, HostInUse) else HostInUse(host, tokenizer)


def fit_of(made: HostIdentity, host: HostIdentity, fields: Sequence[str] = ARCHITECTURE) -> Fit:
    """How a part that was made for one host fits another.

    Args:
        made: the host that the part was fitted to.
        host: the one that it is to serve.
        fields: of the architecture, those that the part depends on.
    """
    if not made.host_fingerprint:
        return "general"
    if made.host_fingerprint == host.host_fingerprint:
        return "exact"
    if difference(made, host, fields):
        return "other"
    return "twin" if host.host_fingerprint else "either"


def difference(made: HostIdentity, host: HostIdentity, fields: Sequence[str] = ARCHITECTURE) -> str:
    """Why a host is no twin of the one that a part was fitted to, in a few words; empty where it is.

    What is not known is not the same: a part of unknown origin would be read without a word about what it is.
    """
    for what, known in (("architecture", made.host_architecture), ("tokenizer", made.host_tokenizer)):
        if not known:
            return f"its file names no {what}, so it serves that very copy alone"
    mine, theirs = architecture_fields(made.host_architecture), architecture_fields(host.host_architecture)
    for name in fields:
        if mine.get(name) != theirs.get(name):
            return f"expected {name} {mine.get(name, 'none')}, got {theirs.get(name, 'none')}"
    if not host.host_tokenizer:
        return "this host's tokenizer is not known, pass tokenizer="
    if made.host_tokenizer != host.host_tokenizer:
        return f"expected tokenizer {made.host_tokenizer}, got {host.host_tokenizer}"
    return ""


def best_fit(made: Sequence[HostIdentity], host: HostIdentity, fields: Sequence[str] = ARCHITECTURE) -> int | None:
    """Which of several parts serves a host: the first that was fitted to this very copy, or else to a twin of it."""
    prints = [one.host_fingerprint for one in made]
    if any(prints) and host.host_fingerprint in filter(None, prints):  # then no tokenizer is read
        return prints.index(host.host_fingerprint)
    return next((number for number, one in enumerate(made) if fit_of(one, host, fields) in SERVES), None)


def fitted(part: str, made: HostIdentity, host: HostIdentity, fields: Sequence[str] = ARCHITECTURE) -> Fitted:
    """What to report of a part: its fit, and what it shares with the host that it serves."""
    fit = fit_of(made, host, fields)
    shared = ""
    if fit in ("twin", "either"):
        shared = "embeddings' shape and tokenizer" if difference(made, host) else "architecture and tokenizer"
    return Fitted(part, fit, made.host_name, shared)


def check_fit(
    part: str, made: HostIdentity, host: HostIdentity, fields: Sequence[str] = ARCHITECTURE, advice: str = ""
) -> Fitted:
    """What to report of a part, if it serves a host.

    Args:
        part: for the message and the report.
        made: the host that it was fitted to.
        host: the one that it is to serve.
        fields: of the architecture, those that it depends on.
        advice: a command that makes one for this host.

    Raises:
        MismatchError: another host, neither that copy nor a twin; says what differs.
    """
    found = fitted(part, made, host, fields)
    if found.fit == "other":
        got = host.host_fingerprint or "one whose weights cannot be read"
        raise MismatchError(
            f"{part}: expected the host with fingerprint {made.host_fingerprint} or a twin of it, got {got} "
            f"({difference(made, host, fields)}){advice and f'; make one with: {advice}'}"
        )
    return found
