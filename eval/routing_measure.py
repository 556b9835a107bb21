"""What the routing measurement computes beside the experts' nats, as arrays: the host's losses, baselines, costs.

Axes: `W` test windows of two chunks, `N` chunks or spans, `n` experts, `T` tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from eval.routing_baselines import (
    ArrowVotes,
    CharacterGrams,
    LatentProbe,
    TfIdfCentroids,
    gram_buckets,
    host_losses,
    latents_of,
)
from eval.routing_decide import measure_borders
from eval.routing_nats import Arrays, Setting
from hf_crouter.errors import InputError
from hf_crouter.routing.adapters import AdapterStack, Lora
from hf_crouter.routing.experts import ExpertSet
from hf_crouter.routing.profile import Profile, summary
from hf_crouter.routing.router import Router, token_reconstruction_nll
from hf_crouter.training.flops import matrix_flops_per_token

SIZES = (2, 8, 32)


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
                began = _now()
                alone[kind].append(host_losses(host, stack, 0, pieces, 2 * rows))
                times[kind] += _now() - began
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


def _switch_ms(host: Any, experts: ExpertSet, ids: np.ndarray, repeats: int = 50) -> Arrays:
    """Milliseconds of choosing another adapter of the host, and of reading a window `[1, T]` anew under it."""
    batch = torch.from_numpy(ids.astype(np.int64)).to(host.device)
    times: dict[str, list[float]] = {"switch": [], "recompute": []}
    stack = AdapterStack(host, {e.name: e.host for e in experts})
    try:
        for repeat in range(repeats):
            began = _now()
            stack.choose([repeat % len(stack)])
            times["switch"].append(1000 * (_now() - began))
            if repeat < 10:
                began = _now()
                with torch.no_grad():
                    host(input_ids=batch, use_cache=True, logits_to_keep=1)
                times["recompute"].append(1000 * (_now() - began))
    finally:
        stack.remove()
    return {f"{name}.ms": np.array([np.median(some)]) for name, some in times.items()}


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def measure_text(setting: Setting, texts_of: Callable[[np.ndarray], str], tokenizer: Tokenizer) -> Arrays:
    """Character n-grams and TF-IDF centroids, which need no model."""
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


def gram_costs(grams: CharacterGrams, tokens: Sequence[str]) -> np.ndarray:
    """Nats of the n-grams that end in each token, `[n, T]`, divided by the number of orders."""
    text = "".join(tokens)
    owner = np.repeat(np.arange(len(tokens)), [len(token) for token in tokens])
    costs = np.zeros((len(grams.log_shares), len(tokens)))
    for order in (1, 2, 3, 4):
        buckets = gram_buckets(text, (order,))
        place = owner[order - 1 :]
        for row, shares in zip(costs, grams.log_shares, strict=True):
            row += np.bincount(place, -shares[buckets] / 4, minlength=len(tokens))
    return costs


def usual(own: Sequence[np.ndarray]) -> Arrays:
    """Median and 99% quantile of each domain's scores on its calibration pieces."""
    return {"median": np.array([np.median(v) for v in own]), "limit": np.array([np.quantile(v, 0.99) for v in own])}


def _scored(name: str, score: Callable[[np.ndarray], np.ndarray], setting: Setting, only: str = "") -> Arrays:
    found: Arrays = {}
    for what, pieces, length in (("chunk", setting.chunks, setting.chunk), ("span", setting.spans, setting.span)):
        if only and what != only:
            continue
        began = _now()
        found[f"{name}.{what}"] = score(pieces).astype(np.float32)
        found[f"{name}.{what}.ms"] = np.array([1000 * (_now() - began) / len(pieces)])
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


def noisy(experts: ExpertSet, count: int, seed: int) -> ExpertSet:
    """So many experts: copies of those there are, with noise on their weights."""
    generator = torch.Generator().manual_seed(seed)
    found, among = [], tuple(experts.experts[i % len(experts)].compressor.checksum for i in range(count))
    profile = Profile(among, (), {}, {}, {}, {})  # says nothing, but the crouter alone is asked as for a real one
    for i in range(count):
        expert = experts.experts[i % len(experts)]
        down, up = (
            {k: v + 0.01 * v.std() * torch.randn(v.shape, generator=generator) for k, v in part.items()}
            for part in (expert.compressor.down, expert.compressor.up)
        )
        copy = Lora(down, up, expert.compressor.checksum)
        found.append(replace(expert, name=f"copy{i}", compressor=copy, profile=profile))
    return ExpertSet(tuple(found))


def measure_latency(crouter: Any, host: Any, experts: ExpertSet, setting: Setting, repeats: int = 5) -> Arrays:
    """Milliseconds and FLOPs a chunk for 2, 8 and 32 experts, with and without a shortlist of two; of a switch."""
    found = _switch_ms(host, experts, setting.windows.ids[:1, : setting.chunk])
    pieces = [torch.from_numpy(row.astype(np.int64)) for row in setting.chunks[:32]]
    flops = matrix_flops_per_token(crouter.config, backward=False) * setting.chunk
    encoding = 2.0 * setting.chunk * _encoder_products(crouter.config)
    for count in SIZES:
        several = noisy(experts, count, setting.seed)
        lora = 2.0 * setting.chunk * sum(v.numel() for part in (several.experts[0].compressor.down,
                                         several.experts[0].compressor.up) for v in part.values())  # fmt: skip
        for top_k_experts in (0, 2):
            if top_k_experts >= count:
                continue
            router = Router(crouter, several, top_k_experts=top_k_experts, rows=setting.rows)
            router.reconstruction_nlls(pieces[:2])
            times: dict[str, list[float]] = {"one": [], "many": []}
            for _ in range(repeats):
                for name, some in (("one", pieces[:1]), ("many", pieces)):
                    began = _now()
                    router.reconstruction_nlls(some)
                    times[name].append(1000 * (_now() - began) / len(some))
            key = f"{count}.{'shortlist' if top_k_experts else 'all'}"
            found[f"{key}.ms"] = np.array([np.median(times["one"])])
            found[f"{key}.ms_batched"] = np.array([np.median(times["many"])])
            scored = top_k_experts or count
            besides = encoding if top_k_experts else flops  # the crouter alone
            found[f"{key}.flops"] = np.array([scored * (flops + lora) + besides])
            router.remove()
    return found


def measure_shortlist(crouter: Any, experts: ExpertSet, setting: Setting) -> Arrays:
    """How far chunks lie from the experts' centroids, `distance` `[N, n]`: a shortlist takes the nearest."""
    latents = latents_of(crouter, setting.chunks, setting.rows)
    far = []
    for expert in experts:
        if expert.centroid is None:
            raise InputError(f"shortlist: expected a centroid of every expert, got none of {expert.name}")
        far.append(expert.centroid.distance(latents))
    return {"distance": torch.stack(far, dim=1).numpy()}


def _encoder_products(config: Any) -> float:
    """Multiplications a token in the encoder's layers, counted as `matrix_flops_per_token` does."""
    layer = 4 * config.hidden_size**2 + 3 * config.hidden_size * config.intermediate_size
    layer += 2 * config.chunk_length * config.hidden_size
    return float(config.num_encoder_layers * config.num_encoder_loops * layer)


def measure_compared(
    crouter: Any, copies: Mapping[str, Any], adapters: Mapping[str, Lora], setting: Setting
) -> Arrays:
    """Residuals of chunks and of calibration chunks under other compressors of some domains.

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
                began = _now()
                nats = token_reconstruction_nll(model, tensors, stack, rows=setting.rows)
                found[f"{kind}.{name}.ms"] = np.array([1000 * (_now() - began) / len(pieces)])
                found[f"{kind}.{name}.{what}"] = summary(torch.stack(nats)).numpy()
        finally:
            if stack is not None:
                stack.remove()
        size = sum(p.numel() for p in model.parameters()) * 2 if adapter is None else adapter.nbytes // 2
        found[f"{kind}.{name}.bytes"] = np.array([size])  # as saved, bfloat16
    return found
