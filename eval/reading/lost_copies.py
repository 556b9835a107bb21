"""Whether a chunk's reconstruction NLL tells which copies are lost when the archive is rebuilt from latents."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from eval.reading.bench import Bench, Scores, group
from eval.rows import Shape
from eval.statistics import auroc, clustered_interval
from hf_crouter.hosts.tokenizers import special_ids
from hf_crouter.ngram.archive import Archive


def sources(bench: Bench, ids: np.ndarray, shape: Shape, wanted: np.ndarray) -> np.ndarray:
    """For each target token the chunk that the longest match brings it from, else -1; `[target]`.

    Args:
        bench: host and tokenizer.
        ids: `[length]`.
        shape: of the row.
        wanted: `[target]`, bool; others are not looked up.
    """
    vocabulary = len(bench.tokenizer)
    archive = Archive.empty(vocabulary, special_ids(bench.tokenizer, bench.host), tail_limit=len(ids))
    past = ids[shape.prefix : shape.old]
    archive = archive.extended(past.astype(np.int64))
    found = np.full(len(wanted), -1)
    for i in np.flatnonzero(wanted):
        at = shape.split + int(i)
        match = archive.match(ids[max(0, at - 64) : at].astype(np.int64))
        hits = [int(p) for p in match.positions if past[p] == ids[at]]
        if hits:
            found[i] = hits[-1] // shape.chunk
    return found


def lost_copies(scores: Scores, sets: Sequence[str]) -> dict[str, float]:
    """Whether a chunk's reconstruction NLL says that what the host reads of it is wrong.

    Taken are the target tokens that the host gets right by copying from the true ids and wrong with the window alone,
    and whose longest match brings them from chunk c. Such a token is lost when the host errs with the archive that
    is rebuilt from the latents. The figure is the AUROC of the reconstruction NLL of chunk c for being lost; one a
    set as well (over both sets it also tells code from prose), and one by chunk (any of its tokens lost).
    """
    bench, shape = scores.bench, scores.shape
    lost: list[bool] = []
    of: list[tuple[str, int, int]] = []  # set, row, chunk
    value: dict[tuple[str, int, int], float] = {}
    with bench.samples("residual") as keep, torch.no_grad():
        for name in sets:
            windows, rows = bench.sets[name], scores.rows(name)
            window, copy, rebuilt = (scores.of(arm, name) for arm in ("window", "copy", "copy_rebuilt"))
            for d, row in enumerate(rows):
                chunk_of = sources(bench, windows.ids[row], shape, copy[d] & ~window[d])
                old = windows.ids[row][shape.prefix : shape.old].astype(np.int64)
                chunks = torch.from_numpy(old.reshape(shape.chunks, shape.chunk)).to(bench.crouter.device)
                nlls = bench.crouter(chunks).reconstruction_nll.float().tolist()
                for i in np.flatnonzero(chunk_of >= 0):
                    key = (name, row, int(chunk_of[i]))
                    of.append(key)
                    value[key] = nlls[key[2]]
                    lost.append(bool(not rebuilt[d, i]))
                    keep(
                        document=windows.records[row].name,
                        chunk=key[2],
                        reconstruction_nll=nlls[key[2]],
                        lost=lost[-1],
                    )
    labels, groups = np.array(lost, bool), [group(bench.sets[name].records[row]) for name, row, _ in of]
    metrics: dict[str, float] = {"residual.tokens": len(of), "residual.chunks": len(value)}
    if of:
        metrics["residual.lost"] = float(labels.mean())
    for name in ("", *sets):
        chosen = np.array([i for i, key in enumerate(of) if name in ("", key[0])], int)
        where = f"residual.{name}.predicts_errors" if name else "residual.predicts_errors"
        metrics |= _auroc_of(where, [value[of[i]] for i in chosen], labels[chosen], [groups[i] for i in chosen],
                             bench.seed)  # fmt: skip
    chunks_lost = dict.fromkeys(value, False)
    for key, is_lost in zip(of, lost, strict=True):
        chunks_lost[key] |= is_lost
    by_chunk = [group(bench.sets[name].records[row]) for name, row, _ in value]
    metrics |= _auroc_of("residual.predicts_errors.by_chunk", list(value.values()),
                         np.array(list(chunks_lost.values()), bool), by_chunk, bench.seed)  # fmt: skip
    return metrics


def _auroc_of(key: str, values: Sequence[float], labels: np.ndarray, groups: Sequence[str], seed: int
              ) -> dict[str, float]:  # fmt: skip
    """AUROC with its interval; nothing without both labels."""
    numbers = np.asarray(values)
    if not len(numbers) or labels.all() or not labels.any():
        return {}

    def statistic(rows: np.ndarray) -> float:
        # a draw of one label alone says nothing: it counts as chance
        return float(np.nan_to_num(auroc(numbers[rows], labels[rows]), nan=0.5))

    mean, low, high = clustered_interval(statistic, groups, seed=seed, draws=1000)
    return {f"{key}.auroc": mean, f"{key}.auroc.lo": low, f"{key}.auroc.hi": high}
