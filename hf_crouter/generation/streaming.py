"""A streamer that tells, while a text is written, which of its tokens were copied and where they stand."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from ..types import CopiedToken
from .call import active_call

OnPiece = Callable[[str, "CopiedToken | None"], None]


class SourceStreamer(BaseStreamer):
    """Gives the text of each new token as it comes, with the place that it was copied from; of one sequence.

    Args:
        tokenizer: of the host.
        history: that reads in this call.
        on_piece: takes a piece of text and where its token comes from, None where it is the host's own. By default
            pieces are printed; copied ones underlined, where the output is a terminal.
        skip_special_tokens: leave them out of the text.

    Example:
        >>> streamer = SourceStreamer(tokenizer, history)
        >>> host.generate(**inputs, logits_processor=[history], streamer=streamer, max_new_tokens=256)
    """

    def __init__(
        self, tokenizer: Any, history: Any, on_piece: OnPiece | None = None, skip_special_tokens: bool = True
    ):
        self.tokenizer, self.history, self.skip_special_tokens = tokenizer, history, skip_special_tokens
        self.on_piece = on_piece or _print
        self._ids: torch.Tensor | None = None
        self._anchor: list[int] = []  # the token, or tokens of a character, before these
        self._held: list[int] = []  # tokens that end in the middle of a character
        self._source: CopiedToken | None = None
        self._call: Any = None

    def put(self, value: torch.Tensor) -> None:
        """Takes the prompt, `[1, T]` or `[T]`, and then new tokens, `[n]`.

        Raises:
            ValueError: more than one sequence.
        """
        if value.ndim > 1 and len(value) > 1:
            raise ValueError(f"SourceStreamer: expected one sequence, got {len(value)}")
        new = value.reshape(-1).cpu().long()
        call = active_call(self.history.host)
        if call is not self._call:  # the call before broke off
            self._ids, self._held, self._source, self._call = None, [], None, call
        if self._ids is None:
            self._ids, self._anchor = new, new[-1:].tolist()
            return
        first = len(self._ids)
        self._ids = torch.cat([self._ids, new])
        copied = self._copied(first)
        for column, token in enumerate(new.tolist(), first):
            self._say(token, copied.get(column))

    def end(self) -> None:
        """Gives what is left of the text; the next call may begin."""
        if self._held:
            self.on_piece(self._decoded(), self._source)
        self._ids, self._anchor, self._held, self._source, self._call = None, [], [], None, None
        if self.on_piece is _print:
            print(flush=True)

    def _copied(self, first: int) -> dict[int, CopiedToken]:
        """Copied tokens from column `first` on, by column."""
        call = self._call
        if call is None or call.processor is not self.history or call.cache is None or self._ids is None:
            return {}
        found = [
            token for state in call.states or () for token in state.use(call.cache, self._ids[None], first).copied
        ]
        return {call.cache.rows[0].pad + token.position: token for token in found}

    def _say(self, token: int, source: CopiedToken | None) -> None:
        self._source = source if not self._held else self._source  # a character's first token decides
        self._held.append(token)
        text = self._decoded()
        if not text.endswith("\ufffd"):
            if text:
                self.on_piece(text, self._source)
            self._anchor, self._held = self._held if text else self._anchor + self._held, []

    def _decoded(self) -> str:
        """Text of the tokens that are held, as it goes on: some tokenizers drop a blank before a text's first one."""
        options = {"skip_special_tokens": self.skip_special_tokens, "clean_up_tokenization_spaces": False}
        whole, before = (self.tokenizer.decode(ids, **options) for ids in (self._anchor + self._held, self._anchor))
        return whole[len(before) :] if whole.startswith(before) else self.tokenizer.decode(self._held, **options)


def _print(text: str, source: CopiedToken | None) -> None:
    marked = source is not None and sys.stdout.isatty()
    print(f"\x1b[4m{text}\x1b[24m" if marked else text, end="", flush=True)
