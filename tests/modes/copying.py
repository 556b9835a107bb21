"""Copying histories of tiny models, and what they are held against."""

import numpy as np
import torch

from hf_crouter.modes import Copy
from hf_crouter.ngram.archive import ORDERS, Matches
from hf_crouter.ngram.candidates import Evidence, collect
from hf_crouter.ngram.gate import Gate, GateConfig
from hf_crouter.ngram.mixture import gate_features, view_host
from hf_crouter.ngram.raw_text import RawMatch, RawText

from ..ngram.reference import SlowArchive, slow_raw
from ..tiny import VOCAB, make_history

WINDOW, PREFIX = 8, 3

NEW = 30

OPTIONS = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True, "output_scores": True,
           "max_new_tokens": NEW, "pad_token_id": 0}  # fmt: skip


def eager_gate(bias=-1.0, **config):
    """A gate that copies a lot, and differently in each place."""
    torch.manual_seed(5)
    gate = Gate(GateConfig(**config))
    torch.nn.init.normal_(gate.down.weight, std=0.5)
    with torch.no_grad():
        gate.down.bias[0] = bias
    return gate.eval()


def repetitive(*lengths, seed=0):
    """Left-padded rows that say the same things again and again, with variations; no special tokens."""
    drawn = np.random.default_rng(seed)
    rows = []
    for length in lengths:
        phrases = [drawn.integers(5, VOCAB, 7) for _ in range(4)]
        row = np.concatenate([phrases[i] for i in drawn.integers(0, 4, length // 7 + 1)])[:length]
        row[drawn.random(length) < 0.1] = drawn.integers(5, VOCAB)
        rows.append(row)
    width = max(lengths)
    ids = np.stack([np.pad(row, (width - len(row), 0)) for row in rows])
    mask = np.stack([np.arange(width) >= width - len(row) for row in rows])
    return torch.from_numpy(ids), torch.from_numpy(mask).long()


def gate_of(history):
    return next(mode.gate for mode in history.modes if isinstance(mode, Copy))


def make(host, crouter, **options):
    defaults = {"window": WINDOW, "keep_first": PREFIX}
    if options.get("copy", True):
        defaults["copy_gate"] = eager_gate()
    return make_history(host, crouter, **{**defaults, **options})


def run(host, ids, mask=None, **options):
    mask = torch.ones_like(ids) if mask is None else mask
    return host.generate(ids, attention_mask=mask, **{**OPTIONS, **options})


def evidence(archive, suffix):
    """What is known of a text behind its last ids, which are its raw window."""
    suffix = np.asarray(suffix, np.int64)
    raw = RawText((), suffix)
    found = raw.match(archive.pattern(suffix, 64), len(suffix))
    return Evidence(archive.match(suffix), len(archive), found, raw.upto(len(suffix)))


def expected_step(row, archive, logits, gate, stop=(0, 1, 2), start=None):
    """The mixture by brute force: slow matches, a loop over every candidate. The window begins at `start`."""
    slow = SlowArchive(frozenset(stop)).extended(archive)
    length, positions, followers, counts = slow.match(row[-64:], ORDERS, 64)
    latest = slow.ids[positions[-1]] if positions else -1
    tokens = tuple(np.array(list(f), np.int64) for f in followers)
    weights = tuple(np.array(list(f.values()), np.float32) for f in followers)
    match = Matches(length, np.array(positions), latest, float(length > 0), tokens, weights, tuple(counts))
    row = [int(i) for i in row]
    parts = [row[:PREFIX], row[PREFIX + len(archive) if start is None else start :]]
    raw_ids = np.array([i for part in parts for i in part])
    candidates = collect([Evidence(match, len(archive), RawMatch(*slow_raw(parts, row[-64:], stop)), raw_ids)])
    view, _ = view_host(logits[None], candidates)
    weights = gate(gate_features(candidates, view), candidates.available)[0].exp()
    total = weights[0] * logits.softmax(-1)
    for k in range(len(ORDERS)):
        if k < len(match.tokens) and len(match.tokens[k]):
            share = match.weights[k] / match.weights[k].sum()
            for token, part in zip(match.tokens[k].tolist(), share.tolist(), strict=True):
                total[token] = total[token] + weights[k + 1] * part
    if length:
        total[latest] = total[latest] + weights[-1]
    return total.log()
