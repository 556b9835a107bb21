"""`CompressedHistory`: a host's past beyond a raw window, read as soft prompts of compressed chunks."""

from __future__ import annotations

import bisect
import contextlib
import os
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, Literal, overload

import torch

from .cache.kv_cache import CompressedCache, CompressedDynamicCache
from .cache.policy import ContextPolicy
from .cache.prefill import advance, mask_and_positions
from .cache.prefix import FirstTurn
from .chunking import SameTokenizerChunker, make_chunker, tokenizer_fingerprint
from .compressors.projector import Projector, find_projector
from .compressors.rebuild import Rebuilder
from .crouter import CRouterModel
from .crouter.fingerprint import crouter_fingerprint
from .errors import InputError, MismatchError
from .generation.mixin import HistoryProcessor, active_call, always_on, mount, row_pads, unmount
from .generation.report import ChunkRecord, HistoryReport, RetrievalRecord, RouteRecord, RowRecord, Trace
from .hosts.fingerprint import host_fingerprint
from .hosts.tokenizers import local_tokenizer, special_ids
from .hosts.unwrap import unwrap
from .modes.copy import Copier
from .ngram.gate import Gate, find_gate
from .ngram.row_archive import Archives
from .ngram.scorers import Recall, Scorer, make_scorer
from .routing.adapters import AdapterStack
from .routing.experts import ExpertSet
from .routing.router import Router
from .types import Row

CHUNK_LENGTH = 512  # where no crouter says otherwise
SCORE_COLUMNS = 512  # most logits a row at once
FEWEST = 64  # tokens of a text whose expert can be told


class CompressedHistory(HistoryProcessor):
    """A logits processor: the `generate` calls that it is passed to read their past compressed.

    It mixes what followed the last tokens in the compressed past into the scores (copying). Without it, after
    `detach()` and, where no expert serves, before anything is compressed, the host is bit for bit its plain self.

    Args:
        host: decoder, plain or wrapped (PEFT, `torch.compile`, accelerate, pipeline).
        crouter: chunk autoencoder; None only with `soft=False`.
        window: fewest raw tokens kept at the end.
        soft: read compressed chunks as soft prompts; False leaves them out of what the host attends to.
        copy: copy from the compressed past: its own ids (True), or "rebuilt", what the crouter's decoder makes of the
            latents alone, each token weighted by its confidence.
        copy_strength: factor on the weight of copying, 0 to 1.
        copy_generated: archive the tokens generated in the call as well; a model that copies itself tends to loop.
            In a conversation earlier answers are part of the prompt and archived in any case: `copy_exclude` them.
        copy_exclude: spans `(start, end)` of a row's tokens, counted from its first real one, that may be read but not
            copied.
        gate: weighs copying against the host: a folder or a `Gate`; None finds the host's in the crouter's folder, or
            takes the generic one.
        retrieve: compressed chunks that come back raw, in order, between soft prompts and window.
        every: they are chosen at the prompt's end, whenever a chunk is compressed and at every multiple of so many
            tokens of a row.
        scorer: says which ones matter: a `Scorer` or the folder of a learned one; None: `OverlapScorer`, words and
            phrases shared with the last tokens.
        experts: an expert set or its folder: each chunk, and the raw window by its last tokens, is served by the
            adapter of the expert with the least log residual among those whose own texts look like it, or by the plain
            host where none does. With them even a short prompt is read under its expert's adapter, if it has the 64
            tokens that it takes to tell.
        hysteresis: by how much an expert's log residual must undercut that of the one before it in the row; 0.1 is a
            tenth of a token's residual.
        known: share of an expert's own held-out texts that it is to know, 0 to 1; the lower it is, the more chunks are
            left to the plain host.
        top_k_experts: only so many experts rebuild a chunk, those whose texts lie nearest to its latents; 0: all. Faster
            with many of them; chunks are then known by the expert's own residual alone, and nearly every text of no
            domain passes for known.
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
        copy: bool | Literal["rebuilt"] = True,
        copy_strength: float = 1.0,
        copy_generated: bool = False,
        copy_exclude: Sequence[tuple[int, int]] = (),
        gate: str | os.PathLike | Gate | None = None,
        retrieve: int = 0,
        every: int = 128,
        scorer: Scorer | str | os.PathLike | None = None,
        experts: ExpertSet | str | os.PathLike | None = None,
        hysteresis: float = 0.0,
        known: float = 0.99,
        top_k_experts: int = 0,
        keep_first: int | Literal["auto"] = "auto",
        projector: str | os.PathLike | Projector | None = None,
        tokenizer: Any = None,
        crouter_tokenizer: Any = None,
    ):
        self.host = unwrap(host)
        if window < 1:
            raise InputError(f"window: expected at least 1 token, got {window}")
        if retrieve < 0:
            raise InputError(f"recall: expected a number of chunks, got {retrieve}")
        if every < 1:
            raise InputError(f"refresh: expected at least 1 token, got {every}")
        if keep_first != "auto" and (not isinstance(keep_first, int) or keep_first < 0):
            raise InputError(f"keep_first: expected a number of tokens or 'auto', got {keep_first!r}")
        if soft and crouter is None:
            raise InputError("crouter: expected one, got None; without a crouter pass soft=False")
        if copy not in (True, False, "rebuilt"):
            raise InputError(f"copy: expected True, False or 'rebuilt', got {copy!r}")
        if copy == "rebuilt" and crouter is None:
            raise InputError("crouter: expected one, got None; without a crouter nothing can be rebuilt to copy from")
        if not 0 <= copy_strength <= 1:
            raise InputError(f"copy_strength: expected 0 to 1, got {copy_strength}")
        if experts is not None and crouter is None:
            raise InputError("crouter: expected one, got None; without a crouter no expert can be told from another")
        if not hysteresis >= 0:
            raise InputError(f"hysteresis: expected 0 or more, got {hysteresis}")
        if not 0 <= known <= 1:
            raise InputError(f"known: expected a share, 0 to 1, got {known}")
        if not isinstance(top_k_experts, int) or top_k_experts < 0:
            raise InputError(f"shortlist: expected a number of experts, got {top_k_experts}")
        if any(not 0 <= start <= end for start, end in copy_exclude):
            raise InputError(f"copy_exclude: expected spans (start, end) of tokens, got {list(copy_exclude)}")
        made = None
        if soft and crouter is not None:
            embedding: Any = self.host.get_input_embeddings()
            made = self._projector(crouter, projector).to(embedding.weight.device).eval()
        if tokenizer is None:
            tokenizer = local_tokenizer(self.host.name_or_path)
        keep = FirstTurn(tokenizer) if keep_first == "auto" else lambda ids: keep_first
        self.crouter = crouter
        self.copy, self.copy_strength, self.copy_generated = copy, copy_strength, copy_generated
        self.copy_exclude, self.stop_ids = tuple(copy_exclude), special_ids(tokenizer, self.host)
        self.gate = None
        if copy and copy_strength:
            self.gate = gate if isinstance(gate, Gate) else find_gate(crouter, self.host, gate)
        if experts is not None and crouter is not None:
            experts = experts if isinstance(experts, ExpertSet) else ExpertSet.load(experts)
            names = [tokenizer_fingerprint(t) if t is not None else "" for t in (crouter_tokenizer, tokenizer)]
            experts.check(
                crouter_fingerprint(crouter, decoder=True), host_fingerprint(self.host),
                crouter_tokenizer=names[0], host_tokenizer=names[1],
            )  # fmt: skip
        tokenizers = ("", "")
        if made is not None:
            tokenizers = made.config.host_tokenizer, made.config.crouter_tokenizer
        elif isinstance(experts, ExpertSet) and len(experts):
            config = experts.experts[0].config
            tokenizers = config.host_tokenizer, config.crouter_tokenizer
        chunker = self._chunker(crouter, tokenizers, tokenizer, crouter_tokenizer)
        chooser = Recall(retrieve, make_scorer(scorer))
        self._rebuild = None
        if copy == "rebuilt" and crouter is not None:
            own = crouter_tokenizer or local_tokenizer(crouter.name_or_path)
            self._rebuild = Rebuilder(crouter, None if chunker.same_tokenizer else (own, tokenizer))
        routing: dict[str, Any] = {}
        if isinstance(experts, ExpertSet) and crouter is not None:
            routing = self._routing(crouter, experts, stay=hysteresis, known=known, top_k_experts=top_k_experts)
        self.reader = ContextPolicy(
            window=window,
            chunker=chunker,
            prefix=keep,
            crouter=crouter,
            projector=made,
            retrieve=retrieve,
            every=every,
            chooser=chooser,
            **routing,
        )
        self._trace: Trace | None = None
        self.mounted = True
        mount(self.host, self.reader.adapters is not None)

    def _routing(self, crouter: CRouterModel, experts: ExpertSet, **options: Any) -> dict[str, Any]:
        """What a reader needs of the experts; it leaves the models with the history."""
        router = Router(
            crouter,
            experts,
            fewest=min(FEWEST, crouter.config.chunk_length),
            rows=4 if crouter.device.type == "cpu" else 64,
            **options,
        )
        try:
            adapters = AdapterStack(self.host, {expert.name: expert.host for expert in experts})
        except BaseException:
            router.remove()
            raise
        weakref.finalize(self, _leave, adapters, router)  # a history that is dropped without `detach`
        made = (*(expert.digest for expert in experts), f"{router.stay} {router.known} {router.top_k_experts}")
        return {"router": router, "adapters": adapters, "experts": made}

    def _projector(self, crouter: CRouterModel, projector: str | os.PathLike | Projector | None) -> Projector:
        if projector is None:
            return find_projector(crouter, self.host)
        made = projector if isinstance(projector, Projector) else Projector.load(os.fspath(projector))
        made.check(self.host, crouter)
        return made

    def _chunker(self, crouter: CRouterModel | None, tokenizers: tuple[str, str], tokenizer: Any, other: Any):
        if crouter is None:
            return SameTokenizerChunker(CHUNK_LENGTH)
        length = crouter.config.chunk_length
        if tokenizers[0] == tokenizers[1] and (tokenizers[0] or tokenizer is None):
            return SameTokenizerChunker(length)  # both are said to share their ids, or nothing is known
        other = other or local_tokenizer(crouter.name_or_path)
        if tokenizers[0] == tokenizers[1] and other is None:
            return SameTokenizerChunker(length)
        if tokenizer is None or other is None:
            raise MismatchError(
                "tokenizer: host and crouter do not share their tokens; expected both tokenizers, "
                f"got none for the {'host' if tokenizer is None else 'crouter'} (tokenizer=, crouter_tokenizer=)"
            )
        return make_chunker(length, tokenizer, other)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores `[B, V]` with copying mixed in, as log-probabilities; a token at -inf stays there.

        The same scores where nothing is compressed yet or nothing matches, and in calls of other models.

        Raises:
            InputError: a long history, and the host's `generate` was not reached: compression was silently skipped.
        """
        call = active_call(self.host)
        if self.mounted and call is None and self._is_long(input_ids):
            raise InputError("compression was skipped: expected a generate call of this history's own host")
        if call is None or call.processor is not self or self.gate is None:
            return scores
        if call.cache is None or not call.cache.compressed or len(call.cache.rows) != len(input_ids):
            return scores
        if call.state is None:
            call.state = self._copier(call.prompt or input_ids.shape[1], scores.shape[-1], call.rows)
        return call.state.step(call.cache, input_ids, scores)

    def _copier(
        self, width: int, vocab_size: int, prompts: int, archived: Sequence[int] | None = None
    ) -> Copier | None:
        if self.gate is None:
            return None
        past = Archives(vocab_size, self.stop_ids, self.copy_exclude, self._rebuild)
        limits = None if self.copy_generated else archived or width
        return Copier(past, self.gate, self.copy_strength, width, limits, prompts)

    def _is_long(self, input_ids: torch.Tensor) -> bool:
        return input_ids.shape[1] > self.reader.fewest + 1024  # room for a raw prefix, whose length is not known here

    def detach(self) -> None:
        """Gives the host its own class back; later calls with this processor are plain ones."""
        if self.mounted:
            self.mounted = False
            unmount(self.host, self.reader.adapters is not None)
            _leave(self.reader.adapters, self.reader.router)

    def started(self) -> None:
        """Forgets the call before: what is not finished has no report."""
        self._trace = None

    def finished(
        self,
        cache: CompressedCache,
        sequences: torch.Tensor,
        state: Copier | None,
        steps: tuple[int, int] = (0, 0),
    ) -> None:
        """Keeps what the report needs of the call that just ended; `steps`: of the host, and tokens that they gave."""
        archives = state.archives(cache) if state is not None else []
        copied = state.taken(cache, archives, sequences) if state is not None else []
        self._trace = Trace(cache, self.reader.projector is not None, copied, archives, steps)

    def report(self, reconstruction_nlls: bool = True) -> HistoryReport:
        """About the latest `generate` or `score`: chunks with residuals, slots, bytes.

        Args:
            reconstruction_nlls: rebuild the chunks at the first call, to measure them; slots and bytes alone cost nothing.
        """
        if self._trace is None:
            return HistoryReport((), (), 0, 0, 0, 0, self.reader.projector is not None)
        return self._trace.report(self.crouter if reconstruction_nlls else None)

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

    @torch.no_grad()
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
            archive_scored: the scored tokens are a text that is given, not what a model says: they are archived for copying
                like the prompt once they are compressed. Pass it for the perplexity of whole texts.
            greedy: also tell which tokens greedy decoding would have chosen.

        Returns:
            `[B, last]`, float32, nats; with `greedy` also `[B, last]`, bool: the token had the highest score. Rows
            with fewer tokens than the largest `last` stand at the right; what is left of them means nothing.

        Raises:
            InputError: `last` is not below the shortest row's length, a mask with holes, or experts after `detach()`.
            CapacityError: more history than the host's positions can hold compressed.
        """
        host, reader = self.host, self.reader
        if reader.router is not None and not self.mounted:
            raise InputError("score: expected a history that is attached, got a detached one: its experts are gone")
        pads, width = row_pads(attention_mask, input_ids), input_ids.shape[1]
        lasts = [last] * len(pads) if isinstance(last, int) else [int(n) for n in last]
        if len(lasts) != len(pads):
            raise InputError(f"last: expected one number, or one for each of {len(pads)} rows, got {len(lasts)}")
        if min(lasts) < 1 or max(lasts) >= width - max(pads):
            raise InputError(f"last: expected 1 to {width - max(pads) - 1} (tokens of a row but one), got {last}")
        cache = CompressedDynamicCache(config=host.config.get_text_config(decoder=True))
        first, copier = width - max(lasts), None
        ends = [width - n for n in lasts]  # of the rows' prompts
        cache.start([Row(pad, prompt=end - pad) for pad, end in zip(pads, ends, strict=True)], input_ids)
        pieces, best = [], []
        options = {"return_dict": True, "use_cache": True}
        while first < width:
            end = self._segment(cache.rows, input_ids, first)
            main = end - first
            ids = input_ids[:, : end - 1]
            advance(host, reader, cache, ids, first, main)
            mask, positions = mask_and_positions(cache, main, host.device)
            with reader.serving(cache.experts[:, -main:]):
                out = host(
                    input_ids=ids[:, -main:].to(host.device),
                    past_key_values=cache,
                    attention_mask=mask,
                    position_ids=positions,
                    **options,
                )
            targets = input_ids[:, first:end].to(out.logits.device)
            if copier is None and cache.compressed:
                archived = [width] * len(ends) if archive_scored else ends
                copier = self._copier(width - max(lasts), out.logits.shape[-1], len(pads), archived)
            scored, chosen = _scored(out.logits, targets, copier, cache, input_ids, first, greedy)
            pieces.append(scored)
            best.append(chosen)
            first = end
        self.finished(cache, input_ids, copier)
        scores = torch.cat(pieces, dim=1)
        return (scores, torch.cat(best, dim=1)) if greedy else scores

    def _segment(self, rows: tuple[Row, ...], input_ids: torch.Tensor, first: int) -> int:
        """Column after the longest run of targets from `first` on that see the same chunks compressed and recalled."""
        limit = min(first + SCORE_COLUMNS, input_ids.shape[1])
        end = limit
        for i, row in enumerate(rows):
            row = self.reader.extend(row, input_ids[i, row.pad : first])
            end = min(end, row.pad + self.reader.next_choice(row, first - row.pad))
            if row.pad + row.prompt > first:
                end = min(end, row.pad + row.prompt)  # where a shorter part begins, its row chooses

            def grown(column: int, i: int = i, row: Row = row) -> bool:
                return len(self.reader.extend(row, input_ids[i, row.pad : column]).chunks) > len(row.chunks)

            # a chunk once compressed stays so: the first column at which there is one more is found by halving
            end = first + 1 + bisect.bisect_left(range(first + 1, end), True, key=grown)
        return end


def _leave(adapters: AdapterStack | None, router: Any) -> None:
    """Takes experts off host and crouter."""
    for part in (adapters, router):
        if part is not None:
            part.remove()


def _scored(
    logits: torch.Tensor,
    targets: torch.Tensor,
    copier: Copier | None,
    cache: CompressedCache,
    input_ids: torch.Tensor,
    first: int,
    greedy: bool,
    block: int = 64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of targets, and whether each had the highest.

    Args:
        logits: `[B, T, V]`; a few columns at once become float32.
        targets: `[B, T]`.
        copier: mixes the archives in; None leaves the host's own.
        cache: that the logits come from.
        input_ids: `[B, width]`.
        first: column of `input_ids` in which the first target stands.
        greedy: whether it matters which token had the highest score.
        block: columns at once.

    Returns:
        `[B, T]`, float32, and `[B, T]`, bool, all False if it does not matter.
    """
    scores, hits = [], []
    for start in range(0, targets.shape[1], block):
        part, chosen = logits[:, start : start + block].flatten(0, 1), targets[:, start : start + block]
        mixture = None
        if copier is not None:
            columns = range(first + start, first + start + chosen.shape[1])
            mixture = copier.mix(copier.look(cache, input_ids, columns), part)
        if mixture is None:
            part = part.float()
            found = part.gather(1, chosen.reshape(-1, 1))[:, 0] - part.logsumexp(-1)
        else:
            found = mixture.of(chosen.flatten(), part)
        scores.append(found.view_as(chosen))
        hits.append(torch.zeros_like(chosen, dtype=torch.bool))
        if greedy:
            best = part.argmax(-1) if mixture is None else mixture.greedy()
            hits[-1] = best.view_as(chosen) == chosen
    return torch.cat(scores, dim=1), torch.cat(hits, dim=1)


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


__all__ = [
    "ChunkRecord",
    "CompressedHistory",
    "HistoryReport",
    "RetrievalRecord",
    "RouteRecord",
    "RowRecord",
    "attach",
]
