"""What the routing measurement computes on models, as arrays: one file a part, written when the part is done.

Axes: `W` test windows of two chunks, `N` chunks or spans, `n` experts, `T` tokens, `P` pieces with a border.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
from eval.routing_data import TestWindows
from eval.routing_mixed import Mixed, changing, splice
from hf_crouter.adapters import AdapterStack, Lora
from hf_crouter.data.tokens import TokenArray
from hf_crouter.routing.experts import ExpertSet
from hf_crouter.routing.router import SCORES, Router, rebuilding_nats
from hf_crouter.routing.spans import Span, find_spans
from hf_crouter.training.flops import matrix_flops_per_token

STAYS = (0.0, 0.05, 0.1, 0.2, 0.4)
SWITCHES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)  # nats that a border costs, tried on calibration documents
SMOOTHS = (1, 8, 16, 32)
SIZES = (2, 8, 32)
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
        ids, mask = tokens.chunks(length)
        whole = np.flatnonzero(mask.all(1))
        count = min(self.limit, len(whole))
        return ids[whole[np.arange(count) * len(whole) // max(count, 1)]]


def token_nats(crouter: Any, experts: ExpertSet, pieces: np.ndarray, rows: int) -> np.ndarray:
    """What rebuilding each token costs under each expert, `[N, n, T]` for pieces `[N, T]`, float32."""
    tensors = [torch.from_numpy(piece.astype(np.int64)) for piece in pieces]
    found = []
    for expert in experts:
        stack = AdapterStack(crouter, {expert.name: expert.compressor})
        try:
            found.append(torch.stack(rebuilding_nats(crouter, tensors, stack, rows=rows)).numpy())
        finally:
            stack.remove()
    return np.stack(found, axis=1)


def routers(crouter: Any, experts: ExpertSet, fewest: int) -> dict[str, Router]:
    """A router for each score."""
    return {score: Router(crouter, experts, score=score, fewest=fewest) for score in SCORES}


def excess(experts: ExpertSet, nats: np.ndarray, tokens: int, known: float) -> np.ndarray:
    """How far each residual lies above what its expert calls its own, `[N, n]`, nats/token."""
    return nats - np.array([expert.calibration.residual(tokens, known) for expert in experts])


def measure_residuals(crouter: Any, experts: ExpertSet, setting: Setting) -> Arrays:
    """Residuals, scores and decisions of chunks, of spans alone and of spans within their chunks."""
    fewest = min(64, setting.span)
    deciding = routers(crouter, experts, fewest)
    chunk = token_nats(crouter, experts, setting.chunks, setting.rows)
    within = chunk.reshape(*chunk.shape[:2], 4, setting.span).mean(-1).swapaxes(1, 2).reshape(-1, len(experts))
    span = token_nats(crouter, experts, setting.spans, setting.rows)
    found: Arrays = {}
    lengths = {
        "chunk": (chunk.mean(-1), setting.chunk),
        "span": (span.mean(-1), setting.span),
        "within": (within, setting.chunk),
    }
    for name, (nats, tokens) in lengths.items():
        found[f"{name}.nats"] = nats.astype(np.float32)
        for score, router in deciding.items():
            found[f"{name}.{score}"] = router.scores(torch.from_numpy(nats.T).double(), tokens).numpy().T.astype("f4")
            if name != "within":
                routes = [router.decide(torch.from_numpy(row), tokens).number for row in nats]
                found[f"{name}.{score}.route"] = np.array(routes, np.int64)
        found[f"{name}.excess"] = excess(experts, nats, tokens, deciding[SCORES[0]].known).astype(np.float32)
    names = list(experts.names)
    for count in range(1, len(names) + 1):  # experts mounted one after another
        some = Router(crouter, ExpertSet(experts.experts[:count]), fewest=fewest)
        rows = torch.from_numpy(chunk.mean(-1)[:, :count])
        found[f"mounted.{count}.route"] = np.array([some.decide(row, setting.chunk).number for row in rows], np.int64)
        some.remove()
    for router in deciding.values():
        router.remove()
    parts = [[expert.compressor.nbytes // 2, expert.host.nbytes // 2] for expert in experts]  # as saved, bfloat16
    found["expert.bytes"] = np.array(parts, np.int64)
    found |= measure_evidence(crouter, experts, setting, {"chunk": chunk, "span": span})
    # An expert of a set of one and of a set of all computes the same bits.
    alone = token_nats(crouter, ExpertSet(experts.experts[:1]), setting.chunks[:8], setting.rows)
    both = token_nats(crouter, experts, setting.chunks[:8], setting.rows)
    found["mounted.bit_difference"] = np.array([np.abs(alone[:, 0] - both[:, 0]).max()])
    return found


def measure_evidence(crouter: Any, experts: ExpertSet, setting: Setting, tested: Arrays) -> Arrays:
    """What a decision could be made from: residuals of test and calibration pieces, under experts and without any.

    Args:
        crouter: the shared one.
        experts: the set.
        setting: the texts.
        tested: token residuals `[N, n, T]` of test pieces, `chunk` and `span`.

    Returns:
        For both kinds `evidence.<kind>.test` and `evidence.<kind>.calibration` (with `.domain`, `[N]`): nats/token
        under each expert and, last, under the crouter alone, `[N, n + 1]`, float32.
    """
    found: Arrays = {}
    for kind, pieces in (("chunk", setting.chunks), ("span", setting.spans)):
        own = [setting.cut(tokens, pieces.shape[1]) for tokens in setting.calibration]
        found[f"evidence.{kind}.domain"] = np.repeat(np.arange(len(own)), [len(some) for some in own])
        for name, some in (("test", pieces), ("calibration", np.concatenate(own))):
            nats = tested[kind] if name == "test" else token_nats(crouter, experts, some, setting.rows)
            tensors = [torch.from_numpy(piece.astype(np.int64)) for piece in some]
            alone = torch.stack(rebuilding_nats(crouter, tensors, rows=setting.rows)).numpy()
            every = np.concatenate([nats, alone[:, None]], axis=1)
            found[f"evidence.{kind}.{name}"] = every.mean(-1).astype(np.float32)
    return found


def nearest_border(spans: Sequence[Span], border: int, length: int) -> int:
    """Tokens from a true border to the nearest found one; the piece's length where none was found."""
    return min((abs(span.start - border) for span in spans[1:]), default=length)


def tuned(costs: np.ndarray, borders: Sequence[np.ndarray] | np.ndarray) -> tuple[float, int]:
    """The switch and smoothing with the least mean error on calibration pieces; costs `[P, n, T]`, borders of each.

    The mean, with missed and superfluous borders: the median alone would take many borders for free.
    """
    length, best = costs.shape[-1], (np.inf, SWITCHES[0], SMOOTHS[0])
    for smooth in SMOOTHS:
        for switch in SWITCHES:
            errors = []
            for row, true in zip(costs, borders, strict=True):
                spans = find_spans(torch.from_numpy(row), switch=switch, smooth=min(smooth, length // 8 or 1))
                mean = np.mean([nearest_border(spans, int(border), length) for border in true])
                errors.append(mean + length // 8 * max(0, len(spans) - 1 - len(true)))
            if np.mean(errors) < best[0]:
                best = (float(np.mean(errors)), switch, smooth)
    return best[1], best[2]


def calibration_windows(setting: Setting) -> tuple[np.ndarray, np.ndarray]:
    """Windows `[W, 2 * chunk]` of calibration documents and their domains."""
    rows = [setting.cut(tokens, 2 * setting.chunk) for tokens in setting.calibration]
    names = np.repeat(np.array(setting.domains), [len(some) for some in rows])
    return np.concatenate(rows), names


def measure_borders(setting: Setting, costs_of: Callable[[np.ndarray], np.ndarray]) -> Arrays:
    """Errors of borders in spliced and in real mixed pieces.

    Args:
        setting: the texts.
        costs_of: pieces `[P, T]` to costs `[P, n, T]`.
    """
    ids, domains = calibration_windows(setting)
    fit = splice(ids, domains, max(8, setting.pieces // 8), setting.seed + 1)
    switch, smooth = tuned(costs_of(fit.ids), fit.borders[:, None])
    smooth = min(smooth, setting.chunk // 8 or 1)
    known = setting.known
    test = splice(setting.windows.ids[known], setting.windows.domains[known], setting.pieces, setting.seed)
    errors, counts, right = [], [], []
    for row, border, first, second in zip(costs_of(test.ids), test.borders, test.first, test.second, strict=True):
        spans = find_spans(torch.from_numpy(row), switch=switch, smooth=smooth)
        errors.append(nearest_border(spans, int(border), setting.chunk))
        counts.append(len(spans) - 1)
        names = [setting.windows.records[known[i]].domain for i in (first, second)]
        numbers = [setting.domains.index(name) for name in names]
        labels = np.repeat([span.number for span in spans], [len(span) for span in spans])
        truth = np.where(np.arange(setting.chunk) < border, numbers[0], numbers[1])
        right.append(float((labels == truth).mean()))
    found = {
        "switch": np.array([switch]), "smooth": np.array([smooth]), "spliced.error": np.array(errors),
        "spliced.found": np.array(counts), "spliced.tokens": np.array(right),
        "spliced.first": known[test.first], "spliced.second": known[test.second],
    }  # fmt: skip
    both = {"mixed": (switch, smooth)}
    fitting = setting.mixed_fit
    if fitting is not None:
        true = [fitting.borders(piece) for piece in range(len(fitting.ids))]
        own, least = tuned(costs_of(fitting.ids.astype(np.int64)), true)
        both["mixed_own"] = (own, min(least, setting.chunk // 8 or 1))
    costs = costs_of(setting.mixed.ids.astype(np.int64))
    for name, (switch, smooth) in both.items():
        errors, pieces, counts = [], [], []
        for piece, row in enumerate(costs):
            spans = find_spans(torch.from_numpy(row), switch=switch, smooth=smooth)
            true = setting.mixed.borders(piece)
            errors += [nearest_border(spans, int(border), setting.chunk) for border in true]
            pieces += [piece] * len(true)
            counts.append((len(spans) - 1, len(true)))
        found |= {f"{name}.error": np.array(errors), f"{name}.piece": np.array(pieces)}
        found |= {f"{name}.found": np.array(counts), f"{name}.setting": np.array([switch, smooth], np.float64)}
    return found


def expert_costs(crouter: Any, experts: ExpertSet, setting: Setting) -> Callable[[np.ndarray], np.ndarray]:
    """Costs of tokens as the router's default score sees them."""

    def costs(pieces: np.ndarray) -> np.ndarray:
        router = Router(crouter, experts)
        try:
            nats = token_nats(crouter, experts, pieces, setting.rows)
            return np.stack([router.scores(torch.from_numpy(row).double(), setting.chunk).numpy() for row in nats])
        finally:
            router.remove()

    return costs


def measure_changing(crouter: Any, experts: ExpertSet, setting: Setting) -> Arrays:
    """Routes of consecutive chunks of documents that change once, for each `stay`."""
    known = setting.known
    documents = changing(setting.windows.ids[known], setting.windows.domains[known], setting.pieces, setting.seed)
    count = documents.ids.shape[1] // setting.chunk
    pieces = documents.ids[:, : count * setting.chunk].reshape(-1, setting.chunk)
    nats = token_nats(crouter, experts, pieces, setting.rows).mean(-1).reshape(len(documents.ids), count, -1)
    found: Arrays = {"border": documents.borders, "nats": nats.astype(np.float32)}
    found |= {"first": known[documents.first], "second": known[documents.second]}
    for stay in STAYS:
        router = Router(crouter, experts, stay=stay, fewest=min(64, setting.span))
        routes = np.zeros(nats.shape[:2], np.int64)
        for number, document in enumerate(nats):
            previous = None
            for i, chunk in enumerate(document):
                previous = routes[number, i] = router.decide(torch.from_numpy(chunk), setting.chunk, previous).number
        found[f"route.{stay:g}"] = routes
        router.remove()
    return found


def measure_host(host: Any, experts: ExpertSet, beside: dict[str, Lora], setting: Setting) -> Arrays:
    """Host losses of every window under every adapter, and of chunks and spans alone for the perplexity router."""
    ids = setting.windows.ids
    stack = AdapterStack(host, {**{e.name: e.host for e in experts}, **beside})
    rows = max(1, setting.rows // 2)
    try:
        windows = [host_losses(host, stack, number, ids, rows, parts=2) for number in range(-1, len(stack))]
        found: Arrays = {"window": np.stack(windows, axis=-1)}  # [W, 2, 1 + adapters]
        count = range(len(experts))
        for name, pieces, length in (("chunk", setting.chunks, setting.chunk), ("span", setting.spans, setting.span)):
            began = time.perf_counter()
            found[name] = np.concatenate([host_losses(host, stack, i, pieces, 2 * rows) for i in count], axis=1)
            found[f"{name}.ms"] = np.array([1000 * (time.perf_counter() - began) / len(pieces)])
            own = [host_losses(host, stack, i, setting.cut(setting.calibration[i], length), 2 * rows) for i in count]
            found |= {f"{name}.{key}": values for key, values in usual(own).items()}
        found["switch.ms"], found["recompute.ms"] = _switch_ms(host, stack, ids[:1, : setting.chunk])
    finally:
        stack.remove()
    return found


def _switch_ms(host: Any, stack: AdapterStack, ids: np.ndarray, repeats: int = 50) -> tuple[np.ndarray, np.ndarray]:
    batch = torch.from_numpy(ids.astype(np.int64)).to(host.device)
    choose, recompute = [], []
    for repeat in range(repeats):
        began = _now()
        stack.choose([repeat % len(stack)])
        choose.append(_now() - began)
        if repeat < 10:
            began = _now()
            with torch.no_grad():
                host(input_ids=batch, use_cache=True, logits_to_keep=1)
            recompute.append(_now() - began)
    stack.choose(None)
    return np.array([1000 * np.median(choose)]), np.array([1000 * np.median(recompute)])


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

    return found | {f"ngram.border.{key}": value for key, value in measure_borders(setting, costs).items()}


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
        own = [score(setting.cut(tokens, length))[:, i] for i, tokens in enumerate(setting.calibration)]
        found |= {f"{name}.{what}.{key}": values for key, values in usual(own).items()}
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
    found = []
    for i in range(count):
        expert = experts.experts[i % len(experts)]
        down, up = (
            {k: v + 0.01 * v.std() * torch.randn(v.shape, generator=generator) for k, v in part.items()}
            for part in (expert.compressor.down, expert.compressor.up)
        )
        copy = Lora(down, up, expert.compressor.checksum)
        found.append(replace(expert, name=f"copy{i}", compressor=copy))
    return ExpertSet(tuple(found))


def measure_latency(crouter: Any, experts: ExpertSet, setting: Setting, repeats: int = 5) -> Arrays:
    """Milliseconds and FLOPs a chunk for 2, 8 and 32 experts, with and without a shortlist of two."""
    found: Arrays = {}
    pieces = [torch.from_numpy(row.astype(np.int64)) for row in setting.chunks[:32]]
    flops = matrix_flops_per_token(crouter.config, backward=False) * setting.chunk
    encoding = 2.0 * setting.chunk * _encoder_products(crouter.config)
    for count in SIZES:
        several = noisy(experts, count, setting.seed)
        lora = 2.0 * setting.chunk * sum(v.numel() for part in (several.experts[0].compressor.down,
                                         several.experts[0].compressor.up) for v in part.values())  # fmt: skip
        for shortlist in (0, 2):
            if shortlist >= count:
                continue
            router = Router(crouter, several, shortlist=shortlist, rows=setting.rows)
            router.residuals(pieces[:2])
            times: dict[str, list[float]] = {"one": [], "many": []}
            for _ in range(repeats):
                for name, some in (("one", pieces[:1]), ("many", pieces)):
                    began = _now()
                    router.residuals(some)
                    times[name].append(1000 * (_now() - began) / len(some))
            key = f"{count}.{'shortlist' if shortlist else 'all'}"
            found[f"{key}.ms"] = np.array([np.median(times["one"])])
            found[f"{key}.ms_batched"] = np.array([np.median(times["many"])])
            scored = shortlist or count
            found[f"{key}.flops"] = np.array([scored * (flops + lora) + bool(shortlist) * encoding])
            router.remove()
    shortlisted = Router(crouter, experts, shortlist=min(2, len(experts)), rows=setting.rows)
    wanted = shortlisted.shortlisted([torch.from_numpy(row.astype(np.int64)) for row in setting.chunks])
    shortlisted.remove()
    return found | {"shortlisted": wanted.numpy()}


def _encoder_products(config: Any) -> float:
    """Multiplications a token in the encoder's layers, counted as `matrix_flops_per_token` does."""
    layer = 4 * config.hidden_size**2 + 3 * config.hidden_size * config.intermediate_size
    layer += 2 * config.chunk_length * config.hidden_size
    return float(config.num_encoder_layers * config.num_encoder_loops * layer)


def measure_full(crouters: dict[str, Any], experts: ExpertSet, setting: Setting) -> Arrays:
    """Residuals of chunks under whole copies, beside the medians on calibration chunks."""
    found: Arrays = {}
    for name, crouter in crouters.items():
        for what, pieces in (
            ("chunk", setting.chunks),
            ("calibration", setting.cut(setting.calibration[setting.domains.index(name)], setting.chunk)),
        ):
            tensors = [torch.from_numpy(row.astype(np.int64)) for row in pieces]
            nats = rebuilding_nats(crouter, tensors, rows=setting.rows)
            found[f"{name}.{what}"] = torch.stack(nats).mean(-1).numpy()
        found[f"{name}.bytes"] = np.array([sum(p.numel() for p in crouter.parameters()) * 2])
    return found
