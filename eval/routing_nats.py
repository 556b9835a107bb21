"""What rebuilding costs each expert on all texts of the routing measurement: the step that wants an accelerator.

Everything that is decided from it is computed by `eval.routing_decide`, on any machine and as often as a rule changes.
Axes: `W` test windows of two chunks, `N` pieces, `n` experts, `T` tokens; the last of `n + 1` is the crouter alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from eval.routing_data import TestWindows
from eval.routing_mixed import Mixed, Spliced, changing, splice
from hf_crouter.data.tokens import TokenArray
from hf_crouter.routing.adapters import AdapterStack
from hf_crouter.routing.experts import ExpertSet
from hf_crouter.routing.profile import Evidence, summary
from hf_crouter.routing.router import token_reconstruction_nll
from hf_crouter.training.experts import cut, cut_by_length

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Setting:
    """What all parts share.

    Attributes:
        windows: test windows `[W, 2 * chunk]`, known and unknown domains.
        mixed: real mixed documents.
        train: training tokens of each known domain.
        calibration: calibration tokens of each.
        domains: the known ones, in the experts' order.
        chunk: tokens of a chunk.
        pieces: spliced and changing documents, each.
        limit: calibration and training pieces of a domain, at most.
        rows: chunks at once.
        seed: of everything drawn.
        mixed_fit: real mixed documents of the calibration part, to choose how borders are found in such.
    """

    windows: TestWindows
    mixed: Mixed
    train: list[TokenArray]
    calibration: list[TokenArray]
    domains: tuple[str, ...]
    chunk: int
    pieces: int = 400
    limit: int = 300
    rows: int = 4
    seed: int = 0
    mixed_fit: Mixed | None = None

    @property
    def span(self) -> int:
        """Tokens of a span."""
        return self.chunk // 4

    @property
    def chunks(self) -> np.ndarray:
        """`[2W, chunk]`; both chunks of a window stand side by side."""
        return self.windows.ids.reshape(-1, self.chunk)

    @property
    def spans(self) -> np.ndarray:
        """`[8W, span]`."""
        return self.windows.ids.reshape(-1, self.span)

    @property
    def known(self) -> np.ndarray:
        """Windows of known domains, their numbers."""
        return np.flatnonzero(np.isin(self.windows.domains, self.domains))

    def cut(self, tokens: TokenArray, length: int) -> np.ndarray:
        """Whole pieces of documents, evenly spread, `[N, length]`."""
        pieces, _ = cut(tokens, length, self.limit, length)
        return np.array([piece.numpy() for piece in pieces], np.int64).reshape(-1, length)

    def calibration_windows(self) -> tuple[np.ndarray, np.ndarray]:
        """Windows `[W, 2 * chunk]` of calibration documents and their domains."""
        rows = [self.cut(tokens, 2 * self.chunk) for tokens in self.calibration]
        names = np.repeat(np.array(self.domains), [len(some) for some in rows])
        return np.concatenate(rows), names

    def own_pieces(self, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Calibration pieces `[N, length]` of all domains, and the numbers of domain and document of each."""
        ids, domains, documents = [], [], []
        for number, tokens in enumerate(self.calibration):
            pieces, groups = cut(tokens, length, self.limit, length)
            ids += [piece.numpy() for piece in pieces]
            domains += [number] * len(pieces)
            documents.append(groups)
        return np.stack(ids), np.array(domains), np.concatenate(documents)

    def fit(self) -> Spliced:
        """Spliced calibration chunks, to choose how borders are found."""
        ids, domains = self.calibration_windows()
        return splice(ids, domains, max(8, self.pieces // 8), self.seed + 1)

    def spliced(self) -> Spliced:
        """Spliced test chunks; rows are numbered among the known windows."""
        known = self.known
        return splice(self.windows.ids[known], self.windows.domains[known], self.pieces, self.seed)

    def changing(self) -> Spliced:
        """Test documents that change once; rows are numbered among the known windows."""
        known = self.known
        return changing(self.windows.ids[known], self.windows.domains[known], self.pieces, self.seed)

    def bordered(self) -> Arrays:
        """All pieces `[P, T]` in which borders are looked for, by name."""
        found = {"fit": self.fit().ids, "spliced": self.spliced().ids, "mixed": self.mixed.ids.astype(np.int64)}
        if self.mixed_fit is not None:
            found["mixed_fit"] = self.mixed_fit.ids.astype(np.int64)
        return found


def nll_of_pieces(crouter: Any, experts: ExpertSet, pieces: np.ndarray, rows: int, alone: bool = True) -> np.ndarray:
    """What rebuilding each token costs under each expert, `[N, n, T]` for pieces `[N, T]`, float32.

    Args:
        crouter: the shared one.
        experts: the set.
        pieces: token ids.
        rows: pieces at once.
        alone: also, last, under the crouter without any adapter: `[N, n + 1, T]`.
    """
    tensors = [torch.from_numpy(piece.astype(np.int64)) for piece in pieces]
    found = []
    for expert in experts:
        stack = AdapterStack(crouter, {expert.name: expert.compressor})
        try:
            found.append(torch.stack(token_reconstruction_nll(crouter, tensors, stack, rows=rows)).numpy())
        finally:
            stack.remove()
    if alone:
        found.append(torch.stack(token_reconstruction_nll(crouter, tensors, rows=rows)).numpy())
    return np.stack(found, axis=1)


def measure_nats(crouter: Any, experts: ExpertSet, held_out: Mapping[str, TokenArray], setting: Setting) -> Arrays:
    """Nats of all texts: tokens' where their places matter, else a piece's mean, each `[N, n + 1(, T)]`.

    Args:
        crouter: the shared one.
        experts: the set.
        held_out: what each expert was calibrated on.
        setting: the texts.

    Returns:
        float16 tokens `chunk`, `own.chunk` (calibration pieces) and those of `bordered`; float32 summaries `[..., 2]`
        (`profile.summary`) `span`, `own.span`, `changing` (chunks of documents, one after another),
        `held_out.NAME.LENGTH` with `.documents`; `own.*.domain`.
    """
    found: Arrays = {}

    def tokens(name: str, pieces: np.ndarray) -> None:
        found[name] = nll_of_pieces(crouter, experts, pieces, setting.rows).astype(np.float16)

    def summaries(name: str, pieces: np.ndarray) -> None:
        found[name] = summary(torch.from_numpy(nll_of_pieces(crouter, experts, pieces, setting.rows))).numpy()

    tokens("chunk", setting.chunks)
    summaries("span", setting.spans)
    for name, length, keep in (("chunk", setting.chunk, tokens), ("span", setting.span, summaries)):
        pieces, found[f"own.{name}.domain"], _ = setting.own_pieces(length)
        keep(f"own.{name}", pieces)
    for name, pieces in setting.bordered().items():
        tokens(name, pieces)
    documents = setting.changing().ids
    whole = documents[:, : documents.shape[1] // setting.chunk * setting.chunk]
    summaries("changing", whole.reshape(-1, setting.chunk))
    for name, array in held_out.items():
        texts = cut_by_length(array, setting.chunk, setting.limit)
        for length, pieces in texts.ids.items():
            summaries(f"held_out.{name}.{length}", pieces)
            found[f"held_out.{name}.{length}.documents"] = texts.documents[length]
    # An expert of a set of one and of a set of all computes the same bits.
    alone = nll_of_pieces(crouter, ExpertSet(experts.experts[:1]), setting.chunks[:8], setting.rows, alone=False)
    both = nll_of_pieces(crouter, experts, setting.chunks[:8], setting.rows)
    found["mounted.bit_difference"] = np.array([np.abs(alone[:, 0] - both[:, 0]).max()])
    return found


def evidence_of(nats: Arrays, experts: ExpertSet) -> Evidence:
    """What `measure_nats` found of the experts' held-out texts, for their profiles."""
    reconstruction_nlls: dict[str, dict[int, np.ndarray]] = {name: {} for name in experts.names}
    documents: dict[str, dict[int, np.ndarray]] = {name: {} for name in experts.names}
    for key in nats:
        if key.startswith("held_out.") and not key.endswith(".documents"):
            name, _, length = key.removeprefix("held_out.").rpartition(".")
            reconstruction_nlls[name][int(length)] = nats[key]
            documents[name][int(length)] = nats[f"{key}.documents"]
    return Evidence({e.name: e.compressor.checksum for e in experts}, {}, reconstruction_nlls, documents)
