"""`CompressedHistory`: a host's past beyond a raw window, read by the modes that its user chose."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, overload

import torch
from transformers import PreTrainedModel

from .cache.kv_cache import CompressedCache
from .cache.memory import bytes_of
from .cache.policy import ContextPolicy
from .cache.positions import key_positions
from .cache.prefix import FirstTurn
from .chunking import Chunker, SameTokenizerChunker, make_chunker
from .crouter import CRouterModel
from .errors import InputError, MismatchError
from .generation.call import HistoryProcessor, active_call
from .generation.mixin import always_on, mix_in, mix_out
from .generation.report import HistoryReport, RowRecord
from .generation.trace import Trace
from .hosts.families import check_family
from .hosts.positions import max_positions
from .hosts.tokenizers import local_tokenizer
from .hosts.unwrap import unwrap
from .modes import BoundModes, Compact, bound_modes, resolve_modes
from .modes.budget import Chosen, fitted_choice
from .scoring import score_last
from .types import Mode, Opening, ScoreState, Setting

CHUNK_LENGTH = 512  # where no crouter says otherwise
WINDOW = 512
PREFIX, LONGEST = 64, 32768  # tokens that a budget reckons with where a prompt, or the host, will tell
Modes = str | Sequence[Mode | str]


class CompressedHistory(HistoryProcessor):
    """A logits processor: the `generate` calls that it is passed to read their past compressed.

    Without it, after `detach()` and, where no expert serves, before anything is compressed, the host is bit for bit
    its plain self.

    Args:
        host: decoder, plain or wrapped (PEFT, `torch.compile`, accelerate, pipeline).
        crouter: chunk autoencoder; needed by `SoftPrompts`, `Experts` and `Copy(source="rebuilt")`, and for the
            reconstruction NLL in the report.
        modes: how the past is read: a list of modes such as `[SoftPrompts(), Copy(), Retrieve(2)]`, or of their names.
            "auto": what works at once with what is there: `Compact(32)` and `Retrieve(2)`, and `Copy()` with a crouter
            that has a gate for this host or a twin of it. Hosts whose key-value pairs cannot be compacted are read by
            `Retrieve(2)`, and by `SoftPrompts()` where the crouter has a projector. "fast": `Retrieve(2)`. An empty
            list drops what leaves the window.
        window: fewest raw tokens kept at the end; None: 512, or what fits the budget.
        budget: memory that a call may take beyond the host's weights, in bytes or as "2GiB". The longest window that
            fits is chosen, and with `modes="auto"` the number of pairs that `Compact` keeps, for rows of `longest`
            tokens; a call that takes more is refused before it begins.
        longest: tokens of a row, those to come counted, that the budget is for; None: as many as the host has
            positions.
        keep_first: raw tokens kept at the start; "auto": the chat template's system turn, or else 4 (attention sinks).
        tokenizer: of the host; looked for beside the host (never on the network) where it is needed.
        crouter_tokenizer: of the crouter; the same.

    Raises:
        InputError: arguments that do not make a history; the line names the mode.
        MismatchError: host, crouter, tokenizers or what a mode brings do not belong together.

    Example:
        >>> history = CompressedHistory(host, crouter, modes=[SoftPrompts(), Retrieve(chunks=2)], window=512)
        >>> out = host.generate(**inputs, max_new_tokens=256, logits_processor=[history])
        >>> print(history.report())
    """

    def __init__(
        self,
        host: Any,
        crouter: CRouterModel | None = None,
        *,
        modes: Modes = "auto",
        window: int | None = None,
        budget: int | str | None = None,
        longest: int | None = None,
        keep_first: int | Literal["auto"] = "auto",
        tokenizer: Any = None,
        crouter_tokenizer: Any = None,
    ):
        self.host = unwrap(host)
        check_family(self.host)
        if window is not None and (not isinstance(window, int) or window < 1):
            raise InputError(f"window: expected at least 1 token, got {window}")
        if budget is not None and window is not None:
            raise InputError(f"budget: expected no window beside it, since it chooses one, got {window}")
        if longest is not None and (budget is None or not isinstance(longest, int) or longest < 1):
            raise InputError(f"longest: expected at least 1 token, beside a budget, got {longest}")
        if keep_first != "auto" and (not isinstance(keep_first, int) or keep_first < 0):
            raise InputError(f"keep_first: expected a number of tokens or 'auto', got {keep_first!r}")
        if tokenizer is None:
            tokenizer = local_tokenizer(self.host.name_or_path)
        setting = Setting(self.host, crouter, tokenizer, crouter_tokenizer)
        self.crouter, self.tokenizer = crouter, tokenizer
        self.modes = tuple(resolve_modes(modes, setting))
        bound = bound_modes(self.modes, setting)
        try:
            self.policy = ContextPolicy(
                window=window or WINDOW,
                chunker=_chunker(setting, bound.tokenizers),
                prefix=FirstTurn(tokenizer) if keep_first == "auto" else lambda ids: keep_first,
                compressor=bound.compressor,
                retriever=bound.retriever,
                router=bound.router,
                adapters=bound.adapters,
                adapters_key=bound.adapters_key,
                positions=key_positions(self.host),
            )
            if budget is not None:
                self._fit(bytes_of(budget), longest, keep_first, setting, slots=modes == "auto")
        except BaseException:
            bound.close()
            raise
        self._scores = bound.scores
        self._fitted = bound.fitted
        self.changes_scores = bool(bound.scores)
        self._trace: Trace | None = None
        self._rows: tuple[RowRecord, ...] = ()
        self.attached = True
        hooked = self.policy.adapters is not None
        mix_in(self.host, hooked)
        # what `detach` does, for a history that is dropped without it as well
        self._detach = weakref.finalize(self, _release, self.host, hooked, bound)
        self._detach.atexit = False

    def _fit(self, budget: int, longest: int | None, keep_first: int | str, setting: Setting, *, slots: bool) -> None:
        """Sets the modes and the policy that fit a budget; see there."""

        def policy_of(chosen: Chosen) -> ContextPolicy:
            compact = next((mode for mode in chosen[1] if isinstance(mode, Compact)), None)
            compressor = compact.bind(setting).compressor if compact is not None else self.policy.compressor
            return replace(self.policy, window=chosen[0], compressor=compressor, budget=budget)

        prefix = keep_first if isinstance(keep_first, int) else PREFIX
        tokens = longest or max_positions(self.host) or LONGEST
        modes, self.policy = fitted_choice(self.host, policy_of, self.modes, budget, tokens, prefix, slots=slots)
        self.modes = tuple(modes)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores `[B, V]` as the modes change them, as log-probabilities; a token at -inf stays there.

        The same scores where nothing is compressed yet or no mode has a say, and in calls of other models.

        Raises:
            InputError: a long history, and the host's `generate` was not reached: compression was silently skipped.
        """
        call = active_call(self.host)
        if self.attached and call is None and self._would_compress(input_ids):
            raise InputError("compression was skipped: expected a generate call of this history's own host")
        if call is None or call.processor is not self or call.plain or not self._scores:
            return scores
        if call.cache is None or not call.cache.compressed or len(call.cache.rows) != len(input_ids):
            return scores
        if call.states is None:
            width = call.prompt or input_ids.shape[1]
            same = self.policy.chunker.same_tokenizer
            call.states = self._opened(Opening(scores.shape[-1], width, call.rows, None, same, call.grows))
        raw = call.raw_scores if call.raw_scores is not None else scores
        changed: torch.Tensor = raw
        for state in call.states:
            changed = state.step(call.cache, input_ids, changed)
        if changed is raw:
            return scores
        if raw is scores:  # no other processor came before
            return changed  # pyright: ignore[reportReturnType]
        # what processors before this one did to a token's score they do to the changed one too
        done = torch.where(raw.isfinite(), scores - raw, scores)
        return torch.where(scores == -torch.inf, scores, changed + done)  # pyright: ignore[reportReturnType]

    def _opened(self, opening: Opening) -> list[ScoreState]:
        return [mode(opening) for mode in self._scores]

    def _would_compress(self, input_ids: torch.Tensor) -> bool:
        """Whether something of these rows `[B, T]` would be compressed; what a call that is not its own was meant to.

        Padding is not known here: the first tokens of a row do not count as long as they are the host's pad token.
        """
        if input_ids.shape[1] < self.policy.fewest:
            return False
        pad = self.host.generation_config.pad_token_id if self.host.generation_config is not None else None
        for row in input_ids:
            first = int((row != pad).long().argmax()) if isinstance(pad, int) else 0
            ids = row[first:]
            if len(ids) - self.policy.raw_prefix(ids, len(ids)) >= self.policy.fewest:
                return True
        return False

    def detach(self) -> None:
        """Gives the host its own class back; later calls with this processor are plain ones."""
        self.attached = False
        self._detach()

    def started(self) -> None:
        """Forgets the call before: what is not finished has no report."""
        self._trace, self._rows = None, ()

    def finished(
        self,
        cache: CompressedCache,
        sequences: torch.Tensor,
        states: Sequence[ScoreState],
        steps: tuple[int, int] = (0, 0),
    ) -> None:
        """Keeps what the report needs of the call that just ended; `steps`: of the host, and tokens that they gave."""
        uses = [state.use(cache, sequences) for state in states]
        self._trace = Trace(cache, sequences, self.policy.compressor is not None, uses, steps)

    def left_alone(self, sequences: torch.Tensor) -> None:
        """Keeps what there is to tell of a call in which nothing could be compressed."""
        self._rows = tuple(RowRecord(sequences.shape[1], 0, 0, sequences.shape[1]) for _ in sequences)

    def report(self, measure: bool = True) -> HistoryReport:
        """About the latest `generate` or `score`: chunks and how well they can be rebuilt, slots, bytes.

        Args:
            measure: rebuild the chunks at the first call; slots and bytes alone cost nothing.
        """
        if self._trace is None:
            entries = self.policy.compressor is not None
            return HistoryReport((), self._rows, 0, 0, 0, 0, entries, fitted=self._fitted)
        report = self._trace.report(self.crouter if measure else None, self.tokenizer)
        return replace(report, modes=tuple(mode.name for mode in self.modes), fitted=self._fitted)

    @overload
    def score(
        self,
        input_ids: torch.Tensor,
        last: int | Sequence[int] = 512,
        attention_mask: torch.Tensor | None = None,
        *,
        archive_scored: bool = False,
    ) -> torch.Tensor: ...

    @overload
    def score(
        self,
        input_ids: torch.Tensor,
        last: int | Sequence[int] = 512,
        attention_mask: torch.Tensor | None = None,
        *,
        archive_scored: bool = False,
        greedy: Literal[True],
    ) -> tuple[torch.Tensor, torch.Tensor]: ...

    def score(
        self,
        input_ids: torch.Tensor,
        last: int | Sequence[int] = 512,
        attention_mask: torch.Tensor | None = None,
        *,
        archive_scored: bool = False,
        greedy: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities of the last tokens as `generate` would have seen them, one after the other.

        Args:
            input_ids: `[B, T]`, left-padded.
            last: tokens scored at the end of each row, or of every row its own number; fewer than the row has. What
                comes before them is the row's prompt.
            attention_mask: `[B, T]`.
            archive_scored: the scored tokens are a text that is given, not what a model says: they are archived for
                copying like the prompt once they are compressed. Pass it for the perplexity of whole texts.
            greedy: also tell which tokens greedy decoding would have chosen.

        Returns:
            `[B, last]`, float32, nats; with `greedy` also `[B, last]`, bool: the token had the highest score. Rows
            with fewer tokens than the largest `last` stand at the right; what is left of them means nothing.

        Raises:
            InputError: `last` is not below the shortest row's length, a mask with holes, or experts after `detach()`.
            CapacityError: more history than the host's positions can hold compressed.
        """
        if self.policy.router is not None and not self.attached:
            raise InputError("score: expected a history that is attached, got a detached one: its experts are gone")
        scored = score_last(
            self.host, self.policy, self._opened, input_ids, last, attention_mask,
            archive_scored=archive_scored, greedy=greedy,
        )  # fmt: skip
        self.finished(scored.cache, input_ids, scored.states)
        return (scored.log_probabilities, scored.greedy) if greedy else scored.log_probabilities


def _release(host: PreTrainedModel, hooked: bool, bound: BoundModes) -> None:
    mix_out(host, hooked)
    bound.close()


def _chunker(setting: Setting, tokenizers: tuple[str, str]) -> Chunker:
    """Cuts chunks for a crouter, or of a fixed length without one.

    Args:
        setting: of the history.
        tokenizers: fingerprints of host's and crouter's tokenizer that a mode was made for; empty ones are unknown.

    Raises:
        MismatchError: host and crouter do not share their tokens, and a tokenizer is missing.
    """
    crouter, tokenizer = setting.crouter, setting.tokenizer
    if crouter is None:
        return SameTokenizerChunker(CHUNK_LENGTH)
    length = crouter.config.chunk_length
    if tokenizers[0] == tokenizers[1] and (tokenizers[0] or tokenizer is None):
        return SameTokenizerChunker(length)  # both are said to share their ids, or nothing is known
    other = setting.crouter_tokenizer or local_tokenizer(crouter.name_or_path)
    if tokenizers[0] == tokenizers[1] and other is None:
        return SameTokenizerChunker(length)
    if tokenizer is None or other is None:
        raise MismatchError(
            "tokenizer: host and crouter do not share their tokens; expected both tokenizers, "
            f"got none for the {'host' if tokenizer is None else 'crouter'} (tokenizer=, crouter_tokenizer=)"
        )
    return make_chunker(length, tokenizer, other)


@contextlib.contextmanager
def attach(host: Any, crouter: CRouterModel | None = None, **options: Any) -> Iterator[CompressedHistory]:
    """Every `generate` of the host reads its past compressed while the block runs; arguments of `CompressedHistory`.

    Example:
        >>> with attach(host, window=512) as history:
        ...     out = host.generate(**inputs, max_new_tokens=256)
    """
    history = CompressedHistory(host, crouter, **options)
    always_on(history.host, history, True)
    try:
        yield history
    finally:
        always_on(history.host, history, False)
        history.detach()
