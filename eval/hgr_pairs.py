"""Which chunk is worth recalling: what each one gained on the gate sets, and how well scores tell it beforehand.

A pair is a window and one of the chunks before it. Axes: `P` pairs, `W` windows.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from hf_crouter.training.scorer import fit
from safetensors.numpy import load_file
from torch import nn

from eval.documents import Windows
from eval.hgr_files import Progress, about, about_of, blocks, chosen, save_arrays
from eval.hgr_passes import Block, DocumentReader, Layout, single_losses
from eval.statistics import clustered_interval
from hf_crouter.errors import InputError
from hf_crouter.ngram.archive import Archive
from hf_crouter.ngram.postings import ChunkIndex
from hf_crouter.ngram.scorers import FEATURES, QUERY, LearnedScorer, features

GATE_SETS = ("gate_code", "gate_prose")
TAKEN = 2  # chunks that a score chooses
FOLDS = 5
DRAWN = 128  # last tokens of which it is asked where copying would have taken them from
SIGNALS = ("draws", "attention", "latents")  # beside the features of the shipped scorer


def collect_pairs(reader: DocumentReader, args: argparse.Namespace, gate: nn.Module) -> None:
    """The target's loss with each single chunk recalled, at several splits of a gate document.

    Written to `pairs.<shard>.safetensors`: `set`, `document`, `split` (by how many chunks it is earlier), `chunk` (-1:
    none), `loss` `[P, 2]`, without and with copying, `attention` and `latents` `[P]`; `--pairs` windows at most over
    all shards, those of split 0 first.
    """
    shard, shards = args.shard
    left = -(-args.pairs // shards)
    parts: dict[str, list[np.ndarray]] = {}
    whole = reader.layout
    for split, (number, name) in itertools.product(range(whole.chunks - whole.retrieved), enumerate(GATE_SETS)):
        windows = Windows.load(args.data, name)
        index = chosen(windows.records, None, args.seed)[shard::shards][:left]
        if not len(index):
            break
        left -= len(index)
        reader.layout = whole.moved(split)
        count = reader.layout.chunks
        progress, done = Progress(f"pairs {name}, split {split}", len(index), reader), 0
        ids = windows.ids[:, : reader.layout.length]
        for block in blocks(reader, ids, index, args.block, None, [(count, "")]):
            size = len(block.rows)
            wanted = [(i, (c,)) for c in range(count) for i in range(size)]
            losses = [single_losses(reader, block, count, gate, [(i, ()) for i in range(size)])]
            losses.append(single_losses(reader, block, count, gate, wanted))
            none = np.full(size, np.nan, np.float32)
            values = {
                "set": np.full(size * (1 + count), number),
                "document": np.tile(block.index, 1 + count),
                "split": np.full(size * (1 + count), split),
                "chunk": np.repeat(np.arange(-1, count), size),
                "loss": np.concatenate(losses),
                "attention": np.concatenate([none, attention(reader, block).T.ravel()]),
                "latents": np.concatenate([none, likeness(reader, block).T.ravel()]),
            }
            for key, value in values.items():
                parts.setdefault(key, []).append(value)
            path = args.save / f"pairs.{shard}of{shards}.part.safetensors"
            arrays = {key: np.concatenate(value) for key, value in parts.items()}
            save_arrays(path, arrays, {**about(args), "layout": asdict(whole)})
            progress(done := done + size)
    reader.layout = whole
    path.rename(pairs_path(args, shard))


def pairs_path(args: argparse.Namespace, shard: int) -> Path:
    """Where a shard's pairs stand once all of them are there."""
    return args.save / f"pairs.{shard}of{args.shard[1]}.safetensors"


@torch.inference_mode()
def attention(reader: DocumentReader, block: Block, queries: int = 128) -> np.ndarray:
    """Attention of the window's last tokens to each chunk's soft prompts, over heads and layers, `[D, chunks]`."""
    layout, host, found = reader.layout, reader.host, []
    embed = host.get_input_embeddings()
    before = host.config._attn_implementation
    host.set_attn_implementation("eager")  # the others do not say what they attended to
    try:
        for start in range(0, len(block.rows), 32):
            rows = torch.from_numpy(block.rows[start : start + 32]).to(reader.device)
            soft = block.soft["own"][start : start + 32].to(embed.weight.dtype)
            parts = [embed(rows[:, : layout.prefix]), soft, embed(rows[:, layout.old : layout.split])]
            with torch.compiler.set_stance("force_eager"):  # compiled layers do not hand out what they attended to
                out = host.base_model(inputs_embeds=torch.cat(parts, dim=1), output_attentions=True, use_cache=False)
            total = torch.stack([layer[:, :, -queries:].float().mean((1, 2)) for layer in out.attentions]).mean(0)
            at = total[:, layout.prefix : layout.prefix + soft.shape[1]]
            found.append(at.unflatten(1, (layout.chunks, -1)).sum(-1).cpu().numpy())
    finally:
        host.set_attn_implementation(before)
    return np.concatenate(found)


@torch.inference_mode()
def likeness(reader: DocumentReader, block: Block) -> np.ndarray:
    """Cosine between the latents of each chunk and those of the window's last chunk of tokens, `[D, chunks]`."""
    layout = reader.layout
    recent = torch.from_numpy(block.rows[:, layout.split - min(layout.chunk, layout.window) : layout.split])
    own = reader.crouter.encode(recent.to(reader.device)).float().flatten(1)
    return torch.cosine_similarity(own[:, None], block.latents, dim=-1).cpu().numpy()


def draws(past: np.ndarray, row: np.ndarray, last: int, chunk: int) -> np.ndarray:
    """How much a row's last tokens could be copied from each chunk, `[chunks]`.

    Args:
        past: the chunks' ids, one after the other.
        row: ids up to the place of the choice.
        last: tokens that are looked at.
        chunk: tokens of a chunk.

    Returns:
        Over the tokens that the longest match before them foretold: the logarithm of its length, shared among its
        occurrences.
    """
    archive = Archive.empty(1 << 16, tail_limit=len(past)).extended(past)
    found = np.zeros(len(past) // chunk)
    for place in range(len(row) - last, len(row)):
        match = archive.match(row[max(0, place - 64) : place])
        if match.length > 1:
            right = match.positions[past[match.positions] == row[place]]
            np.add.at(found, right // chunk, np.log2(match.length) / len(match.positions))
    return found


def load_pairs(args: argparse.Namespace, signals: bool = True) -> dict[str, np.ndarray]:
    """All shards' pairs with their features: `[P, ...]` arrays, the chunks of a window together.

    Args:
        args: of the command line.
        signals: also make `signals` and `ranks`; draws take a while.

    Returns:
        `features`, `signals` (of `SIGNALS`), `ranks` (the same within a window, 0 to 1), `gains` in nats (with
        copying), `groups` (the window), `sources` (package or record).

    Raises:
        InputError: there are none.
    """
    paths = sorted(args.save.glob("pairs.*of*[0-9].safetensors"))
    if not paths:
        raise InputError(f"{args.save}: no pairs; run the stage `collect` with --pairs")
    files, layout = [load_file(path) for path in paths], Layout(**about_of(paths[0])["layout"])
    every = {key: np.concatenate([file[key] for file in files]) for key in files[0]}
    order = np.lexsort((every["chunk"], every["split"], every["document"], every["set"]))
    every = {key: values[order] for key, values in every.items()}
    sets = [Windows.load(args.data, name) for name in GATE_SETS]
    names: dict[str, int] = {}
    windows = []
    for start in np.flatnonzero(every["chunk"] == -1):
        here, texts = layout.moved(int(every["split"][start])), sets[every["set"][start]]
        document = int(every["document"][start])
        source = names.setdefault(texts.records[document].cluster, len(names))
        pairs = {key: every[key][start : start + 1 + here.chunks] for key in ("loss", "attention", "latents")}
        windows.append(_Window(here, texts.ids[document, : here.split], pairs, len(windows), source, signals))
    if args.workers and signals:
        with multiprocessing.get_context("fork").Pool(args.workers) as pool:
            parts = pool.map(_pairs_of, windows, chunksize=16)
    else:
        parts = [_pairs_of(window) for window in windows]
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


class _Window(NamedTuple):
    """One window's place of choice: its row up to there, and what was measured of no chunk and of each."""

    layout: Layout
    row: np.ndarray
    measured: dict[str, np.ndarray]
    group: int
    source: int
    signals: bool


def _pairs_of(window: _Window) -> dict[str, np.ndarray]:
    layout, row, measured = window.layout, window.row.astype(np.int64), window.measured
    past = layout.past(row, layout.chunks)
    index = ChunkIndex().extended(*past.reshape(layout.chunks, layout.chunk))
    found = {
        "features": features(index, row[layout.old :][-QUERY:]),
        "gains": measured["loss"][0, 1] - measured["loss"][1:, 1],
        "groups": np.full(layout.chunks, window.group),
        "sources": np.full(layout.chunks, window.source),
    }
    if window.signals:
        drawn = draws(past, row, min(DRAWN, layout.window), layout.chunk)
        signals = [drawn, measured["attention"][1:], measured["latents"][1:]]
        found["signals"] = np.stack(signals, 1)
        found["ranks"] = np.stack([_ranks(signal) for signal in signals], 1)
    return found


def _ranks(values: np.ndarray) -> np.ndarray:
    return values.argsort(kind="stable").argsort() / max(len(values) - 1, 1)


def fit_scorer(pairs: dict[str, np.ndarray], seed: int) -> LearnedScorer:
    """The scorer that `retrieve2_learned` uses."""
    return fit(pairs["features"], pairs["gains"], pairs["groups"], sources=pairs["sources"], k=TAKEN, seed=seed,
               training={"sets": list(GATE_SETS)})  # fmt: skip


def compare(pairs: dict[str, np.ndarray], seed: int, draws_of: int = 1000) -> dict[str, float]:
    """How much of what the best two chunks gain each score's two gain: `pairs.<score>.share` with its interval.

    Gains are those of single chunks. Learned scores choose in windows of sources that they were not fitted on; the
    second one also sees draws, the host's attention to soft prompts, and latents.
    """
    gains, groups, sources = pairs["gains"].astype(np.float64), pairs["groups"], pairs["sources"]
    columns = {name: pairs["features"][:, FEATURES.index(name)] for name in ("bm25_128", "bm25_512", "recency")}
    columns |= {name: pairs["signals"][:, n] for n, name in enumerate(SIGNALS)}
    columns["random"] = np.random.default_rng(seed).random(len(gains))
    columns["best"] = gains
    fold = np.random.default_rng(seed).permutation(int(sources.max()) + 1) % FOLDS
    for name, inputs, names in (
        ("learned", pairs["features"], FEATURES),
        ("learned_all", np.concatenate([pairs["features"], pairs["ranks"]], 1), (*FEATURES, *SIGNALS)),
    ):
        columns[name] = np.zeros(len(gains))
        for part in range(FOLDS):
            out = fold[sources] == part
            options: dict[str, Any] = {"sources": sources[~out], "k": TAKEN, "seed": seed, "names": names}
            scorer = fit(inputs[~out], gains[~out], groups[~out], **options)
            with torch.no_grad():
                columns[name][out] = scorer(torch.from_numpy(inputs[out].astype(np.float32))).double().numpy()
    first = np.unique(groups, return_index=True)[1]
    ends = [*first[1:], len(groups)]
    best = np.array([np.sort(gains[a:b])[-TAKEN:].sum() for a, b in zip(first, ends, strict=True)])
    of = [str(source) for source in sources[first]]
    found: dict[str, float] = {"pairs.pairs": len(gains), "pairs.windows": len(first)}
    for name, scores in columns.items():
        taken = np.array([gains[a:b][scores[a:b].argsort(kind="stable")[-TAKEN:]].sum()
                          for a, b in zip(first, ends, strict=True)])  # fmt: skip

        def share(rows: Sequence[int] | np.ndarray, taken: np.ndarray = taken) -> float:
            return float(taken[rows].sum() / best[rows].sum())

        value, low, high = clustered_interval(share, of, seed=seed, draws=draws_of)
        found |= {f"pairs.{name}.share": value, f"pairs.{name}.share.lo": low, f"pairs.{name}.share.hi": high}
    return found
