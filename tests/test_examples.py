"""Every example runs offline and prints what its docstring says."""

import ast
import graphlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NUMBER = r"\d+\.\d+"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # other work on the machine may slow them down


def run(name, folder, *words):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "examples" / name), *map(str, words)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=580,
                          stdin=subprocess.DEVNULL)  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Traceback" not in done.stderr
    return done.stdout


def test_examples_are_numbered_short_and_say_what_comes_out():
    assert [path.name[:3] for path in EXAMPLES] == [f"{k:02}_" for k in range(1, len(EXAMPLES) + 1)]
    tested = Path(__file__).read_text(encoding="utf-8")
    for path in EXAMPLES:
        source = path.read_text(encoding="utf-8")
        assert 30 <= source.count("\n") <= 80, path.name
        docstring = ast.get_docstring(ast.parse(source))
        assert "What comes out: " in docstring and f"python examples/{path.name}" in docstring, path.name
        assert f'run("{path.name}"' in tested, f"{path.name} is not tested"


@pytest.mark.host
def test_read_a_long_file(tmp_path):
    out = run("01_read_a_long_file.py", tmp_path, graphlib.__file__)
    end, continuation, truth, report = re.split(r"^--- .*$", out, flags=re.MULTILINE)[1:]
    assert end.strip() and continuation.strip() and truth.strip()
    source = Path(graphlib.__file__).read_text(encoding="utf-8")
    assert source.endswith(end.removeprefix("\n").removesuffix("\n") + truth.removeprefix("\n").removesuffix("\n"))
    slots = r"\((\d+) prefix, (\d+) entries, (\d+) retrieved, (\d+) raw window\)"
    prefix, entries, retrieved, raw = map(int, re.search(slots, report).groups())
    chunks = re.findall(rf"^ +0 +\d+ +\d+-\d+ +512 +{NUMBER} +\d+% +\d+$", report, flags=re.MULTILINE)
    assert len(chunks) >= 2 and entries == 8 * len(chunks) and retrieved == 1024 and raw >= 512
    kv = report[report.index("KV: ") :]
    used, full = (int(word.replace(",", "")) for word in re.findall(r"([\d,]+) (?:bytes|for the full)", kv))
    assert used < full


def test_compress_and_restore(tmp_path):
    out = run("02_compress_and_restore.py", tmp_path)
    shares = [float(s) for s in re.findall(rf"^ +\d+ +\d+ +{NUMBER} +({NUMBER})%$", out, flags=re.MULTILINE)]
    assert len(shares) >= 4 and min(shares) > 80
    assert f"-> {8 * len(shares)} latents of 512 numbers" in out
    places = re.search(r"first differ at character ([\d,]+) of ([\d,]+), in line (\d+):", out)
    if not places:
        assert "character by character" in out
        return
    original, rebuilt = (ast.literal_eval(line) for line in re.findall(r"^  (?:original|rebuilt): +(.*)$", out, re.M))
    assert original != rebuilt and original[:40] == rebuilt[:40]
    assert original in Path(graphlib.__file__).read_text(encoding="utf-8")


def test_what_can_be_rebuilt(tmp_path):
    out = run("03_what_can_be_rebuilt.py", tmp_path)
    found = re.findall(rf"^(\w+ \w+) +\d +{NUMBER} +{NUMBER}% +(\w+)$", out, flags=re.MULTILINE)
    assert [name for name, _ in found] == ["Python code"] * 4 + ["English prose"] * 4 + ["random ids"] * 4
    assert {grade for name, grade in found if name == "random ids"} == {"foreign"}
    code, prose, random = (float(nats) for nats in re.findall(NUMBER, out.splitlines()[-1]))
    assert code < prose < random / 5


def test_your_own_crouter(tmp_path):
    out = run("04_your_own_crouter.py", tmp_path, tmp_path / "own")
    rising = [float(s) for s in re.findall(rf"\d s ({NUMBER})%", out)]
    assert len(rising) >= 2 and rising[-1] > 2 * rising[0]
    held_out = float(re.search(rf"held-out files: ({NUMBER})%", out)[1])
    assert held_out > 80  # the most frequent token alone gives about 4%
    assert "the first of them:" in out and "rebuilt from latents:" in out
    assert (tmp_path / "own" / "crouter" / "model.safetensors.index.json").exists() or (
        tmp_path / "own" / "crouter" / "model.safetensors"
    ).exists()


def test_autoload_without_the_package(tmp_path):
    out = run("05_autoload_without_the_package.py", tmp_path)
    assert out.splitlines()[:2] == [
        "hf_crouter cannot be imported here",
        "loaded CRouterModel from transformers_modules",
    ]
    assert "latents: (1, 8, 512)" in out
    assert out.endswith("rebuilt from them:\ndef area(width, height):\n    return width * height\n\n")


@pytest.mark.host
def test_ways_to_read(tmp_path):
    out = run("06_ways_to_read.py", tmp_path, graphlib.__file__)
    losses = [float(line.split("loss ")[1].split()[0]) for line in out.splitlines() if "  loss " in line]
    assert len(losses) == 6 and len(set(losses)) == 6 and all(0 < loss < 5 for loss in losses)
    assert "what was retrieved:" in out and "chunk " in out


def test_mount_an_expert(tmp_path):
    out = run("07_mount_an_expert.py", tmp_path)
    one, both, borders = re.findall(r"^  ([.pw]+)$", out, flags=re.MULTILINE)
    assert len(one) == len(both) and set(one) == {"p", "."} and set(both) == {"p", "w", "."}
    assert all(a == "p" for a, b in zip(one, both, strict=True) if b == "p")
    assert both[0] == "p" and "w" in borders
    spans = re.findall(r"^  tokens (\d+)-(\d+): (python|wiki_en|plain host) \((?:known|overlap|unknown|short)\)$", out,
                       flags=re.MULTILINE)  # fmt: skip
    assert len(spans) >= 3 and all(a[1] == b[0] for a, b in zip(spans, spans[1:], strict=False))
    assert {"python", "wiki_en"} <= {name for _, _, name in spans}
