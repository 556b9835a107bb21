"""What the routing measurement computes beside the experts' reconstruction NLL, as arrays: host losses, baselines.

Axes: `W` test windows of two chunks, `N` chunks or spans, `n` experts, `T` tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from eval.routing.baselines import CharacterGrams, LatentProbe, TfIdfCentroids, gram_costs, latents_of
from eval.routing.borders import measure_borders
from eval.routing.cost import now
from eval.routing.host_baselines import ArrowVotes, host_losses
from eval.routing.setting import Arrays, Setting
from hf_crouter.errors import InputError
from hf_crouter.routing.adapters import AdapterStack, Lora
from hf_crouter.routing.experts import ExpertSet
from hf_crouter.routing.profile import summary
from hf_crouter.routing.router import token_reconstruction_nll


def measure_host(host: Any, experts: ExpertSet, beside: dict[str, Lora], setting: Setting) -> Arrays:
    """Host losses of every window under every adapter, and of chunks and spans alone for the perplexity router."""
    ids, rows = setting.windows.ids, max(1, setting.rows // 2)
    found: Arrays = {}
    windows = [host_losses(host, None, -1, ids, rows, parts=2)]
    kinds = (("chunk", setting.chunks, setting.chunk), ("span", setting.spans, setting.span))
    alone: dict[str, list[np.ndarray]] = {name: [] for name, _, _ in kinds}
    own: dict[str, list[np.ndarray]] = {name: [] for name, _, _ in kinds}
    times = dict.fromkeys(alone, 0.0)
    for number, (name, adapter) in enumerate({**{e.name: e.host for e in experts}, **beside}.items()):
        stack = AdapterStack(host, {name: adapter})
        try:
            windows.append(host_losses(host, stack, 0, ids, rows, parts=2))
            for kind, pieces, length in kinds if number < len(experts) else ():
                began = now()
                alone[kind].append(host_losses(host, stack, 0, pieces, 2 * rows))
                times[kind] += now() - began
                some = setting.cut(setting.calibration[number], length)
                own[kind].append(host_losses(host, stack, 0, some, 2 * rows))
        finally:
            stack.remove()
    found["window"] = np.stack(windows, axis=-1)  # [W, 2, 1 + adapters]
    for kind, pieces, _ in kinds:
        found[kind] = np.concatenate(alone[kind], axis=1)
        found[f"{kind}.ms"] = np.array([1000 * times[kind] / len(pieces)])
        found |= {f"{kind}.{key}": values for key, values in usual(own[kind]).items()}
    return found


def measure_text(setting: Setting, tokenizer: Tokenizer) -> Arrays:
    """Character n-grams and TF-IDF centroids, which need no model."""

    def texts_of(ids: np.ndarray) -> str:
        return tokenizer.decode(ids.tolist(), skip_special_tokens=False)

    vocab = tokenizer.get_vocab_size(with_added_tokens=True)
    everything = replace(setting, limit=1 << 30)
    train = [list(everything.cut(tokens, setting.chunk)) for tokens in setting.train]
    grams = CharacterGrams([[texts_of(ids) for _, _, ids in tokens.documents()] for tokens in setting.train])
    centroids = TfIdfCentroids(train, vocab)
    found: Arrays = {}
    scorers: dict[str, Any] = {
        "ngram": lambda pieces: grams.scores([texts_of(piece) for piece in pieces]),
        "tfidf": centroids.scores,
    }
    for name, score in scorers.items():
        found |= _scored(name, score, setting)
    found["ngram.bytes"], found["tfidf.bytes"] = np.array([grams.nbytes]), np.array([centroids.nbytes])

    def costs(pieces: np.ndarray) -> np.ndarray:
        return np.stack(
            [gram_costs(grams, [texts_of(piece[i : i + 1]) for i in range(len(piece))]) for piece in pieces]
        )

    bordered = {name: costs(pieces) for name, pieces in setting.bordered().items()}
    return found | {f"ngram.border.{key}": value for key, value in measure_borders(setting, bordered).items()}


def usual(own: Sequence[np.ndarray]) -> Arrays:
    """Median and 99% quantile of each domain's scores on its calibration pieces."""
    return {"median": np.array([np.median(v) for v in own]), "limit": np.array([np.quantile(v, 0.99) for v in own])}


def _scored(name: str, score: Callable[[np.ndarray], np.ndarray], setting: Setting, only: str = "") -> Arrays:
    found: Arrays = {}
    for what, pieces, length in (("chunk", setting.chunks, setting.chunk), ("span", setting.spans, setting.span)):
        if only and what != only:
            continue
        began = now()
        found[f"{name}.{what}"] = score(pieces).astype(np.float32)
        found[f"{name}.{what}.ms"] = np.array([1000 * (now() - began) / len(pieces)])
        own, domains, documents = setting.own_pieces(length)
        scores = score(own).astype(np.float32)
        found |= {f"{name}.{what}.own": scores, f"{name}.{what}.own.domain": domains}
        found[f"{name}.{what}.own.document"] = documents
        mine = [scores[domains == i, i] for i in range(scores.shape[1])]
        found |= {f"{name}.{what}.{key}": values for key, values in usual(mine).items()}
    return found


def measure_probe(crouter: Any, setting: Setting) -> Arrays:
    """A linear probe on latents; one for chunks and one for spans."""
    found: Arrays = {}
    for what, length in (("chunk", setting.chunk), ("span", setting.span)):
        longer = replace(setting, limit=5 * setting.limit)
        train = [longer.cut(tokens, length) for tokens in setting.train]
        domains = torch.from_numpy(np.repeat(np.arange(len(train)), [len(some) for some in train]))
        probe = LatentProbe(latents_of(crouter, np.concatenate(train), setting.rows), domains, seed=setting.seed)

        def score(some: np.ndarray, probe: LatentProbe = probe) -> np.ndarray:
            return probe.scores(latents_of(crouter, some, setting.rows))

        found |= _scored("probe", score, setting, what) | {"probe.bytes": np.array([probe.nbytes])}
    return found


def measure_arrow(host: Any, experts: ExpertSet, folder: str, setting: Setting) -> Arrays:
    """PEFT's Arrow over the same adapters."""
    with ArrowVotes(host, [f"{folder}/{name}/host" for name in experts.names]) as arrow:
        rows = max(1, setting.rows // 2)
        found = _scored("arrow", lambda pieces: arrow.scores(pieces, rows), setting)
        width = arrow.width
    return found | {"arrow.bytes": np.array([4 * width * len(experts)])}


def measure_shortlist(crouter: Any, experts: ExpertSet, setting: Setting) -> Arrays:
    """How far chunks lie from the experts' centroids, `distance` `[N, n]`: a shortlist takes the nearest."""
    latents = latents_of(crouter, setting.chunks, setting.rows)
    far = []
    for expert in experts:
        if expert.centroid is None:
            raise InputError(f"shortlist: expected a centroid of every expert, got none of {expert.name}")
        far.append(expert.centroid.distance(latents))
    return {"distance": torch.stack(far, dim=1).numpy()}


def measure_compared(
    crouter: Any, copies: Mapping[str, Any], adapters: Mapping[str, Lora], setting: Setting
) -> Arrays:
    """Reconstruction NLL of chunks and of calibration chunks under other compressors of some domains.

    Args:
        crouter: the shared one.
        copies: whole crouters, by domain.
        adapters: of the shared one, with another rank than the experts', by domain.
        setting: the texts.

    Returns:
        `full.DOMAIN.*` and `small.DOMAIN.*`: `chunk` `[N, 2]` and `calibration` (`summary`); `bytes`; `ms` a chunk.
    """
    found: Arrays = {}
    models = [("full", name, copy, None) for name, copy in copies.items()]
    models += [("small", name, crouter, adapter) for name, adapter in adapters.items()]
    for kind, name, model, adapter in models:
        stack = None if adapter is None else AdapterStack(model, {name: adapter})
        try:
            own = setting.cut(setting.calibration[setting.domains.index(name)], setting.chunk)
            for what, pieces in (("calibration", own), ("chunk", setting.chunks)):
                tensors = [torch.from_numpy(row.astype(np.int64)) for row in pieces]
                began = now()
                measured = token_reconstruction_nll(model, tensors, stack, rows=setting.rows)
                found[f"{kind}.{name}.ms"] = np.array([1000 * (now() - began) / len(pieces)])
                found[f"{kind}.{name}.{what}"] = summary(torch.stack(measured)).numpy()
        finally:
            if stack is not None:
                stack.remove()
        size = sum(p.numel() for p in model.parameters()) * 2 if adapter is None else adapter.nbytes // 2
        found[f"{kind}.{name}.bytes"] = np.array([size])  # as saved, bfloat16
    return found
