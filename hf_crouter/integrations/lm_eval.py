"""lm-evaluation-harness on a host that reads its past compressed: the model type `crouter`.

Needs the extra `lm-eval`; nothing else in the package imports this module but its command.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

from ..cache.capacity import capacity
from ..cache.prefix import FirstTurn
from ..crouter.loading import SHIPPED, load_crouter
from ..errors import InputError
from ..history import CompressedHistory
from ..hosts.fetch import resolve_host
from ..hosts.loading import FETCH_AGAIN
from ..modes import modes_from_options
from ..types import Row
from ..utils.loading import one_line
from ..utils.progress import progress

NO_LIMIT = 1 << 30  # tokens; what is dropped takes no slots
SYSTEM_TURN = 512  # tokens set aside for a system turn, which stays raw and is not known before its prompt is

logger = logging.getLogger("lm_eval.crouter")  # below the harness's own logger, which has the handlers
_HFLM: Any = HFLM  # the harness is optional: type checks do not look into it


@dataclass(frozen=True)
class _Row:
    """One request.

    Attributes:
        index: its place among the requests.
        ids: context and continuation, cut at the left to what fits.
        last: tokens of the continuation.
        archive_scored: a window of a rolling text, not what a model might say: it is archived as it is read.
    """

    index: int
    ids: list[int]
    last: int
    archive_scored: bool = False


@register_model("crouter")
class CompressedHFLM(_HFLM):
    """The harness's Hugging Face model with a `CompressedHistory`: its past beyond a raw window is compressed.

    Requests too short for anything to be compressed go the way of `hf`: they score and generate the same, to the bit.
    With experts that is so only where no expert is found.

    Args:
        pretrained: name that `hf-crouter host list` shows, folder or hub name of the host; or a loaded one.
        crouter: folder or hub name, or "none".
        batch_size: requests at once.
        device: where to put host and crouter; where it does not exist the harness picks one.
        options: modes by name (`retrieve=2, copy=True, retrieve_every=64`, or `modes="fast"`; "auto" where none is
            named) and keywords of `CompressedHistory` (`window`, `keep_first`); all others are those of `HFLM`.

    Raises:
        InputError: host or crouter cannot be read, a host that is no decoder, or `batch_size="auto"`.
        MismatchError: host, crouter, projector or tokenizers do not belong together.

    Example:
        >>> lm = CompressedHFLM("smollm2-135m", window=512)
        >>> lm_eval.simple_evaluate(lm, tasks=["niah_single_1"], metadata={"pretrained": lm.pretrained})
    """

    def __init__(
        self,
        pretrained: Any,
        crouter: str | None = SHIPPED.name,
        batch_size: int | str = 1,
        device: str = "cuda:0",
        **options: Any,
    ):
        if str(batch_size).startswith("auto"):
            raise InputError("batch_size: expected a number, got auto; memory depends on what is compressed")
        modes, options = modes_from_options(options)
        known = set(inspect.signature(CompressedHistory).parameters) - set(inspect.signature(HFLM).parameters)
        own = {name: options.pop(name) for name in known & set(options)}
        if isinstance(pretrained, str):
            pretrained = resolve_host(pretrained)
        super().__init__(pretrained, batch_size=batch_size, device=device, **options)
        if self.backend != "causal":
            raise InputError(f"{pretrained}: expected a decoder, got a model of type {self.config.model_type!r}")
        if crouter is None or crouter == "none":
            model, tokenizer = None, None
        else:
            model, tokenizer = load_crouter(crouter, device=self.device)
        own = {"crouter_tokenizer": tokenizer, **own}
        self.history = CompressedHistory(self.model, model, modes=modes, tokenizer=self.tokenizer, **own)

    def _get_config(self, pretrained: str, **options: Any) -> None:
        with one_line(pretrained, "a host", FETCH_AGAIN):
            super()._get_config(pretrained, **options)

    def _create_model(self, pretrained: str, **options: Any) -> None:
        with one_line(pretrained, "a host", FETCH_AGAIN):
            super()._create_model(pretrained, **options)

    @property
    def max_length(self) -> int:
        """Most tokens of context and continuation that the host reads, most of them compressed."""
        if self._max_length:
            return self._max_length
        policy = self.history.policy
        prefix = policy.prefix([])
        if isinstance(policy.prefix, FirstTurn) and policy.prefix.knows_turns:
            prefix = SYSTEM_TURN
        return capacity(self.history.host, policy, prefix) or NO_LIMIT

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **options: Any) -> torch.Tensor:
        return super()._model_generate(context, max_length, stop, logits_processor=[self.history], **options)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Sum of the continuation's log-probabilities, nats, and whether greedy decoding would have chosen it.

        Args:
            requests: what to call it in the harness's cache (or None), ids of the context, ids of the continuation.
            disable_tqdm: show no progress.
            override_bs: the harness's own, of no use without automatic batch sizes.
        """
        rows = [
            self._row(i, context, continuation, archive_scored=name is None)  # only rolling windows have no name
            for i, (name, context, continuation) in enumerate(requests)
        ]
        compressed = [row for row in rows if self._is_compressed(row)]
        answers: dict[int, tuple[float, bool]] = {}
        held = {row.index for row in compressed}
        plain = [i for i in range(len(requests)) if i not in held]
        if plain:
            short = [requests[i] for i in plain]
            answers.update(zip(plain, super()._loglikelihood_tokens(short, disable_tqdm, override_bs), strict=True))
        shows = bool(compressed) and not disable_tqdm and self.rank == 0
        with progress("requests with a compressed history", "requests", enabled=shows) as update:
            for batch in _batches(compressed, self.batch_size):
                for row, answer in zip(batch, self._score(batch), strict=True):
                    answers[row.index] = answer
                    name = requests[row.index][0]
                    if name is not None:  # a rolling window; the harness remembers the sum over all of them
                        self.cache_hook.add_partial("loglikelihood", name, answer)
                update(len(answers) - len(plain), len(compressed))
        return [answers[i] for i in range(len(requests))]

    def _row(self, index: int, context: list[int], continuation: list[int], archive_scored: bool) -> _Row:
        ids = context + continuation
        most = self.max_length + 1  # the last token is scored, not read
        if len(continuation) >= most:
            raise InputError(f"continuation: expected at most {most - 1} tokens, got {len(continuation)}")
        if len(ids) > most:
            logger.warning("a request of %d tokens is cut at the left to the %d that fit", len(ids), most)
        return _Row(index, ids[-most:], len(continuation), archive_scored)

    def _is_compressed(self, row: _Row) -> bool:
        policy = self.history.policy  # with experts even a short request is read under one's adapter
        return policy.router is not None or bool(policy.extend(Row(0), torch.tensor(row.ids[:-1])).chunks)

    def _score(self, batch: list[_Row]) -> list[tuple[float, bool]]:
        width = max(len(row.ids) for row in batch)
        ids, mask = torch.zeros(len(batch), width, dtype=torch.long), torch.zeros(len(batch), width, dtype=torch.long)
        for i, row in enumerate(batch):
            ids[i, width - len(row.ids) :] = torch.tensor(row.ids)
            mask[i, width - len(row.ids) :] = 1
        with torch.autocast(
            device_type=self.device.type,
            dtype=self.mixed_precision_dtype,
            enabled=self.mixed_precision_dtype is not None,
        ):
            lasts, archive_scored = [row.last for row in batch], batch[0].archive_scored
            scores, best = self.history.score(ids, lasts, mask, archive_scored=archive_scored, greedy=True)
        return [(float(scores[i, -row.last :].sum()), bool(best[i, -row.last :].all())) for i, row in enumerate(batch)]


def _batches(rows: list[_Row], size: int) -> Iterator[list[_Row]]:
    """Rows of about one length together; every row of a batch is longer than the longest of its continuations."""
    batch: list[_Row] = []
    for row in sorted(rows, key=lambda row: -len(row.ids)):
        full = len(batch) == size or max(other.last for other in [*batch, row]) >= len(row.ids)
        if batch and (full or batch[0].archive_scored != row.archive_scored):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
