"""Two experts small enough to be trained in seconds: each on texts made of a few tokens of its own."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model

from hf_crouter.crouter.fingerprint import crouter_fingerprint
from hf_crouter.hosts.fingerprint import host_fingerprint
from hf_crouter.routing.adapters import AdapterStack, Lora
from hf_crouter.routing.calibration import LengthCalibration
from hf_crouter.routing.experts import Centroid, Expert, ExpertConfig, Texts, add_expert
from hf_crouter.routing.measure import measure_evidence
from hf_crouter.routing.router import token_reconstruction_nll

from ..tiny import CHUNK, tiny_crouter, tiny_host
from .test_adapters import save_adapter

DOMAINS = {"low": 10, "high": 50}  # by name: the first of the eight ids that its texts are made of
FOREIGN = 80
LENGTHS = (8, CHUNK)
TARGETS = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj", "to_latent", "from_latent", "output_proj"]


def texts(first, count, length=CHUNK, seed=0):
    """Texts of one kind, `count` of `[length]`."""
    generator = torch.Generator().manual_seed(seed)
    return list(first + torch.randint(8, (count, length), generator=generator))


def train_compressor(folder, first):
    torch.manual_seed(first)
    model = get_peft_model(tiny_crouter(), LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS))
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    for n in range(60):
        loss = model(torch.stack(texts(first, 16, LENGTHS[n % 2], seed=1000 + n))).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.save_pretrained(folder)


def save_expert(folder, first=FOREIGN, *, seed=0, trained=True, crouter=None, host=None, with_texts=True):
    """An expert in a folder of its own name."""
    crouter, host = crouter or tiny_crouter(), host or tiny_host()
    if trained:
        train_compressor(folder / "compressor", first)
    else:
        save_adapter(folder / "compressor", seed, targets=["qkv_proj"], make=tiny_crouter)
    save_adapter(folder / "host", seed)
    lora, fingerprint = Lora.load(folder / "compressor"), crouter_fingerprint(crouter, decoder=True)
    stack = AdapterStack(crouter, {"a": lora})
    costs = {n: token_reconstruction_nll(crouter, texts(first, 256, n, seed=1), stack, rows=256) for n in LENGTHS}
    stack.remove()
    reconstruction_nlls = {length: [row.mean().item() for row in rows] for length, rows in costs.items()}
    config = ExpertConfig(fingerprint, "crouter ids", "tiny", host_fingerprint(host), "host ids", {"seed": seed})
    with torch.no_grad():
        centroid = Centroid.fit(crouter.encode(torch.stack(texts(first, 64, seed=1))))
    calibration = LengthCalibration.fit(reconstruction_nlls, 256, fingerprint, lora.checksum)
    held_out = Texts({n: torch.stack(texts(first, 256, n, seed=1)).numpy() for n in LENGTHS},
                     {n: np.arange(256) // 16 for n in LENGTHS})  # fmt: skip
    expert = Expert(folder.name, lora, Lora.load(folder / "host"), calibration, config, centroid)
    expert.save_description(folder, held_out if with_texts else None)
    return folder


@functools.cache
def trained_set() -> Path:
    """Folder of the set of both experts."""
    base = Path(tempfile.mkdtemp(prefix="trained-experts-"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # far faster than many threads on matrices this small
    for seed, (name, first) in enumerate(DOMAINS.items()):
        add_expert(base / "set", save_expert(base / name, first, seed=seed))
    measure_evidence(base / "set", tiny_crouter(), rows=256)
    torch.set_num_threads(threads)
    return base / "set"
