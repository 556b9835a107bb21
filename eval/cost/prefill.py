"""Compressing a text against the host's own prefill of the same tokens on the same device.

Encoding grows with the tokens, prefill also with their square. Both are timed in turns, so that a noisy machine hits
both; the ratio is the median over the turns. Absolute times count only where the device's name says what they are of.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from itertools import cycle

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval.cost.timing import long_text, seconds
from eval.results import write_result
from hf_crouter.crouter.loading import load_crouter
from hf_crouter.hosts.fetch import resolve_host
from hf_crouter.training.evaluate import reconstruction_score

TRAINED = 8192  # positions that the host was trained on
NOTES = (
    "seconds: the fastest turn; ratio: prefill seconds over encoding seconds, median over the turns. Host: "
    "SmolLM2-135M-Instruct in bfloat16, logits of the last token only; lengths over 8,192 lie beyond its trained "
    "positions and are timed all the same. encode: latents only, float32; reconstruction_nll: latents, "
    "decoder and loss."
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("--host", default="smollm2-135m")
    parser.add_argument("--crouter", default=None, help="the shipped one by default")
    parser.add_argument("--lengths", nargs="+", type=int, default=[512, 2048, 8192, 32768])
    parser.add_argument(
        "--turns", type=int, default=3, help="repetitions; the prefill of over 8,192 tokens is timed once"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--result", default="compress-cpu")


@torch.inference_mode()
def measure(host, crouter, ids: torch.Tensor, turns: int) -> dict[str, list[float]]:
    """Seconds of every turn, by what was timed; the arms take turns."""
    chunks = ids[: len(ids) // crouter.config.chunk_length * crouter.config.chunk_length]
    chunks = chunks.view(-1, crouter.config.chunk_length)
    arms: dict[str, Callable[[], object]] = {
        "encode": lambda: [crouter.encode(part) for part in chunks.split(8)],
        "reconstruction_nll": lambda: reconstruction_score(crouter, chunks, batch_size=4),
        "prefill": lambda: host(ids[None], logits_to_keep=1),
    }
    times: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(turns):
        for name, work in arms.items():
            if name != "prefill" or turn == 0 or len(ids) <= TRAINED:
                times[name].append(seconds(work))
    return times


def crossover(lengths: list[int], faster: list[float], slower: list[float]) -> float:
    """Tokens at which the arm that grows slowly becomes the cheaper one.

    Fits `a n` to the first arm and `b n + c n^2` to the second by least squares in relative error.

    Returns:
        0 where the first arm is cheaper at every length, infinity where it never is.
    """
    n = np.array(lengths, dtype=np.float64)
    line = np.array(faster) / n
    columns = np.stack([np.ones_like(n), n], 1) / (np.array(slower) / n)[:, None]
    base, slope = np.linalg.lstsq(columns, np.ones_like(n), rcond=None)[0]
    a = float(np.exp(np.log(line).mean()))
    if a <= base:
        return 0.0
    return float((a - base) / slope) if slope > 0 else float("inf")


def run(args: argparse.Namespace) -> None:
    """Measures every length, prints a line each and writes the result."""
    folder = resolve_host(args.host)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    host = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()
    crouter, _ = load_crouter(args.crouter) if args.crouter else load_crouter()
    crouter = crouter.to(device).eval()
    measure(host, crouter, long_text(AutoTokenizer.from_pretrained(folder), 1024).to(device), 1)  # warms up
    text = long_text(AutoTokenizer.from_pretrained(folder), max(args.lengths)).to(device)
    metrics: dict[str, float] = {}
    fastest: dict[str, list[float]] = {"encode": [], "reconstruction_nll": [], "prefill": []}
    for length in args.lengths:
        times = measure(host, crouter, text[:length], args.turns)
        key = f"{length // 1024}k" if length >= 1024 else str(length)
        for name, values in times.items():
            fastest[name].append(min(values))
            metrics[f"{key}.{name}.seconds"] = min(values)
        for name in ("encode", "reconstruction_nll"):
            ratios = [p / e for p, e in zip(cycle(times["prefill"]), times[name], strict=False)]
            metrics[f"{key}.{name}.ratio"] = statistics.median(ratios)
        metrics[f"{key}.prefill.turns"] = len(times["prefill"])
        print(
            key, {k.split(".", 1)[1]: round(v, 3) for k, v in metrics.items() if k.startswith(f"{key}.")}, flush=True
        )
    for name in ("encode", "reconstruction_nll"):
        point = crossover(args.lengths, fastest[name], fastest["prefill"])
        if point < float("inf"):
            metrics[f"crossover.{name}.tokens"] = point
    config = {"lengths": args.lengths, "turns": args.turns, "threads": torch.get_num_threads()}
    print(write_result(args.result, metrics, seed=args.seed, config=config, notes=NOTES))
