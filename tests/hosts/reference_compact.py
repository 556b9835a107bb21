"""A row read over key-value pairs that are known: the host's own forward over its raw tokens, without a cache, with an
attention of the tests' own, in which a query sees by positions alone.

`given` is known of each layer by its number, see `Given`.
"""

from typing import NamedTuple

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "reference_compact"
# what families pass to attention beside the common arguments, and what changes nothing in it
CARRIED = {
    "dropout", "is_causal", "logits_to_keep", "output_attentions", "output_hidden_states", "output_router_logits",
    "position_ids", "sliding_window", "use_cache",
}  # fmt: skip


class Given(NamedTuple):
    """Pairs that stand before a layer's own.

    keys, values: `[heads, n, D]`; at: position of each; end: that from which on queries see it; token: a raw token.
    """

    keys: torch.Tensor
    values: torch.Tensor
    at: torch.Tensor
    end: torch.Tensor
    token: torch.Tensor


def tokens(keys, values, positions):
    """Raw tokens as given pairs."""
    at = torch.tensor(positions, dtype=torch.long)
    return Given(keys, values, at, at, torch.ones_like(at, dtype=torch.bool))


def joined(*some):
    return Given(*(torch.cat(parts, min(1, parts[0].ndim - 1)) for parts in zip(*some, strict=True)))


def slides(host):
    config = host.config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    kinds = kinds or ["sliding_attention" if window else "full_attention"] * config.num_hidden_layers
    assert {*kinds} <= {"full_attention", "sliding_attention"}
    return [window if kind == "sliding_attention" else None for kind in kinds]


def attend(query, key, value, seen, scaling, softcap=None, sinks=None):
    """Attention `[T, query heads, D]` of one row, in float64; `query [query heads, T, D]`, `key [heads, S, D]`."""
    query, key, value = (part.double() for part in (query, key, value))
    groups = query.shape[0] // key.shape[0]
    products = query @ key.repeat_interleave(groups, 0).transpose(1, 2) * scaling
    if softcap is not None:
        products = softcap * torch.tanh(products / softcap)
    products = products.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        products = torch.cat([products, sinks.double()[:, None, None].expand(-1, products.shape[1], 1)], -1)
    shares = products.softmax(-1)[..., : key.shape[1]]
    return (shares @ value.repeat_interleave(groups, 0)).transpose(0, 1)


def seen_by(at, given, window=None):
    """Which query, at positions `[T]`, sees which pair."""
    seen = given.end[None] <= at[:, None]
    if window is not None:
        seen &= given.token[None] & (at[:, None] - given.at[None] < window)
    return seen


@torch.no_grad()
def forward(host, row, positions, given):
    """Logits `[T, V]` of some tokens of a row, float32, and what they are as given pairs, by layer."""
    config = host.config.get_text_config(decoder=True)
    before, made, windows = config._attn_implementation, {}, slides(host)
    at = torch.tensor(positions)

    def attention(module, query, key, value, attention_mask=None, scaling=None, softcap=None, s_aux=None, **options):
        odd = {name for name, option in options.items() if option is not None} - CARRIED
        assert not odd, f"attention is passed {odd}"
        number = module.layer_idx
        assert number not in made and len(query) == 1
        made[number] = own = tokens(key[0].double(), value[0].double(), positions)
        stands = joined(given[number], own) if number in given else own
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        if before != "eager":  # sdpa knows neither
            softcap = s_aux = None
        seen = seen_by(at, stands, windows[number])
        out = attend(query[0], stands.keys, stands.values, seen, scaling, softcap, s_aux)
        return out[None].to(query.dtype).contiguous(), None

    ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
    config._attn_implementation = NAME
    try:
        out = host(input_ids=row[positions][None], position_ids=at[None], use_cache=False)
    finally:
        config._attn_implementation = before
        del ALL_ATTENTION_FUNCTIONS._global_mapping[NAME]
    assert sorted(made) == list(range(config.num_hidden_layers))
    return out.logits[0].float(), made


def standing(cache, chunks):
    """Pairs of the first row that stand in a cache, as given ones, by layer; `chunks`: positions of each chunk."""
    found = {}
    for number, owner in enumerate(cache.places.owners):
        count = 0 if owner is None else int((owner[0] >= 0).sum())
        if not count:
            continue
        owner, layer = owner[0, :count], cache.layers[number]
        end = torch.tensor([chunks[n][-1] + 1 for n in owner.tolist()])
        found[number] = owner, Given(
            layer.keys[0, :, :count].double(), layer.values[0, :, :count].double(), end - 1, end,
            torch.zeros(count, dtype=torch.bool),
        )  # fmt: skip
    return found


def of_chunks(standing, count):
    """Of what stands in a cache, the pairs of the first chunks."""
    found = {}
    for number, (owner, given) in standing.items():
        some = owner < count
        if bool(some.any()):
            found[number] = Given(given.keys[:, some], given.values[:, some], *(part[some] for part in given[2:]))
    return found
