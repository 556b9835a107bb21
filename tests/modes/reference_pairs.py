"""What `KeptPairs` makes of a row, slow and obvious: no cache, no chunking, masks by token alone.

`given` are slots whose keys and values are known: dictionaries with `at` (position), `token` (a raw token, not an
entry), `end` (token from which on queries see it) and `pairs`, one `(key, value)` a layer, None where nothing is kept.
Entries also have `was`, by layer the positions `[heads]` at which their keys stand.
"""

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .kept_pairs import CHUNK, kept


def slides(host):
    config = host.config
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return [kind == "sliding_attention" for kind in kinds]


@torch.no_grad()
def forward(host, row, given, tokens, at=None):
    """Logits of the last of some tokens of a row; every token as a slot; queries and the factor on them by layer.

    `at` are the tokens' positions, if they are not their own.
    """
    layers = [{} for _ in range(host.config.num_hidden_layers)]
    at = torch.tensor(tokens if at is None else at)
    asking = torch.tensor(tokens)

    def attention(module, query, key, value, mask, scaling=None, **options):
        layer = module.layer_idx
        layers[layer].update(query=query[0], key=key[0], value=value[0], scaling=scaling)
        some = [slot for slot in given if slot["pairs"][layer] is not None]
        keys = torch.cat([*(slot["pairs"][layer][0][:, None] for slot in some), key[0]], 1)
        values = torch.cat([*(slot["pairs"][layer][1][:, None] for slot in some), value[0]], 1)
        starts = torch.tensor([slot["end"] for slot in some] + tokens)
        seen = starts[None] <= asking[:, None]
        if slides(host)[layer]:
            raw = torch.tensor([slot["token"] for slot in some] + [True] * len(tokens))
            places = torch.tensor([slot["at"] for slot in some] + at.tolist())
            seen &= raw[None] & (at[:, None] - places[None] < host.config.sliding_window)
        groups = query.shape[1] // keys.shape[0]
        scores = query[0] @ keys.repeat_interleave(groups, 0).transpose(1, 2) * scaling
        shares = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        return (shares @ values.repeat_interleave(groups, 0)).transpose(0, 1)[None].contiguous(), None

    ALL_ATTENTION_FUNCTIONS.register("reference_pairs", attention)
    before, host.config._attn_implementation = host.config._attn_implementation, "reference_pairs"
    try:
        logits = host(row[tokens][None], position_ids=at[None], use_cache=False).logits[0, -1]
    finally:
        host.config._attn_implementation = before
    slots = [{"at": int(at[i]), "end": token, "token": True,
              "pairs": [(layer["key"][:, i], layer["value"][:, i]) for layer in layers]}
             for i, token in enumerate(tokens)]  # fmt: skip
    return logits, slots, layers


def entries(host, given, block, following, number, chunk):
    """Slots that stay of one chunk: those of the block whose following piece was just read."""
    picked, was = [], []
    for layer, read in enumerate(following):
        if slides(host)[layer]:
            picked.append(None)
            was.append(None)
            continue
        slots = [*given, *block]
        keys = torch.stack([slot["pairs"][layer][0] for slot in slots if slot["pairs"][layer] is not None], 1)
        values = torch.stack([slot["pairs"][layer][1] for slot in slots if slot["pairs"][layer] is not None], 1)
        first = keys.shape[1] - len(block) + chunk[0] - block[0]["end"]
        keys = torch.cat([keys, read["key"]], 1)
        count = read["query"].shape[1]
        visible = torch.ones(count, keys.shape[1], dtype=torch.bool).tril(keys.shape[1] - count)
        groups = read["query"].shape[0] // keys.shape[0]
        scores = read["query"] @ keys.repeat_interleave(groups, 0).transpose(1, 2) * read["scaling"]
        shares = scores.masked_fill(~visible, float("-inf")).softmax(-1)[..., first : first + CHUNK]
        total = shares.sum(1).unflatten(0, (keys.shape[0], groups)).sum(1)
        top = total.topk(kept(number, layer)).indices.sort(-1).values
        at = torch.tensor([slot["at"] for slot in block])[top + chunk[0] - block[0]["end"]]
        top = top + first
        picked.append([(keys[torch.arange(len(keys)), top[:, i]], values[torch.arange(len(keys)), top[:, i]])
                       for i in range(kept(number, layer))])  # fmt: skip
        was.append(list(at.T))
    most = max(len(layer) for layer in picked if layer is not None)
    return [{"at": chunk[-1], "end": chunk[-1] + 1, "token": False, "chunk": number,
             "was": [layer[i] if layer is not None and i < len(layer) else None for layer in was],
             "pairs": [layer[i] if layer is not None and i < len(layer) else None for layer in picked]}
            for i in range(most)]  # fmt: skip


def rotated(host, layer, key, by):
    """A layer's key `[heads, D]` moved by so many positions, `[heads]`: each pair of its dimensions is turned."""
    rotary = (host.gpt_neox if hasattr(host, "gpt_neox") else host.model).rotary_emb
    kinds = getattr(host.config, "layer_types", None)
    name = f"{kinds[layer]}_inv_freq" if kinds and not hasattr(rotary, "inv_freq") else "inv_freq"
    angles = torch.as_tensor(by).double().reshape(-1, 1) * getattr(rotary, name).double()
    size = angles.shape[1]
    turned = torch.complex(key[:, :size], key[:, size : 2 * size]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag, key[:, 2 * size :]], 1)


def moved(host, slot, at):
    """A raw token at another position."""
    pairs = [(rotated(host, n, key, at - slot["at"]), value) for n, (key, value) in enumerate(slot["pairs"])]
    return {**slot, "at": at, "pairs": pairs}


def compacted(host, made, prefix):
    """All chunks' entries at compact positions, from wherever they stand, and the position behind them."""
    found, first = [], prefix
    for slots in made:
        counts = [sum(slot["pairs"][n] is not None for slot in slots)
                  for n, slide in enumerate(slides(host)) if not slide]  # fmt: skip
        span = -(-sum(counts) // len(counts))
        chunk = []
        for i, slot in enumerate(slots):
            pairs, was = [], []
            for n, pair in enumerate(slot["pairs"]):
                count = sum(other["pairs"][n] is not None for other in slots)
                at = first + i * span // max(1, count)
                pairs.append(pair and (rotated(host, n, pair[0], at - slot["was"][n]), pair[1]))
                was.append(pair and torch.full_like(slot["was"][n], at))
            chunk.append({**slot, "end": 0, "pairs": pairs, "was": was})
        found.append(chunk)
        first += span
    return found, first


def decided(prompt, length):
    """Tokens decided at each step; `prompt` may be a first turn's, that turn's last step and the second's."""
    if isinstance(prompt, tuple):
        first, last, second = prompt
        return [*range(first, last + 1), *range(second, length + 1)]
    return list(range(min(prompt, length), length + 1))


MADE = {}  # what was compressed before the same tokens, to spare steps between two compactions the same work


def compressed(host, row, length, prompt, prefix, window, block, limit):
    """Slots of prefix and entries, by number of the chunk, when so many tokens of the row are decided.

    And the position behind the entries, if they are at compact ones.
    """
    count = max(0, (length - prefix - window) // CHUNK)
    end = prefix + CHUNK * count + window if count else 0
    start = prompt[2] if isinstance(prompt, tuple) else min(prompt, length)
    key = (id(host), prompt, prefix, window, block, limit, *row[:end].tolist())
    if key not in MADE:
        MADE[key] = host, _compressed(host, row, max(end, start), prompt, prefix, window, block, limit)
    given, made, behind = MADE[key][1]
    if length > limit and made and behind is None:
        made, behind = compacted(host, made, prefix)
    return given, made, behind


def _compressed(host, row, length, prompt, prefix, window, block, limit):
    done, made, behind = 0, [], None
    given = forward(host, row, [], list(range(prefix)))[1] if prefix else []
    full = [n for n, slide in enumerate(slides(host)) if not slide]
    most = -(-sum(kept(1, n) for n in full) // len(full))
    for now in decided(prompt, length):
        count = max(0, (now - prefix - window) // CHUNK)
        new = [list(range(prefix + CHUNK * n, prefix + CHUNK * (n + 1))) for n in range(done, count)]
        if new:
            size = block // CHUNK
            if now > limit:  # two blocks, or one and the window, fit beside all entries
                room = limit - prefix - count * most
                size = max(1, min(block, room // 2, room - window) // CHUNK)
            blocks = [list(range(i, min(i + size, len(new)))) for i in range(0, len(new), size)]
            pieces = [sum((new[i] for i in some), []) for some in blocks]
            pieces.append(list(range(pieces[-1][-1] + 1, pieces[-1][-1] + 1 + window)))
            waiting, raw = [], []
            for number, piece in enumerate(pieces):
                if piece[-1] + 1 > limit and behind is None:
                    made, behind = compacted(host, made, prefix)
                at = piece
                if behind is not None:
                    raw = [moved(host, slot, behind + i) for i, slot in enumerate(raw)]
                    at = [behind + len(raw) + i for i in range(len(piece))]
                    assert at[-1] < limit
                known = [*given, *(slot for slots in made for slot in slots)]
                _, slots, layers = forward(host, row, [*known, *raw], piece, at)
                made = made + [entries(host, known, raw, layers, done + i, new[i]) for i in waiting]
                if behind is not None:
                    made, behind = compacted(host, made, prefix)
                waiting, raw = (blocks[number], slots) if number < len(blocks) else ([], [])
            done = count
        if now > limit and made and behind is None:
            made, behind = compacted(host, made, prefix)
    return given, made, behind


def next_logits(host, row, prompt, prefix, window, block, raw=(), limit=1 << 30):
    """Logits of the token after a row of ids, whose first `prompt` were the prompt; chunks in `raw` stand raw.

    A row of more than `limit` tokens is compact.
    """
    given, made, behind = compressed(host, row, len(row), prompt, prefix, window, block, limit)
    known = [*given, *(slot for n, slots in enumerate(made) if n not in raw for slot in slots)]
    start = prefix + CHUNK * len(made)
    tokens = [position for n in raw for position in range(prefix + CHUNK * n, prefix + CHUNK * (n + 1))]
    if not made:
        known, start = [], 0
    tokens += range(start, len(row))
    at = None if behind is None else [behind + i for i in range(len(tokens))]
    return forward(host, row, known, tokens, at)[0]
