"""`CompressedHistory`: a host's past beyond a raw window, read as soft prompts of compressed chunks."""

from __future__ import annotations

import bisect
import contextlib
import os
from collections.abc import Iterator
from typing import Any, Literal, overload

import torch

from .chunking import SameTokenizerChunker, make_chunker
from .compressor import CRouterModel
from .errors import InputError, MismatchError
from .host.advance import advance, mask_and_positions
from .host.cache import CompressedCache, CompressedDynamicCache, Row
from .host.generation import HistoryProcessor, always_on, is_active, mount, row_pads, unmount
from .host.projector import Projector, find_projector
from .host.reader import FirstTurn, Reader, local_tokenizer
from .host.report import ChunkRecord, HistoryReport, RowRecord, Trace
from .host.unwrap import unwrap

CHUNK_LENGTH = 512  # where no crouter says otherwise
SCORE_COLUMNS = 512  # most logits a row at once


class CompressedHistory(HistoryProcessor):
    """A logits processor: the `generate` calls that it is passed to read their past compressed.

    Scores pass through it unchanged. Without it, and after `detach()`, the host is bit for bit its plain self.

    Args:
        host: decoder, plain or wrapped (PEFT, `torch.compile`, accelerate, pipeline).
        crouter: chunk autoencoder; None only with `soft=False`.
        window: fewest raw tokens kept at the end.
        soft: read compressed chunks as soft prompts; False drops them, so that the window is all there is.
        keep_first: raw tokens kept at the start; "auto": the chat template's system turn, or else 4 (attention sinks).
        projector: a folder or a `Projector`; None finds the one in the crouter's folder.
        tokenizer: of the host; looked for beside the host (never on the network) where it is needed.
        crouter_tokenizer: of the crouter; the same.

    Raises:
        InputError: arguments that do not make a history.
        MismatchError: host, crouter, projector or tokenizers do not belong together.

    Example:
        >>> history = CompressedHistory(host, crouter, window=512)
        >>> out = host.generate(**inputs, max_new_tokens=256, logits_processor=[history])
        >>> print(history.report())
    """

    def __init__(
        self,
        host: Any,
        crouter: CRouterModel | None,
        *,
        window: int = 512,
        soft: bool = True,
        keep_first: int | Literal["auto"] = "auto",
        projector: str | os.PathLike | Projector | None = None,
        tokenizer: Any = None,
        crouter_tokenizer: Any = None,
    ):
        self.host = unwrap(host)
        if window < 1:
            raise InputError(f"window: expected at least 1 token, got {window}")
        if keep_first != "auto" and (not isinstance(keep_first, int) or keep_first < 0):
            raise InputError(f"keep_first: expected a number of tokens or 'auto', got {keep_first!r}")
        if soft and crouter is None:
            raise InputError("crouter: expected one, got None; without a crouter pass soft=False")
        made = None
        if soft and crouter is not None:
            embedding: Any = self.host.get_input_embeddings()
            made = self._projector(crouter, projector).to(embedding.weight.device).eval()
        if tokenizer is None:
            tokenizer = local_tokenizer(self.host.name_or_path)
        keep = FirstTurn(tokenizer) if keep_first == "auto" else lambda ids: keep_first
        self.crouter = crouter
        self.reader = Reader(
            window=window,
            chunker=self._chunker(crouter, made, tokenizer, crouter_tokenizer),
            prefix=keep,
            crouter=crouter,
            projector=made,
        )
        self._trace: Trace | None = None
        self.mounted = True
        mount(self.host)

    def _projector(self, crouter: CRouterModel, projector: str | os.PathLike | Projector | None) -> Projector:
        if projector is None:
            return find_projector(crouter, self.host)
        made = projector if isinstance(projector, Projector) else Projector.load(os.fspath(projector))
        made.check(self.host, crouter)
        return made

    def _chunker(self, crouter: CRouterModel | None, projector: Projector | None, tokenizer: Any, other: Any):
        if crouter is None:
            return SameTokenizerChunker(CHUNK_LENGTH)
        length = crouter.config.chunk_length
        known = (projector.config.host_tokenizer, projector.config.crouter_tokenizer) if projector else ("", "")
        if known[0] == known[1] and (known[0] or tokenizer is None):
            return SameTokenizerChunker(length)  # the projector says that both share their ids, or nothing is known
        other = other or local_tokenizer(crouter.name_or_path)
        if known[0] == known[1] and other is None:
            return SameTokenizerChunker(length)
        if tokenizer is None or other is None:
            raise MismatchError(
                "tokenizer: host and crouter do not share their tokens; expected both tokenizers, "
                f"got none for the {'host' if tokenizer is None else 'crouter'} (tokenizer=, crouter_tokenizer=)"
            )
        return make_chunker(length, tokenizer, other)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """The scores `[B, V]` unchanged.

        Raises:
            InputError: a long history, and the host's `generate` was not reached: compression was silently skipped.
        """
        if self.mounted and not is_active(self.host) and self._is_long(input_ids):
            raise InputError("compression was skipped: expected a generate call of this history's own host")
        return scores

    def _is_long(self, input_ids: torch.Tensor) -> bool:
        return input_ids.shape[1] > self.reader.fewest + 1024  # room for a raw prefix, whose length is not known here

    def detach(self) -> None:
        """Gives the host its own class back; later calls with this processor are plain ones."""
        if self.mounted:
            self.mounted = False
            unmount(self.host)

    def started(self) -> None:
        """Forgets the call before: what is not finished has no report."""
        self._trace = None

    def finished(self, cache: CompressedCache) -> None:
        """Keeps what the report needs of the call that just ended."""
        self._trace = Trace(cache, self.reader.projector is not None)

    def report(self, residuals: bool = True) -> HistoryReport:
        """About the latest `generate` or `score`: chunks with residuals, slots, bytes.

        Args:
            residuals: rebuild the chunks at the first call, to measure them; slots and bytes alone cost nothing.
        """
        if self._trace is None:
            return HistoryReport((), (), 0, 0, 0, 0, self.reader.projector is not None)
        return self._trace.report(self.crouter if residuals else None)

    @overload
    def score(
        self, input_ids: torch.Tensor, last: int = 512, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor: ...

    @overload
    def score(
        self,
        input_ids: torch.Tensor,
        last: int = 512,
        attention_mask: torch.Tensor | None = None,
        *,
        greedy: Literal[True],
    ) -> tuple[torch.Tensor, torch.Tensor]: ...

    @torch.no_grad()
    def score(
        self,
        input_ids: torch.Tensor,
        last: int = 512,
        attention_mask: torch.Tensor | None = None,
        *,
        greedy: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities of the last tokens as `generate` would have seen them, one after the other.

        Args:
            input_ids: `[B, T]`, left-padded.
            last: tokens scored at the end of each row; fewer than the shortest row has.
            attention_mask: `[B, T]`.
            greedy: also tell which tokens greedy decoding would have chosen.

        Returns:
            `[B, last]`, float32, nats; with `greedy` also `[B, last]`, bool: the token had the highest score.

        Raises:
            InputError: `last` is not below the shortest row's length, or a mask with holes.
            CapacityError: more history than the host's positions can hold compressed.
        """
        host, reader = self.host, self.reader
        pads, width = row_pads(attention_mask, input_ids), input_ids.shape[1]
        if not 1 <= last < width - max(pads):
            raise InputError(f"last: expected 1 to {width - max(pads) - 1} (tokens of a row but one), got {last}")
        cache = CompressedDynamicCache(config=host.config.get_text_config(decoder=True))
        cache.rows, cache.layout = tuple(Row(pad) for pad in pads), torch.empty(len(pads), 0, dtype=torch.long)
        cache.ids, pieces, best = input_ids[:, :0], [], []
        first = width - last
        options = {"return_dict": True, "use_cache": True}
        while first < width:
            end = self._segment(cache.rows, input_ids, first)
            main = end - first
            ids = input_ids[:, : end - 1]
            advance(host, reader, cache, ids, first, main)
            mask, positions = mask_and_positions(cache, main, host.device)
            out = host(
                input_ids=ids[:, -main:].to(host.device),
                past_key_values=cache,
                attention_mask=mask,
                position_ids=positions,
                **options,
            )
            targets = input_ids[:, first:end].to(out.logits.device)
            pieces.append(_log_probabilities(out.logits, targets))
            if greedy:
                best.append(out.logits.argmax(-1) == targets)
            first = end
        self.finished(cache)
        scores = torch.cat(pieces, dim=1)
        return (scores, torch.cat(best, dim=1)) if greedy else scores

    def _segment(self, rows: tuple[Row, ...], input_ids: torch.Tensor, first: int) -> int:
        """Column after the longest run of targets from `first` on that see the same compressed chunks."""
        limit = min(first + SCORE_COLUMNS, input_ids.shape[1])
        end = limit
        for i, row in enumerate(rows):
            row = self.reader.extend(row, input_ids[i, row.pad : first])

            def grown(column: int, i: int = i, row: Row = row) -> bool:
                return len(self.reader.extend(row, input_ids[i, row.pad : column]).chunks) > len(row.chunks)

            # a chunk once compressed stays so: the first column at which there is one more is found by halving
            end = first + 1 + bisect.bisect_left(range(first + 1, end), True, key=grown)
        return end


def _log_probabilities(logits: torch.Tensor, targets: torch.Tensor, block: int = 64) -> torch.Tensor:
    """`[B, T, V]` and `[B, T]` to `[B, T]`, float32; a few columns at once, so that no float32 copy of all exists."""
    pieces = []
    for start in range(0, targets.shape[1], block):
        part = logits[:, start : start + block].float()
        chosen = part.gather(2, targets[:, start : start + block, None])[..., 0]
        pieces.append(chosen - part.logsumexp(-1))
    return torch.cat(pieces, dim=1)


@contextlib.contextmanager
def attach(host: Any, crouter: CRouterModel | None, **options: Any) -> Iterator[CompressedHistory]:
    """Every `generate` of the host reads its past compressed while the block runs; arguments of `CompressedHistory`.

    Example:
        >>> with attach(host, crouter, window=512) as history:
        ...     out = host.generate(**inputs, max_new_tokens=256)
    """
    history = CompressedHistory(host, crouter, **options)
    always_on(history.host, history, True)
    try:
        yield history
    finally:
        always_on(history.host, history, False)
        history.detach()


__all__ = ["ChunkRecord", "CompressedHistory", "HistoryReport", "RowRecord", "attach"]
