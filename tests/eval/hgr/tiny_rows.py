"""Rows, records and a reader in miniature."""

import json

import numpy as np
from safetensors.numpy import save_file

from eval import documents
from eval.documents import Record
from eval.hgr.arms import GATES, Layout, archives_of
from eval.hgr.candidates import Searchers
from eval.hgr.gates import NineWeights
from eval.hgr.reader import DocumentReader, partners
from hf_crouter.ngram.gate import Gate

from ...tiny import CHUNK, LATENTS, VOCAB, tiny_crouter, tiny_host, tiny_projector

LAYOUT = Layout(prefix=4, chunk=CHUNK, chunks=4, window=CHUNK, target=CHUNK, latents=LATENTS)
COUNTS = [2, 4]


def make_rows(count=5, seed=0):
    """Rows with repeats, so that there is something to copy."""
    generator = np.random.default_rng(seed)
    words = generator.integers(3, VOCAB, (6, 7))
    rows = [np.concatenate(words[generator.integers(0, 6, 20)])[: LAYOUT.length] for _ in range(count)]
    return np.stack(rows).astype(np.uint16)


def make_records(count=5, domain="code"):
    return [Record(f"p{i % 3}/{i}.py", f"p{i % 3}", domain, 0.1 * i) for i in range(count)]


def make_reader(workers=0, tokens=500):
    host, crouter = tiny_host(), tiny_crouter()
    return DocumentReader(
        host, crouter, tiny_projector(host, crouter), LAYOUT, frozenset({0, 1, 2}), Searchers(workers), tokens
    )


def make_gates(bias=1.0):
    gates = {}
    for name in GATES:
        if name == "nine_weights":
            gates[name] = NineWeights()
            gates[name].logit.data.fill_(bias)
        else:
            gates[name] = Gate().requires_grad_(False)
            gates[name].down.bias[0] = -bias if np.isfinite(bias) else 1e9
        gates[name].requires_grad_(False)
    return gates


def make_block(reader, rows):
    partner = partners(make_records(len(rows)), 0)
    archives = archives_of(LAYOUT, COUNTS)
    return reader.prepare(np.arange(len(rows)), rows.astype(np.int64), rows[partner].astype(np.int64), archives)


def write_set(folder, name, monkeypatch, count=5, domain="code", seed=0):
    monkeypatch.setattr(documents, "LENGTH", LAYOUT.length)
    save_file({"ids": make_rows(count, seed)}, folder / f"{name}.safetensors")
    records = [vars(record) for record in make_records(count, domain)]
    (folder / f"{name}.json").write_text(json.dumps({"documents": records, "dropped": {}}))
