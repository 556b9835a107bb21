"""What soft prompts alone give a frozen host: loss beside forgetting, full history and another file's latents.

Layout as in DESIGN's HGR: one window a document, a raw window of 512, n older chunks, the next 512 tokens predicted.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from eval.results import write_result
from eval.statistics import clustered_interval
from hf_crouter import CompressedHistory
from hf_crouter.data.tokens import TokenArray
from hf_crouter.loading import load_crouter, load_host

KEEP_FIRST = 4
NOTES = (
    "Host: SmolLM2-135M-Instruct, 4-bit weights in bf16. hgr: share of what full history is worth over the window; "
    "intervals: paired bootstrap clustered by package; shuffled: the older chunks of another document."
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("--host", required=True)
    parser.add_argument("--crouter", required=True)
    parser.add_argument("--data", required=True, help="folder of the prepared corpus with the crouter's split")
    parser.add_argument("--parts", nargs="+", default=["files", "packages"])
    parser.add_argument("--chunks", nargs="+", type=int, default=[2, 4, 8])
    parser.add_argument("--documents", type=int, default=300, help="documents a part, at most")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--target", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--result", default="soft-mini")


@torch.inference_mode()
def full_losses(host: torch.nn.Module, ids: torch.Tensor, last: int) -> torch.Tensor:
    """Loss `[B]`, nats/token, of the last tokens with the whole raw history."""
    logits = host(ids[:, :-1], logits_to_keep=last, use_cache=False).logits.float()
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, -last:], reduction="none").mean(-1)


def measure(host, crouter, ids: np.ndarray, args: argparse.Namespace, chunks: int) -> dict[str, np.ndarray]:
    """Losses `[documents]` of every arm on windows `[documents, L]`."""
    options = {"keep_first": KEEP_FIRST}
    slots = chunks * crouter.config.num_latents
    arms = {
        "window": lambda: CompressedHistory(host, None, window=args.window, soft=False, **options),
        "recent_same_slots": lambda: CompressedHistory(host, None, window=args.window + slots, soft=False, **options),
        "soft": lambda: CompressedHistory(host, crouter, window=args.window, **options),
    }
    losses: dict[str, list[np.ndarray]] = {name: [] for name in [*arms, "shuffled", "full"]}
    for start in range(0, len(ids) - args.batch_size + 1, args.batch_size):
        rows = torch.from_numpy(ids[start : start + args.batch_size]).to(host.device)
        for name, make in arms.items():
            history = make()
            losses[name].append(-history.score(rows, last=args.target).mean(-1).cpu().numpy())
            if name == "soft":
                losses["shuffled"].append(
                    -history.score(other_past(rows, args), last=args.target).mean(-1).cpu().numpy()
                )
            history.detach()
        losses["full"].append(full_losses(host, rows, args.target).cpu().numpy())
    return {name: np.concatenate(values) for name, values in losses.items()}


def other_past(rows: torch.Tensor, args: argparse.Namespace) -> torch.Tensor:
    """Rows `[B, L]` whose older chunks are the neighbour's: sinks, window and target stay the row's own."""
    mixed, recent = rows.roll(1, 0), args.window + args.target
    mixed[:, :KEEP_FIRST], mixed[:, -recent:] = rows[:, :KEEP_FIRST], rows[:, -recent:]
    return mixed


def run(args: argparse.Namespace) -> None:
    """Measures every part and chunk count, prints a line each and writes the result."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    host = load_host(args.host, dtype=torch.bfloat16)[0].to(device)
    crouter = load_crouter(args.crouter)[0].to(device)
    metrics: dict[str, float] = {}
    for part in args.parts:
        tokens = TokenArray.load(Path(args.data) / f"{part}.safetensors")
        for chunks in args.chunks:
            length = KEEP_FIRST + chunks * crouter.config.chunk_length + args.window + args.target
            ids, chosen = tokens.document_windows(length, args.seed, args.documents)
            # neighbours then mostly are of one package: the shuffled arm's harder donors
            chosen = chosen[order := np.argsort([tokens.groups[i] for i in chosen], kind="stable")]
            ids = ids[order]
            losses = measure(host, crouter, ids, args, chunks)
            groups = [tokens.groups[i] for i in chosen[: len(losses["full"])]]
            key = f"{part}.n{chunks}"
            metrics[f"{key}.documents"] = len(groups)
            metrics |= {f"{key}.loss.{name}": float(values.mean()) for name, values in losses.items()}

            def gain(rows: np.ndarray, arm: str, base: str = "window", losses=losses) -> float:
                worth = (losses["window"][rows] - losses["full"][rows]).mean()
                return float((losses[base][rows] - losses[arm][rows]).mean() / worth)

            for name, arm, base in (("soft.hgr", "soft", "window"), ("shuffled.hgr", "shuffled", "window"),
                                    ("recent_same_slots.hgr", "recent_same_slots", "window"),
                                    ("soft_minus_shuffled.hgr", "soft", "shuffled")):  # fmt: skip
                value, low, high = clustered_interval(
                    lambda rows, arm=arm, base=base: gain(rows, arm, base), groups, seed=args.seed
                )
                metrics |= {f"{key}.{name}": value, f"{key}.{name}.lo": low, f"{key}.{name}.hi": high}
            print(key, {k.split(".", 2)[2]: round(v, 4) for k, v in metrics.items() if k.startswith(key)}, flush=True)
    config = {"window": args.window, "target": args.target, "keep_first": KEEP_FIRST, "chunks": args.chunks}
    print(write_result(args.result, metrics, seed=args.seed, config=config, notes=NOTES))
