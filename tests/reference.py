"""Compressed history from scratch, slow and obvious: one row, one forward a token, no cache, no chunking code."""

import torch


def pieces(length, prefix, chunk, window):
    """The row's parts as lists of positions: prefix, compressed chunks, raw window."""
    kept, rest, chunks = list(range(length))[:prefix], list(range(length))[prefix:], []
    while len(rest) >= window + chunk:
        chunks.append(rest[:chunk])
        rest = rest[chunk:]
    return kept, chunks, rest


@torch.no_grad()
def next_logits(host, crouter, projector, row, prefix, window):
    """Logits of the token after `row` (1-D ids), read as `[prefix, soft prompts, raw window]`; float32 `[V]`.

    Without a projector the compressed chunks are left out.
    """
    kept, chunks, rest = pieces(len(row), prefix, crouter.config.chunk_length, window)
    embed = host.get_input_embeddings()
    parts = [embed(row[kept])]
    if projector is not None:
        parts += [projector(crouter.encode(row[chunk][None]))[0] for chunk in chunks]
    inputs = torch.cat([*parts, embed(row[rest])])[None]
    positions = torch.arange(inputs.shape[1])[None]
    mask = torch.ones_like(positions)
    out = host(inputs_embeds=inputs, attention_mask=mask, position_ids=positions, use_cache=False)
    return out.logits[0, -1].float()
