"""What a decision costs by the number of experts, and what a change of the host's adapter does."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from eval.routing.setting import Arrays, Setting
from hf_crouter.routing.adapters import AdapterStack, Lora
from hf_crouter.routing.experts import ExpertSet
from hf_crouter.routing.profile import Profile
from hf_crouter.routing.router import Router
from hf_crouter.training.flops import matrix_flops_per_token

SIZES = (2, 8, 32)


def now() -> float:
    """Seconds of a clock, after everything that the accelerator was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def switch_ms(host: Any, experts: ExpertSet, ids: np.ndarray, repeats: int = 50) -> Arrays:
    """Milliseconds of choosing another adapter of the host, and of reading a window `[1, T]` anew under it."""
    batch = torch.from_numpy(ids.astype(np.int64)).to(host.device)
    times: dict[str, list[float]] = {"switch": [], "recompute": []}
    stack = AdapterStack(host, {e.name: e.host for e in experts})
    try:
        for repeat in range(repeats):
            began = now()
            stack.activate([repeat % len(stack)])
            times["switch"].append(1000 * (now() - began))
            if repeat < 10:
                began = now()
                with torch.no_grad():
                    host(input_ids=batch, use_cache=True, logits_to_keep=1)
                times["recompute"].append(1000 * (now() - began))
    finally:
        stack.remove()
    return {f"{name}.ms": np.array([np.median(some)]) for name, some in times.items()}


def noisy(experts: ExpertSet, count: int, seed: int) -> ExpertSet:
    """So many experts: copies of those there are, with noise on their weights."""
    generator = torch.Generator().manual_seed(seed)
    found, among = [], tuple(experts.experts[i % len(experts)].compressor.checksum for i in range(count))
    profile = Profile(among, (), {}, {}, {}, {})  # says nothing, but the crouter alone is asked as for a real one
    for i in range(count):
        expert = experts.experts[i % len(experts)]
        down, up = (
            {k: v + 0.01 * v.std() * torch.randn(v.shape, generator=generator) for k, v in part.items()}
            for part in (expert.compressor.down, expert.compressor.up)
        )
        copy = Lora(down, up, expert.compressor.checksum)
        found.append(replace(expert, name=f"copy{i}", compressor=copy, profile=profile))
    return ExpertSet(tuple(found))


def measure_latency(crouter: Any, host: Any, experts: ExpertSet, setting: Setting, repeats: int = 5) -> Arrays:
    """Milliseconds and FLOPs a chunk for 2, 8 and 32 experts, with and without a shortlist of two; of a switch."""
    found = switch_ms(host, experts, setting.windows.ids[:1, : setting.chunk])
    pieces = [torch.from_numpy(row.astype(np.int64)) for row in setting.chunks[:32]]
    flops = matrix_flops_per_token(crouter.config, backward=False) * setting.chunk
    encoding = 2.0 * setting.chunk * _encoder_products(crouter.config)
    for count in SIZES:
        several = noisy(experts, count, setting.seed)
        lora = 2.0 * setting.chunk * sum(v.numel() for part in (several.experts[0].compressor.down,
                                         several.experts[0].compressor.up) for v in part.values())  # fmt: skip
        for top_k_experts in (0, 2):
            if top_k_experts >= count:
                continue
            router = Router(crouter, several, top_k_experts=top_k_experts, rows=setting.rows)
            router.reconstruction_nlls(pieces[:2])
            times: dict[str, list[float]] = {"one": [], "many": []}
            for _ in range(repeats):
                for name, some in (("one", pieces[:1]), ("many", pieces)):
                    began = now()
                    router.reconstruction_nlls(some)
                    times[name].append(1000 * (now() - began) / len(some))
            key = f"{count}.{'shortlist' if top_k_experts else 'all'}"
            found[f"{key}.ms"] = np.array([np.median(times["one"])])
            found[f"{key}.ms_batched"] = np.array([np.median(times["many"])])
            scored = top_k_experts or count
            besides = encoding if top_k_experts else flops  # the crouter alone
            found[f"{key}.flops"] = np.array([scored * (flops + lora) + besides])
            router.remove()
    return found


def _encoder_products(config: Any) -> float:
    """Multiplications a token in the encoder's layers, counted as `matrix_flops_per_token` does."""
    layer = 4 * config.hidden_size**2 + 3 * config.hidden_size * config.intermediate_size
    layer += 2 * config.chunk_length * config.hidden_size
    return float(config.num_encoder_layers * config.num_encoder_loops * layer)
