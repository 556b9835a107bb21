"""Compressed history from scratch, slow and obvious: one row, one forward a token, no cache, no chunking code."""

import math

import torch


def pieces(length, prefix, chunk, window):
    """The row's parts as lists of positions: prefix, compressed chunks, raw window."""
    kept, rest, chunks = list(range(length))[:prefix], list(range(length))[prefix:], []
    while len(rest) >= window + chunk:
        chunks.append(rest[:chunk])
        rest = rest[chunk:]
    return kept, chunks, rest


def bm25(chunks, query, weigh=None):
    """BM25 of lists for a list, straight from its formula; `weigh` gives a weight to each distinct thing asked for."""
    mean = max(sum(len(chunk) for chunk in chunks) / len(chunks), 1)
    scores = []
    for chunk in chunks:
        score = 0.0
        for token in set(query) if weigh else query:
            having = sum(token in other for other in chunks)
            count = chunk.count(token)
            idf = math.log(1 + (len(chunks) - having + 0.5) / (having + 0.5))
            weight = weigh(token) if weigh else 1
            score += weight * idf * count * 2.5 / (count + 1.5 * (0.25 + 0.75 * len(chunk) / mean))
        scores.append(score)
    return scores


def overlap(chunks, query, decay, recency):
    """Words and phrases of three, each weighing by how far back it last stands in the query, and recency."""

    def shared(texts, asked):
        return bm25(texts, asked, lambda thing: math.exp(-asked[::-1].index(thing) / decay))

    def phrases(ids):
        return list(zip(ids, ids[1:], ids[2:], strict=False))

    both = zip(shared(chunks, query), shared([phrases(chunk) for chunk in chunks], phrases(query)), strict=True)
    sums = [a + b for a, b in both]
    best = max([*sums, 1e-9])
    return [score / best + recency / (len(chunks) - i) for i, score in enumerate(sums)]


def retrieved(row, prompt, prefix, chunk, window, k, every, last):
    """Numbers of the chunks that stand raw after `row` (a list of ids), whose first `prompt` ids were the prompt."""
    chosen, before = [], 0
    for length in range(prompt, len(row) + 1):
        chunks = pieces(length, prefix, chunk, window)[1]
        if (length - prompt) % every == 0 or len(chunks) > before:
            ids = [[row[position] for position in positions] for positions in chunks]
            scores = bm25(ids, row[max(0, length - last) : length]) if ids else []
            best = sorted(range(len(ids)), key=lambda i: (scores[i], i), reverse=True)[:k]
            chosen = sorted(best)
        before = len(chunks)
    return chosen


@torch.no_grad()
def next_logits(host, crouter, projector, row, prefix, window, raw=()):
    """Logits of the token after `row` (1-D ids), read as `[prefix, soft prompts, raw chunks, window]`; float32 `[V]`.

    Without a projector the compressed chunks are left out.
    """
    kept, chunks, rest = pieces(len(row), prefix, crouter.config.chunk_length, window)
    embed = host.get_input_embeddings()
    parts = [embed(row[kept])]
    if projector is not None:
        parts += [projector(crouter.encode(row[chunk][None]))[0] for chunk in chunks]
    parts += [embed(row[chunks[i]]) for i in raw]
    inputs = torch.cat([*parts, embed(row[rest])])[None]
    positions = torch.arange(inputs.shape[1])[None]
    mask = torch.ones_like(positions)
    out = host(inputs_embeds=inputs, attention_mask=mask, position_ids=positions, use_cache=False)
    return out.logits[0, -1].float()


@torch.no_grad()
def routed_logits(host, crouter, projector, row, prompt, prefix, window, deltas, decide, raw=()):
    """`next_logits` with every position's own weights: each layer's matrix plus its expert's, position by position.

    `deltas` are the experts' `[O, I]` by name of the layer; `decide` gives a list of ids its expert, -1 for none.
    The window's expert is that of its last tokens when the prompt ended or the last chunk was compressed.
    """
    size = crouter.config.chunk_length
    kept, chunks, rest = pieces(len(row), prefix, size, window)
    own, serving, before = [decide(row[chunk].tolist()) for chunk in chunks], None, 0
    for length in range(prompt, len(row) + 1):
        compressed = pieces(length, prefix, size, window)[1]
        if serving is None or len(compressed) > before:
            start = compressed[-1][-1] + 1 if compressed else 0
            serving = decide(row[max(start, length - size) : length].tolist())
        before = len(compressed)
    latents = crouter.config.num_latents
    numbers = [own[0] if own else serving] * len(kept)
    numbers += [number for number in own for _ in range(latents)]
    numbers += [own[i] for i in raw for _ in range(size)] + [serving] * len(rest)
    changed = {path: torch.stack([*(delta[path] for delta in deltas), torch.zeros_like(deltas[0][path])])
               for path in deltas[0]}  # fmt: skip

    def patched(plain, matrices):
        return lambda x: plain(x) + torch.einsum("bti,toi->bto", x, matrices[numbers])

    modules = dict(host.named_modules())
    for path, matrices in changed.items():
        modules[path].forward = patched(modules[path].forward, matrices)
    try:
        return next_logits(host, crouter, projector, row, prefix, window, raw)
    finally:
        for path in changed:
            del modules[path].forward
