"""Histories of tiny models, calls of theirs, and the check of every step."""

import torch

from . import reference
from .tiny import make_history

WINDOW, PREFIX = 8, 3

GREEDY = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True, "output_scores": True}


def make(host, crouter, **options):
    return make_history(host, crouter, **{"window": WINDOW, "keep_first": PREFIX, **options})


def run(host, ids, mask=None, new=40, **options):
    mask = torch.ones_like(ids) if mask is None else mask
    return host.generate(ids, attention_mask=mask, max_new_tokens=new, **{**GREEDY, **options})


def assert_matches_reference(out, lengths, host, crouter, projector, window=WINDOW, prefix=PREFIX, atol=1e-4):
    width = out.sequences.shape[1] - len(out.logits)
    for i, length in enumerate(lengths):
        for step, logits in enumerate(out.logits):
            row = out.sequences[i, width - length : width + step]
            expected = reference.next_logits(host, crouter, projector, row, prefix, window)
            torch.testing.assert_close(logits[i], expected, atol=atol, rtol=0)
