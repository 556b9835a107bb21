"""A bench in miniature."""

import numpy as np
import pytest

from eval.arms import Reader
from eval.reading.bench import Bench
from eval.rows import Record, Rows, Shape, breaks_lines, line_numbers
from hf_crouter.chunking import tokenizer_fingerprint
from hf_crouter.ngram.gate import general_gate
from tests.tiny import CHUNK, tiny_crouter, tiny_host, tiny_projector
from tests.trained_crouter import TEXT, make_tokenizer

SHAPE = Shape(prefix=4, chunk=CHUNK, chunks=4, window=32, target=160)
LENGTH = SHAPE.length
CODE = "".join(f"name_{n} = call_{n % 5}(value_{n % 7}, 'text {n % 3}')\n" for n in range(600))


@pytest.fixture(scope="package")
def bench(tmp_path_factory):
    tokenizer = make_tokenizer(384, TEXT)
    host = tiny_host(positions=1024, vocab_size=len(tokenizer))
    crouter = tiny_crouter(vocab_size=len(tokenizer))
    ids, breaks = np.array(tokenizer.encode(CODE), np.uint32), breaks_lines(tokenizer)
    sets = {}
    for name in ("young", "prose"):
        rows = np.stack([ids[n * 150 : n * 150 + LENGTH] for n in range(6)])
        lines = np.stack([line_numbers(row[SHAPE.split :], breaks) for row in rows])
        found = [Record(f"{name}/{n}", f"{name}{n // 2}", "code", 0.0) for n in range(6)]
        sets[name] = Rows(rows, lines, found, SHAPE, tokenizer_fingerprint(tokenizer), {})
    gate = general_gate()  # as if it were fitted: it copies more
    gate.down.bias.data[0] -= 4.0
    reader = Reader(host, tokenizer, crouter, gate, SHAPE.window, projector=tiny_projector(host, crouter))
    return Bench(reader, sets, batch=4, save=tmp_path_factory.mktemp("samples"))


@pytest.fixture
def wide(bench):
    """With a window that a question of bytes fits in."""
    reader = bench.reader
    return Bench(
        Reader(reader.host, reader.tokenizer, reader.crouter, reader.gate, 256, projector=reader.projector),
        bench.sets, 4,
    )  # fmt: skip


def write_these(monkeypatch, bench, module, maker, rows_of):
    """Has the bench write given ids after the prompts that a module makes, the n-th after the n-th; gives the prompts.

    Args:
        monkeypatch: of the test.
        bench: whose `generate` is replaced.
        module: of the experiment.
        maker: name of its function that makes a prompt.
        rows_of: gives the ids to write, a tuple a prompt, from the prompts.
    """
    made, make = [], getattr(module, maker)
    monkeypatch.setattr(module, maker, lambda *args: made.append(make(*args)) or made[-1])

    def generate(arm, ids, count):
        known = {sample.ids.tobytes(): n for n, sample in enumerate(made)}
        rows = [rows_of(made)[n] for n in (known[row.tobytes()] for row in ids)]
        return np.array([[*row, *[-1] * count][:count] for row in rows])

    monkeypatch.setattr(bench, "generate", generate)
    return made
