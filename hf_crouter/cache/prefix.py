"""What stays raw at a row's start."""

from __future__ import annotations

from typing import Any

SINKS = 4  # first tokens that attention leans on, arXiv 2309.17453


class FirstTurn:
    """Finds the end of a chat template's system turn, and keeps the first tokens where there is none.

    Args:
        tokenizer: of the host, with or without a chat template.
    """

    def __init__(self, tokenizer: Any = None):
        self.opening, self.closing = self._markers(tokenizer)

    def __call__(self, ids: list[int]) -> int | None:
        """Tokens to keep raw: the whole first turn if it is the system's, else attention sinks; None if unfinished."""
        if not self.opening or ids[: len(self.opening)] != self.opening:
            return SINKS
        for end in range(len(self.opening), len(ids) - len(self.closing) + 1):
            if ids[end] == self.closing[0] and ids[end : end + len(self.closing)] == self.closing:
                return end + len(self.closing)
        return None

    @staticmethod
    def _markers(tokenizer: Any) -> tuple[list[int], list[int]]:
        """Ids before a system message and between it and the next turn; empty where the template has none."""
        if tokenizer is None or not getattr(tokenizer, "chat_template", None):
            return [], []
        system, user = "AAAA", "BBBB"
        try:
            text = tokenizer.apply_chat_template(
                [{"role": "system", "content": system}, {"role": "user", "content": user}], tokenize=False
            )
        except Exception:  # a template may refuse a system role with any error
            return [], []
        if text.count(system) != 1 or user not in text.split(system)[1]:
            return [], []
        before, rest = text.split(system)
        opening = tokenizer.encode(before, add_special_tokens=False)
        between = tokenizer.encode(rest.split(user)[0], add_special_tokens=False)
        special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        marks = [i for i, token in enumerate(between) if token in special]
        # the turn ends before the marker that opens the next one; the opening's last token may merge with the text
        closing = between[: marks[1]] if len(marks) > 1 else between
        return (opening[:-1] or opening, closing) if opening and closing else ([], [])
