"""A bench in miniature."""

import numpy as np
import pytest

from eval.documents import Record, Shape, Windows
from eval.reading.bench import Bench
from hf_crouter import SoftPrompts
from tests.tiny import CHUNK, tiny_crouter, tiny_host, tiny_projector
from tests.trained_crouter import TEXT, make_tokenizer

SHAPE = Shape(prefix=4, chunk=CHUNK, chunks=4, window=32, target=160)
LENGTH = SHAPE.split + SHAPE.target
CODE = "".join(f"name_{n} = call_{n % 5}(value_{n % 7}, 'text {n % 3}')\n" for n in range(600))


@pytest.fixture(scope="package")
def bench(tmp_path_factory):
    tokenizer = make_tokenizer(384, TEXT)
    host = tiny_host(positions=1024, vocab_size=len(tokenizer))
    crouter = tiny_crouter(vocab_size=len(tokenizer))
    ids = np.array(tokenizer.encode(CODE), np.uint16)
    sets = {}
    for name in ("young", "prose"):
        rows = np.stack([ids[n * 150 : n * 150 + LENGTH] for n in range(6)])
        found = [Record(f"{name}/{n}", f"{name}{n // 2}", "code", 0.0) for n in range(6)]
        sets[name] = Windows(rows, found, {})
    return Bench(
        host, tokenizer, crouter, sets, window=SHAPE.window, batch=4, save=tmp_path_factory.mktemp("samples"),
        soft_prompts=SoftPrompts(tiny_projector(host, crouter)),
    )  # fmt: skip


@pytest.fixture
def wide(bench):
    """With a window that a question of bytes fits in."""
    return Bench(bench.host, bench.tokenizer, bench.crouter, bench.sets, 256, 4, soft_prompts=bench.soft_prompts)
