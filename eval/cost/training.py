"""Throughput of stage 1 on a GPU, as model FLOPs utilisation (MFU), for several shapes in one run."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from eval.results import write_result
from hf_crouter import CRouterConfig, CRouterModel, InputError
from hf_crouter.training.flops import matrix_flops_per_token, measured_matrix_rate
from hf_crouter.training.optim import build_optimizers
from hf_crouter.training.reconstruct import ReconstructionLoss

SHAPES = {
    "mini": CRouterConfig(embedding_size=96, hidden_size=448, intermediate_size=960, num_attention_heads=7,
                          num_encoder_loops=2, num_decoder_loops=2),
    "deep": CRouterConfig(num_encoder_loops=3, num_decoder_loops=3),
    "wide": CRouterConfig(embedding_size=512, hidden_size=512, intermediate_size=1408, num_attention_heads=8,
                          num_encoder_layers=6, num_decoder_layers=6),
}  # fmt: skip
WARM_UP, TIMED = 5, 30


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[64])
    parser.add_argument("--compile-mode", default="default", help="mode of torch.compile")
    parser.add_argument("--profile", metavar="FILE", help="also write a table of the kernels of three steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--result", default="training-gpu")


def run(args: argparse.Namespace) -> None:
    """Times full training steps (forward, backward, clip, both optimisers) on random full chunks."""
    if not torch.cuda.is_available():
        raise InputError("training throughput: expected a CUDA device, got none")
    device = torch.device("cuda")
    rate = measured_matrix_rate(device)
    metrics: dict[str, float] = {"matrix.flops_per_second": rate}
    for name in args.shapes:
        for batch in args.batch_sizes:
            torch.manual_seed(args.seed)
            torch._dynamo.reset()
            config = SHAPES[name]
            step = training_step(config, batch, device, args.compile_mode)
            for _ in range(WARM_UP):
                step()
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(TIMED):
                step()
            torch.cuda.synchronize()
            tokens = batch * config.chunk_length * TIMED / (time.perf_counter() - start)
            key = f"{name}.b{batch}"
            metrics[f"{key}.tokens_per_second"] = tokens
            metrics[f"{key}.mfu"] = matrix_flops_per_token(config) * tokens / rate
            print(f"{key:12s} {tokens:12,.0f} tokens/s  MFU {metrics[f'{key}.mfu']:.1%}", flush=True)
            if args.profile:
                profile(step, Path(args.profile).with_suffix(f".{key}.txt"))
    config = {
        "shapes": args.shapes,
        "batch_sizes": args.batch_sizes,
        "chunk_length": 512,
        "compile": args.compile_mode,
    }
    print(write_result(args.result, metrics, seed=args.seed, config=config, notes="bf16 autocast, torch.compile."))


def training_step(config: CRouterConfig, batch: int, device: torch.device, mode: str = "default"):
    """A function that does one whole optimiser step on the same random full chunks."""
    module = ReconstructionLoss(CRouterModel(config)).to(device)
    optimizers = build_optimizers(module, 1e-3)
    compiled = torch.compile(module, dynamic=False, mode=mode)
    ids = torch.randint(0, config.vocab_size, (batch, config.chunk_length), device=device)
    mask = torch.ones_like(ids, dtype=torch.bool)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = compiled(ids, mask)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def profile(step, path: Path) -> None:
    """Writes the kernels of three steps, by their time on the device."""
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as recorded:
        for _ in range(3):
            step()
        torch.cuda.synchronize()
    table = recorded.key_averages().table(sort_by="cuda_time_total", row_limit=40, max_name_column_width=80)
    path.write_text(table)
