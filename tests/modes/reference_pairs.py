"""What `KeptPairs` makes of a row, slow and obvious: no cache, no chunking, masks by position alone.

`given` are slots whose keys and values are known: dictionaries with `at` (position), `token` (a raw token, not an
entry), `end` (position from which queries see it) and `pairs`, one `(key, value)` a layer, None where nothing is kept.
"""

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .kept_pairs import CHUNK, kept


def slides(host):
    config = host.config
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return [kind == "sliding_attention" for kind in kinds]


@torch.no_grad()
def forward(host, row, given, positions):
    """Logits of the last of some tokens of a row; every token as a slot; queries and the factor on them by layer."""
    layers = [{} for _ in range(host.config.num_hidden_layers)]
    at = torch.tensor(positions)

    def attention(module, query, key, value, mask, scaling=None, **options):
        layer = module.layer_idx
        layers[layer].update(query=query[0], key=key[0], value=value[0], scaling=scaling)
        some = [slot for slot in given if slot["pairs"][layer] is not None]
        keys = torch.cat([*(slot["pairs"][layer][0][:, None] for slot in some), key[0]], 1)
        values = torch.cat([*(slot["pairs"][layer][1][:, None] for slot in some), value[0]], 1)
        starts = torch.tensor([slot["end"] for slot in some] + positions)
        seen = starts[None] <= at[:, None]
        if slides(host)[layer]:
            tokens = torch.tensor([slot["token"] for slot in some] + [True] * len(positions))
            places = torch.tensor([slot["at"] for slot in some] + positions)
            seen &= tokens[None] & (at[:, None] - places[None] < host.config.sliding_window)
        groups = query.shape[1] // keys.shape[0]
        scores = query[0] @ keys.repeat_interleave(groups, 0).transpose(1, 2) * scaling
        shares = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        return (shares @ values.repeat_interleave(groups, 0)).transpose(0, 1)[None].contiguous(), None

    ALL_ATTENTION_FUNCTIONS.register("reference_pairs", attention)
    before, host.config._attn_implementation = host.config._attn_implementation, "reference_pairs"
    try:
        logits = host(row[positions][None], position_ids=at[None], use_cache=False).logits[0, -1]
    finally:
        host.config._attn_implementation = before
    slots = [{"at": position, "end": position, "token": True,
              "pairs": [(layer["key"][:, i], layer["value"][:, i]) for layer in layers]}
             for i, position in enumerate(positions)]  # fmt: skip
    return logits, slots, layers


def entries(host, given, block, following, number, chunk):
    """Slots that stay of one chunk: those of the block whose following piece was just read."""
    picked = []
    for layer, read in enumerate(following):
        if slides(host)[layer]:
            picked.append(None)
            continue
        slots = [*given, *block]
        keys = torch.stack([slot["pairs"][layer][0] for slot in slots if slot["pairs"][layer] is not None], 1)
        values = torch.stack([slot["pairs"][layer][1] for slot in slots if slot["pairs"][layer] is not None], 1)
        first = keys.shape[1] - len(block) + chunk[0] - block[0]["at"]
        keys = torch.cat([keys, read["key"]], 1)
        count = read["query"].shape[1]
        visible = torch.ones(count, keys.shape[1], dtype=torch.bool).tril(keys.shape[1] - count)
        groups = read["query"].shape[0] // keys.shape[0]
        scores = read["query"] @ keys.repeat_interleave(groups, 0).transpose(1, 2) * read["scaling"]
        shares = scores.masked_fill(~visible, float("-inf")).softmax(-1)[..., first : first + CHUNK]
        total = shares.sum(1).unflatten(0, (keys.shape[0], groups)).sum(1)
        top = total.topk(kept(number, layer)).indices.sort(-1).values + first
        picked.append([(keys[torch.arange(len(keys)), top[:, i]], values[torch.arange(len(keys)), top[:, i]])
                       for i in range(kept(number, layer))])  # fmt: skip
    most = max(len(layer) for layer in picked if layer is not None)
    return [{"at": chunk[-1], "end": chunk[-1] + 1, "token": False, "chunk": number,
             "pairs": [layer[i] if layer is not None and i < len(layer) else None for layer in picked]}
            for i in range(most)]  # fmt: skip


MADE = {}  # what was compressed before the same tokens, to spare steps between two compactions the same work


def compressed(host, row, length, prompt, prefix, window, block):
    """Slots of prefix and entries, by number of the chunk, when so many tokens of the row are decided."""
    count = max(0, (length - prefix - window) // CHUNK)
    key = (id(host), prompt, prefix, window, block, *row[: prefix + CHUNK * count + window * bool(count)].tolist())
    if key not in MADE:
        MADE[key] = host, _compressed(host, row, length, prompt, prefix, window, block)
    return MADE[key][1]


def _compressed(host, row, length, prompt, prefix, window, block):
    done, made = 0, []
    given = forward(host, row, [], list(range(prefix)))[1] if prefix else []
    for now in range(min(prompt, length), length + 1):
        count = max(0, (now - prefix - window) // CHUNK)
        new = [list(range(prefix + CHUNK * n, prefix + CHUNK * (n + 1))) for n in range(done, count)]
        if not new:
            continue
        size = block // CHUNK
        blocks = [list(range(i, min(i + size, len(new)))) for i in range(0, len(new), size)]
        pieces = [sum((new[i] for i in some), []) for some in blocks]
        pieces.append(list(range(pieces[-1][-1] + 1, pieces[-1][-1] + 1 + window)))
        waiting, raw = [], []
        for number, piece in enumerate(pieces):
            known = [*given, *(slot for slots in made for slot in slots)]
            _, slots, layers = forward(host, row, [*known, *raw], piece)
            made += [entries(host, known, raw, layers, done + i, new[i]) for i in waiting]
            waiting, raw = (blocks[number], slots) if number < len(blocks) else ([], [])
        done = count
    return given, made


def next_logits(host, row, prompt, prefix, window, block, raw=()):
    """Logits of the token after a row of ids, whose first `prompt` were the prompt; chunks in `raw` stand raw."""
    given, made = compressed(host, row, len(row), prompt, prefix, window, block)
    known = [*given, *(slot for n, slots in enumerate(made) if n not in raw for slot in slots)]
    start = prefix + CHUNK * len(made)
    tokens = [position for n in raw for position in range(prefix + CHUNK * n, prefix + CHUNK * (n + 1))]
    if not made:
        known, start = [], 0
    return forward(host, row, known, [*tokens, *range(start, len(row))])[0]
