"""What other ways to shorten a KV cache lose on the documents of `eval.hgr`: four presses of kvpress, same budgets.

Runs by itself, in an environment of its own: kvpress 0.5.5 takes transformers below 5.3, hf_crouter above, so nothing
of hf_crouter is imported. kvpress, transformers 5.2.0 and tokenizers 0.22.2 are all that it needs beside torch.

A host reads `[prefix | the last n chunks | window]`; each press keeps as many positions of every layer and head as
soft prompts leave (`.at8`), or soft prompts and two retrieved chunks (`.at8_retrieve2`); the target follows at its
true positions. As a press works on what an unshortened pass has cached, one pass serves all presses and budgets.

    python -m eval.hgr.kvpress_arms --data SETS --host FOLDER --save S

Not covered: presses that decide by head, and StreamingLLM with positions closed up (kvpress: KeyRerotationPress).
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, DynamicCache

WINDOW = 512  # tokens before the target that the other arms hold raw
SETS = ("young", "files", "packages", "prose")
PRESSES: dict[str, tuple[str, str, dict[str, int]]] = {  # module, class, what is not left to its defaults
    "snapkv": ("snapkv_press", "SnapKVPress", {}),
    "snapkv_window": ("snapkv_press", "SnapKVPress", {"window_size": WINDOW}),  # keeps what the other arms hold raw
    "expected_attention": ("expected_attention_press", "ExpectedAttentionPress", {}),
    "streaming": ("streaming_llm_press", "StreamingLLMPress", {"n_sink": 4}),
    "knorm": ("knorm_press", "KnormPress", {}),
}
FULL = "full_kvpress"
DENSE = 2048  # places whose logits are held in float32 at once


class BadInput(ValueError):
    """Something to read is missing or does not fit."""


@dataclass(frozen=True)
class Layout:
    """Of a row `[prefix | chunks | window | target]`, in tokens; that of `eval.hgr`."""

    prefix: int = 4
    chunk: int = 512
    chunks: int = 8
    window: int = WINDOW
    target: int = 512
    latents: int = 8
    retrieved: int = 2

    @property
    def length(self) -> int:
        """Of a row."""
        return self.prefix + self.chunks * self.chunk + self.window + self.target

    def context(self, rows: np.ndarray, count: int) -> np.ndarray:
        """Rows `[D, length]` to what is read before the target, `[D, prefix + count · chunk + window]`."""
        end = self.length - self.target
        start = end - self.window - count * self.chunk
        return np.concatenate([rows[:, : self.prefix], rows[:, start:end]], axis=1)

    def kept(self, count: int) -> dict[str, int]:
        """Positions of each budget by what follows a method's name; one that leaves nothing out is none."""
        soft = self.prefix + count * self.latents + self.window
        with_chunks = {".at8_retrieve2": soft + self.retrieved * self.chunk} if count > self.retrieved else {}
        return {".at8": soft, **with_chunks}


def ratio(length: int, kept: int) -> float:
    """The compression ratio of which kvpress makes `int(length * (1 - ratio)) == kept`.

    Raises:
        BadInput: nothing would be left out, or nothing kept.
    """
    if not 0 < kept < length:
        raise BadInput(f"expected a budget from 1 to {length - 1} positions, got {kept}")
    return 1 - (kept + 0.5) / length  # half a position away from where rounding could tip it


def place(seed: int, name: str) -> int:
    """64 random bits of a name, as in `eval.documents`."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode("utf-8", "surrogatepass"), digest_size=8).digest())


def read_set(folder: Path, name: str, layout: Layout) -> tuple[np.ndarray, list[str]]:
    """Token ids `[D, length]` and the documents' names.

    Raises:
        BadInput: a file is missing, or the two do not fit each other.
    """
    paths = [folder / f"{name}.{ending}" for ending in ("json", "safetensors")]
    if missing := [path for path in paths if not path.is_file()]:
        raise BadInput(f"{missing[0]}: expected a file of eval.documents")
    names = [record["name"] for record in json.loads(paths[0].read_text(encoding="utf-8"))["documents"]]
    ids = load_file(paths[1])["ids"]
    if ids.shape != (len(names), layout.length):
        raise BadInput(f"{name}: expected ids of shape {(len(names), layout.length)}, got {ids.shape}")
    return ids, names


def chosen(names: Sequence[str], most: int | None, seed: int) -> np.ndarray:
    """Numbers of at most so many documents in the seeded order of `eval.hgr`."""
    return np.array(sorted(range(len(names)), key=lambda i: place(seed, names[i]))[:most], np.int64)


def losses_path(folder: Path, name: str, shard: int, shards: int) -> Path:
    """Where the losses of a set go."""
    return folder / "losses" / f"{name}.kvpress.{shard}of{shards}.safetensors"


def save_arrays(path: Path, arrays: dict[str, np.ndarray], about: dict[str, Any]) -> None:
    """Writes a safetensors file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, part, {"about": json.dumps(about)})
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def about_of(path: Path) -> dict[str, Any]:
    """What `save_arrays` noted."""
    with safe_open(path, "np") as file:
        return json.loads((file.metadata() or {}).get("about", "{}"))


def kvpress_module(name: str) -> ModuleType:
    """A module of kvpress, without the package's `__init__`: that imports every press, and datasets, fire and more.

    Raises:
        BadInput: kvpress is not installed.
    """
    if "kvpress" not in sys.modules:
        spec = importlib.util.find_spec("kvpress")
        if spec is None:
            raise BadInput("this needs kvpress: pip install kvpress==0.5.5")
        sys.modules["kvpress"] = importlib.util.module_from_spec(spec)  # not executed
    return importlib.import_module(f"kvpress.{name}")


def make_presses(length: int, budgets: dict[str, int]) -> dict[str, Any]:
    """A press of every method and budget, by `<method><budget>`.

    Args:
        length: positions that are read.
        budgets: positions to keep, as from `Layout.kept`.
    """
    presses = {}
    for method, (module, name, options) in PRESSES.items():
        press = getattr(kvpress_module(f"presses.{module}"), name)
        for ending, kept in budgets.items():
            presses[method + ending] = press(compression_ratio=ratio(length, kept), **options)
    return presses


@torch.inference_mode()
def prefill(model: Any, context: torch.Tensor, presses: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
    """Reads contexts once, and has every press shorten what each layer cached, as its own hook would.

    Args:
        model: a Llama.
        context: `[B, L]`, token ids.
        presses: by name.

    Returns:
        Logits after the last position, `[B, V]`, and a cache for each press; `FULL` is the whole one.
    """
    caches = {name: DynamicCache() for name in presses}

    def hook(module: Any, _args: Any, kwargs: dict[str, Any], output: Any) -> None:
        layer = kwargs["past_key_values"].layers[module.layer_idx]
        for name, press in presses.items():
            kept = press.compress(module, kwargs["hidden_states"], layer.keys, layer.values, output[1], kwargs)
            caches[name].update(*kept, module.layer_idx)

    handles, whole = [], DynamicCache()
    try:
        for layer in model.model.layers:
            layer.self_attn.rotary_emb = model.model.rotary_emb  # ExpectedAttention looks for it there
            handles.append(layer.self_attn.register_forward_hook(hook, with_kwargs=True))
        logits = model(context, past_key_values=whole, use_cache=True, logits_to_keep=1).logits[:, -1]
    finally:
        for handle in handles:
            handle.remove()
        for layer in model.model.layers:
            layer.self_attn._modules.pop("rotary_emb", None)
    return logits, caches | {FULL: whole}


def check_kept(cache: Any, kept: int) -> None:
    """Raises unless every layer and head holds so many positions."""
    found = {part.shape[2] for layer in cache.layers for part in (layer.keys, layer.values)}
    if found != {kept}:
        raise AssertionError(f"expected {kept} positions in every layer, got {sorted(found)}")


def dense_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Logits `[B, T, V]` and targets `[B, T]` to the sum of each row's losses, nats `[B]`, in float32."""
    parts = zip(logits.flatten(0, 1).split(DENSE), targets.flatten().split(DENSE), strict=True)
    losses = torch.cat([F.cross_entropy(part.float(), target, reduction="none") for part, target in parts])
    return losses.view(targets.shape).sum(1)


@torch.inference_mode()
def target_losses(model: Any, first: torch.Tensor, cache: Any, targets: torch.Tensor, position: int) -> torch.Tensor:
    """Loss of each row's target in nats/token, `[B]`.

    Args:
        model: that filled the cache.
        first: `[B, V]`, logits of the first target token.
        cache: shortened or not; it grows.
        targets: `[B, T]`, token ids.
        position: of the first target token, that is the length of what was read.
    """
    positions = torch.arange(position, position + targets.shape[1] - 1, device=targets.device)[None]
    read = targets[:, :-1]
    logits = model(read, past_key_values=cache, position_ids=positions.expand_as(read), use_cache=True).logits
    total = dense_losses(first[:, None], targets[:, :1]) + dense_losses(logits, targets[:, 1:])
    return total / targets.shape[1]


class Measurement:
    """Passes of a host over rows.

    Args:
        model: a Llama with sdpa attention, in the dtype that is measured.
        layout: of the rows.
        counts: of chunks.
        tokens: that are read at once.
    """

    def __init__(self, model: Any, layout: Layout, counts: Sequence[int], tokens: int = 65_536):
        self.model, self.layout, self.counts, self.tokens = model, layout, counts, tokens
        self.forwarded = 0  # tokens

    def __call__(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Losses of rows `[D, length]`, nats/token: `n<k>.<method>.<budget>` and `n<k>.full_kvpress`."""
        layout, out = self.layout, {}
        targets = torch.from_numpy(rows[:, -layout.target :].astype(np.int64)).to(self.model.device)
        for count in self.counts:
            contexts = torch.from_numpy(layout.context(rows, count).astype(np.int64)).to(self.model.device)
            length, budgets = contexts.shape[1], layout.kept(count)
            presses = make_presses(length, budgets)
            expected = {method + ending: kept for method in PRESSES for ending, kept in budgets.items()}
            expected[FULL] = length
            size = max(1, self.tokens // length)
            for context, target in zip(contexts.split(size), targets.split(size), strict=True):
                first, caches = prefill(self.model, context, presses)
                self.forwarded += context.numel()
                for name in expected:
                    cache = caches.pop(name)
                    check_kept(cache, expected[name])
                    losses = target_losses(self.model, first, cache, target, length)
                    self.forwarded += target.numel() - len(target)
                    out.setdefault(f"n{count}.{name}", []).append(losses.float().cpu().numpy())
        return {key: np.concatenate(parts) for key, parts in out.items()}


class Progress:
    """A line now and then: how far, how fast, how long still."""

    def __init__(self, what: str, total: int, measurement: Measurement):
        self.what, self.total, self.measurement = what, total, measurement
        self.start, self.before, self.said = time.monotonic(), measurement.forwarded, 0.0

    def __call__(self, done: int) -> None:
        """Prints at most every two seconds, and at the end."""
        now = time.monotonic()
        if done < self.total and now - self.said < 2:
            return
        self.said, passed = now, now - self.start
        rate = (self.measurement.forwarded - self.before) / max(passed, 1e-9)
        left = passed / max(done, 1) * (self.total - done)
        print(f"{self.what}: {done}/{self.total} documents, {rate:,.0f} tokens/s, {passed:.0f} s, {left:.0f} s left",
              flush=True)  # fmt: skip


def measure_set(measurement: Measurement, args: argparse.Namespace, name: str) -> None:
    """Measures this shard's part of a set; what is done so far is written after every block."""
    shard, shards = args.shard
    path = losses_path(args.save, name, shard, shards)
    ids, names = read_set(args.data, name, measurement.layout)
    index = chosen(names, args.documents, args.seed)[shard::shards]
    about = {"chunks": args.chunks, "seed": args.seed}
    about |= {package: importlib.metadata.version(package) for package in ("kvpress", "transformers")}
    if path.exists() and about_of(path) == about and np.array_equal(load_file(path)["documents"], index):
        print(f"{name}: done before", flush=True)
        return
    progress, parts = Progress(name, len(index), measurement), []
    for start in range(0, len(index), args.block):
        some = index[start : start + args.block]
        parts.append({"documents": some, **measurement(ids[some])})
        save_arrays(path, {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}, about)
        progress(start + len(some))
    for key in parts[0] if parts else ():
        if key != "documents":
            loss = np.concatenate([part[key] for part in parts])
            print(f"{name}.{key:32} {loss.mean():.4f} nats/token", flush=True)


def _shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    shard, shards = int(index), int(count or 1)
    if not 0 <= shard < shards:
        raise argparse.ArgumentTypeError(f"expected i/k with i from 0 to k - 1, got {text}")
    return shard, shards


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    cuda = torch.cuda.is_available()
    out = argparse.ArgumentParser(prog="python -m eval.hgr.kvpress_arms", description=(__doc__ or "").splitlines()[0])
    out.add_argument("--data", required=True, type=Path, help="folder of the sets of eval.documents")
    out.add_argument("--host", required=True, type=Path, help="folder of the model")
    out.add_argument("--save", required=True, type=Path, help="folder of the losses")
    out.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    out.add_argument("--chunks", nargs="+", type=int, choices=range(1, Layout.chunks + 1), default=[2, 4, 8])
    out.add_argument("--documents", type=int, help="of a set, at most; all by default")
    out.add_argument("--shard", type=_shard, default=(0, 1), help="i/k: this process of k that run at once")
    out.add_argument("--block", type=int, default=42 if cuda else 2, help="documents between two writes")
    out.add_argument("--tokens", type=int, default=65_536 if cuda else 8192, help="read at once")
    out.add_argument("--seed", type=int, default=0)
    return out


def run(args: argparse.Namespace) -> None:
    """Measures the sets.

    Raises:
        BadInput: something to read is missing.
    """
    kvpress_module("presses.base_press")  # say at once that it is missing
    if not (args.host / "config.json").is_file():
        raise BadInput(f"{args.host}: expected the folder of a model, found no config.json")
    for name in args.sets:
        read_set(args.data, name, Layout())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = AutoModelForCausalLM.from_pretrained(args.host, dtype=torch.bfloat16, attn_implementation="sdpa")
    measurement = Measurement(model.to(device).eval(), Layout(), args.chunks, args.tokens)
    for name in args.sets:
        measure_set(measurement, args, name)
    print(f"{measurement.forwarded:,} tokens forwarded", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Runs the measurement; exit status 2 on bad input."""
    try:
        run(parser().parse_args(argv))
    except BadInput as error:
        print(f"eval.hgr.kvpress_arms: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
