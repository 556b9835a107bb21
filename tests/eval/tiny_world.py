"""A host, a crouter with a projector and a gate of that host beside it, another gate, and sets of rows: on disk."""

import functools
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from eval.arms import Reader
from eval.rows import Record, Rows, Shape, breaks_lines, line_numbers
from hf_crouter.chunking import tokenizer_fingerprint
from hf_crouter.crouter.loading import load_crouter
from hf_crouter.hosts.fingerprint import host_architecture, host_fingerprint
from hf_crouter.hosts.loading import load_host
from hf_crouter.ngram.gate import Gate, GateConfig

from ..tiny import LATENTS, tiny_crouter, tiny_host, tiny_projector
from ..trained_crouter import make_tokenizer

CHUNK = 256  # a window of 2,048 more tokens is less than nine of them
SHAPE = Shape(prefix=4, chunk=CHUNK, chunks=9, window=64, target=140)
SOURCE = (Path(sysconfig.get_path("stdlib")) / "argparse.py").read_text(encoding="utf-8")


@dataclass(frozen=True)
class World:
    """Folders of all that a command reads."""

    root: Path

    @property
    def host(self):
        return str(self.root / "tiny-host")

    @property
    def crouter(self):
        return str(self.root / "crouter")

    @property
    def gate(self):
        return self.root / "fitted"

    def reader(self, **changes):
        host, tokenizer = load_host(self.host)
        return Reader(**{"host": host, "tokenizer": tokenizer, "crouter": load_crouter(self.crouter)[0],
                         "gate": self.gate, "window": SHAPE.window, **changes})  # fmt: skip


def make_gate(folder, bias, **config):
    gate = Gate(GateConfig(host_name="tiny", **config))
    with torch.no_grad():
        gate.down.weight.normal_(std=0.05)
        gate.down.bias[0] = bias
    gate.save(folder)


@functools.cache
def world() -> World:
    found = World(Path(tempfile.mkdtemp(prefix="eval-world-")))
    tokenizer = make_tokenizer(300)
    host = tiny_host(positions=8192, vocab_size=len(tokenizer))
    host.config.eos_token_id = host.generation_config.eos_token_id = tokenizer.eos_token_id
    host.config.pad_token_id = host.generation_config.pad_token_id = tokenizer.eos_token_id
    host.save_pretrained(found.host)
    crouter = tiny_crouter(vocab_size=len(tokenizer), chunk_length=CHUNK)
    crouter.save_pretrained(found.crouter)
    for folder in (found.host, found.crouter):
        tokenizer.save_pretrained(folder)
    host, crouter = load_host(found.host)[0], load_crouter(found.crouter)[0]
    projector = tiny_projector(host, crouter, host_tokenizer=tokenizer, crouter_tokenizer=tokenizer)
    projector.save(Path(found.crouter) / "projectors" / "tiny")
    known = {"host_fingerprint": host_fingerprint(host), "host_architecture": host_architecture(host),
             "host_tokenizer": tokenizer_fingerprint(tokenizer)}  # fmt: skip
    make_gate(Path(found.crouter) / "gates" / "tiny", 0.0, **known)
    make_gate(found.gate, -3.0, **known)
    return found


def make_rows(tokenizer, count, shape=SHAPE, domain="code", seed=0):
    """Rows of a text that repeats itself, of packages of two files."""
    ids, breaks = np.array(tokenizer.encode(SOURCE), np.uint32), breaks_lines(tokenizer)
    starts = np.random.default_rng(seed).integers(0, len(ids) - shape.length, count)
    rows = np.stack([ids[start : start + shape.length] for start in starts])
    lines = np.stack([line_numbers(row[-shape.target :], breaks) for row in rows])
    records = [Record(f"p{n // 2}/{n}.py", f"p{n // 2}", domain, 0.1) for n in range(count)]
    return Rows(rows, lines, records, shape, tokenizer_fingerprint(tokenizer), {})


def slots_of(count, *, retrieved=0, soft=False, extra=0, entries=LATENTS):
    """Positions before the scored tokens."""
    return SHAPE.prefix + SHAPE.window + retrieved * CHUNK + soft * entries * count + extra
