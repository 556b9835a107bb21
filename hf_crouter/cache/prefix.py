"""What stays raw at a row's start."""

from __future__ import annotations

from typing import Any

SINKS = 4  # first tokens that attention leans on, arXiv 2309.17453


class FirstTurn:
    """Finds the end of a chat template's system turn, and keeps the first tokens where there is none.

    What stands between turns need not be the template's own: a text written by hand may have other white space, and
    one that was tokenised again a second BOS. A turn begins with the template's marker and role, and ends at the
    special token that closes it, or before the one that opens the next turn.

    Args:
        tokenizer: of the host, with or without a chat template.
    """

    def __init__(self, tokenizer: Any = None):
        self._tokenizer = tokenizer
        self._special: set[int] = set()
        self._blank: dict[int, bool] = {}
        self.opening: list[int] = []  # ids with which a system turn begins; none if it is bare text behind a BOS
        self.closing: list[int] = []  # ids at which it ends; empty where the template has no system turn
        self.closing_stays = True  # they belong to the turn, not to the next one
        if tokenizer is not None and getattr(tokenizer, "chat_template", None):
            self._read_template()

    @property
    def knows_turns(self) -> bool:
        """Whether the template has a system turn that can be told by its tokens."""
        return bool(self.closing)

    def __call__(self, ids: list[int]) -> int:
        """Tokens to keep raw: the whole first turn if it is the system's and ends, else attention sinks.

        Args:
            ids: of a row's prompt, or of a shorter one's first tokens, without padding.
        """
        if not self.closing:
            return SINKS
        start = 0
        while ids[start : start + len(self.opening)] != self.opening or (
            not self.opening and self._skipped(ids, start)
        ):
            if not self._skipped(ids, start):
                return SINKS
            start += 1
        end = self._find(ids, start + len(self.opening))
        if end is None:
            return SINKS
        if self.closing_stays:
            end += len(self.closing)
            while end < len(ids) and self._is_blank(ids[end]):
                end += 1
        return max(end, SINKS)

    def _find(self, ids: list[int], start: int) -> int | None:
        """Where the closing ids stand first."""
        first, length = self.closing[0], len(self.closing)
        while True:
            try:
                start = ids.index(first, start)
            except ValueError:
                return None
            if ids[start : start + length] == self.closing:
                return start
            start += 1

    def _skipped(self, ids: list[int], at: int) -> bool:
        """Whether a token before a turn does not count: a BOS, padding or white space."""
        if at >= len(ids):
            return False
        known = (self._tokenizer.bos_token_id, self._tokenizer.pad_token_id)
        return ids[at] in known or self._is_blank(ids[at])

    def _is_blank(self, token: int) -> bool:
        if token not in self._blank:
            self._blank[token] = token not in self._special and not self._text(token).strip()
        return self._blank[token]

    def _text(self, token: int) -> str:
        return self._tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _read_template(self) -> None:
        """Ids with which a system message begins and ends; nothing where the template has none."""
        tokenizer, system, user = self._tokenizer, "AAAA", "BBBB"
        try:
            text = tokenizer.apply_chat_template(
                [{"role": "system", "content": system}, {"role": "user", "content": user}], tokenize=False
            )
        except Exception:  # a template may refuse a system role with any error
            return
        if text.count(system) != 1 or user not in text.split(system)[1]:
            return
        before, rest = text.split(system)
        between = rest.split(user)[0]
        self._special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        self.opening = self._marker(tokenizer.encode(before, add_special_tokens=False))
        ids = tokenizer.encode(between, add_special_tokens=False)
        specials = [number for number, token in enumerate(ids) if token in self._special]
        if specials:
            first = specials[0]
            # a lone marker right before the user's message opens that turn
            self.closing_stays = len(specials) > 1 or not all(self._is_blank(token) for token in ids[first + 1 :])
            self.closing = [ids[first]]
        elif self.opening:
            self.closing = tokenizer.encode(between.strip(), add_special_tokens=False)

    def _marker(self, ids: list[int]) -> list[int]:
        """The ids before a system message up to the white space behind its role; without a BOS before the marker."""
        while ids and ids[0] == self._tokenizer.bos_token_id and (len(ids) == 1 or ids[1] in self._special):
            ids = ids[1:]
        for number, token in enumerate(ids):
            has_word = any(other not in self._special for other in ids[:number])
            spaced = token not in self._special and any(c.isspace() for c in self._text(token))
            if spaced and (has_word or self._is_blank(token)):
                return ids[:number]
        return ids
