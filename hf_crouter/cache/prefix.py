"""What stays raw at a row's start."""

from __future__ import annotations

import re
from collections.abc import Container
from dataclasses import dataclass
from typing import Any

SINKS = 4  # first tokens that attention leans on, arXiv 2309.17453


class FirstTurn:
    """Finds the end of a chat template's system turn, and keeps the first tokens where there is none.

    What stands between turns need not be the template's own: a text written by hand may have other white space, and
    one that was tokenised again a second BOS. A turn begins with the template's marker and role, and ends at the
    special token that closes it, or before the one that opens the next turn; at the template's text where it has no
    special token there.

    Args:
        tokenizer: of the host, with or without a chat template.
    """

    def __init__(self, tokenizer: Any = None):
        self._tokenizer = tokenizer
        self._blank: dict[int, bool] = {}
        self._marks = _read_template(tokenizer) if getattr(tokenizer, "chat_template", None) else None
        # special token or text that ends the turn; None where the template has no system turn
        self.closing: Any = self._marks and self._marks.closing

    @property
    def knows_turns(self) -> bool:
        """Whether the template has a system turn that can be told by its tokens."""
        return self.closing is not None

    def __call__(self, ids: list[int]) -> int:
        """Tokens to keep raw: the whole first turn if it is the system's and ends, else attention sinks.

        Args:
            ids: of a row's prompt, or of a shorter one's first tokens, without padding.
        """
        marks = self._marks
        if marks is None:
            return SINKS
        start = self._behind_blanks(ids, 0, marks.skipped)
        if not marks.openings and start < len(ids) and ids[start] not in marks.special:
            return max(self._end(marks, ids, start) or 0, SINKS)
        end = 0
        for opening in marks.openings:
            inner = self._inner(opening, ids, end or start)
            if inner is None and start > 0 == end:  # a BOS that was skipped may be the turn's own marker
                inner = self._inner(opening, ids, start - 1)
            if inner is not None:
                end = self._end(marks, ids, inner) or end
        return max(end, SINKS)

    def _inner(self, opening: _Opening, ids: list[int], start: int) -> int | None:
        """Where the message of a turn begins that opens at `start`; None if none does."""
        if not opening.pattern.match(self._text(ids[start : start + opening.reach])):
            return None
        ends = range(start + 1, start + opening.reach + 1)
        return next(end for end in ends if opening.pattern.match(self._text(ids[start:end])))

    def _end(self, marks: _Marks, ids: list[int], start: int) -> int | None:
        """Where the turn of a message ends that begins at `start`; None if it does not."""
        if isinstance(marks.closing, re.Pattern):
            end = self._find_text(marks.closing, ids, start, behind=marks.closing_stays)
        else:
            try:
                end = ids.index(marks.closing, start) + marks.closing_stays
            except ValueError:
                return None
        return self._behind_blanks(ids, end) if end is not None and marks.closing_stays else end

    def _find_text(self, wanted: re.Pattern[str], ids: list[int], start: int, *, behind: bool) -> int | None:
        """First place behind or before a text, whose ids depend on what stands around it."""
        size = 256
        while not wanted.search(self._text(ids[start : start + size])):
            if start + size >= len(ids):
                return None
            size *= 4
        low, high = 0, size  # the text is in the first `high` tokens, and not in the first `low`
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if wanted.search(self._text(ids[start : start + middle])) else (middle, high)
        if not behind:
            text = self._text(ids[start : start + high])
            before = wanted.split(text, maxsplit=1)[0].rstrip()
            while high and len(self._text(ids[start : start + high]).rstrip()) > len(before):
                high -= 1
        return start + high

    def _behind_blanks(self, ids: list[int], start: int, skipped: Container[int] = ()) -> int:
        while start < len(ids) and (ids[start] in skipped or self._is_blank(ids[start])):
            start += 1
        return start

    def _is_blank(self, token: int) -> bool:
        if token not in self._blank:
            self._blank[token] = not self._text([token]).strip()
        return self._blank[token]

    def _text(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@dataclass(frozen=True)
class _Opening:
    """A turn's marker and role; `reach` is the most tokens that they take."""

    pattern: re.Pattern[str]
    reach: int


@dataclass(frozen=True)
class _Marks:
    """What a chat template puts around a system message.

    Attributes:
        openings: of its turn, and of the template's own before it; none where the message stands bare.
        closing: special token that ends each of these turns, or the text that does.
        closing_stays: it belongs to the turn, not to the user's.
        skipped: ids that may stand before the first turn.
        special: all special ids.
    """

    openings: tuple[_Opening, ...]
    closing: int | re.Pattern[str]
    closing_stays: bool
    skipped: frozenset[int]
    special: frozenset[int]


def _read_template(tokenizer: Any) -> _Marks | None:
    """What the template puts around a system message; None where it has no turn for it that can be told."""
    special = {token.content: int(id_) for id_, token in tokenizer.added_tokens_decoder.items()}
    special |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    special = {text: id_ for text, id_ in special.items() if text.strip()}  # some add runs of spaces
    rendered = _render(tokenizer, special, "system", "user")
    if rendered is None:
        return None
    before, between = rendered
    closing, stays = _closing(between, (_render(tokenizer, special, "user") or [[]])[0], special)
    token = next((piece for piece in closing if piece in special), None)
    turns = [before]
    while stays and token in turns[-1]:
        own = turns[-1].index(token) + 1
        turns[-1:] = [turns[-1][:own], turns[-1][own:]]
    bos = tokenizer.bos_token
    openings, skipped = [], {bos, tokenizer.pad_token}
    for turn in turns:
        first, end = _role(turn, special, None if bos in between else bos)
        skipped.update(turn[:first])
        if first < end:
            text = "".join(turn[first:end])
            boundary = r"(?!\w)" if turn[end:] and text[-1:].isalnum() else ""
            reach = 2 * len(tokenizer.encode(text, add_special_tokens=False)) + 8
            openings.append(_Opening(re.compile(r"\s*" + _spaced(turn[first:end]) + boundary), reach))
    if token is None and not (openings and _spaced(closing)):
        return None
    own_line = "\n" in re.match(r"\s*", "".join(between))[0]  # pyright: ignore[reportOptionalSubscript]
    return _Marks(
        tuple(openings),
        special[token] if token is not None else re.compile((r"\n\s*" if own_line else "") + _spaced(closing)),
        stays,
        frozenset(special[piece] for piece in skipped if piece in special),
        frozenset(special.values()),
    )


def _render(tokenizer: Any, special: Container[str], *roles: str) -> list[list[str]] | None:
    """What a template puts before each of these messages, in pieces; None where it does not render them in order."""
    contents = ["AAAA", "BBBB"][: len(roles)]
    for whole in (True, False):  # templates of hosts of images want a list of parts
        try:
            text = tokenizer.apply_chat_template(
                [
                    {"role": role, "content": content if whole else [{"type": "text", "text": content}]}
                    for role, content in zip(roles, contents, strict=True)
                ],
                tokenize=False,
            )
        except Exception:  # a template may refuse a role with any error
            continue
        found = re.match("(.*?)".join(["", *contents]), text, re.DOTALL)
        if found:
            return [_pieces(part, special) for part in found.groups()]
    return None


def _pieces(text: str, special: Any) -> list[str]:
    """The text cut into special tokens, white space, and what stands between."""
    marks = sorted((mark for mark in special if mark in text), key=len, reverse=True)
    pattern = "|".join([*map(re.escape, marks), r"\s+"])
    return [piece for piece in re.split(f"({pattern})", text) if piece]


def _spaced(pieces: list[str]) -> str:
    """Pattern of the pieces, whatever white space stands between them."""
    return r"\s*".join(re.escape(piece) for piece in pieces if piece.strip())


def _closing(between: list[str], user: list[str], special: Container[str]) -> tuple[list[str], bool]:
    """Pieces that end a system turn, and whether they belong to it.

    Args:
        between: pieces between a system's and a user's message.
        user: pieces before a user's message that stands first.
        special: texts of the special tokens.
    """
    common = 0
    while common < min(len(between), len(user)) and between[-1 - common] == user[-1 - common]:
        common += 1
    own, following = between[: len(between) - common], between[len(between) - common :]
    if user and _spaced(own):
        return own, True
    if user and not any(piece.strip() and piece not in special for piece in user[: len(user) - common]):
        return following, False
    # the template adds a system turn itself: a lone marker right before the user's message opens that
    marks = [number for number, piece in enumerate(between) if piece in special]
    return between, not marks or len(marks) > 1 or bool(_spaced(between[marks[0] + 1 :]))


def _role(turn: list[str], special: Container[str], bos: str | None) -> tuple[int, int]:
    """From which piece to which a turn's marker and role go; an empty range where its message stands bare."""
    words = [number for number, piece in enumerate(turn) if piece.strip() and piece not in special]
    named = [number for number, piece in enumerate(turn) if "sys" in piece.casefold()]
    role = next(iter(named or words), None)
    if role is None:
        return len(turn), len(turn)
    first = role
    if turn[role] not in special:
        first = max((number for number in range(role) if turn[number] in special), default=0)
        first += turn[first] == bos
    end = role + 1
    while end < len(turn) and turn[end] in special:
        end += 1
    return first, end
