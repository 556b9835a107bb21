"""What compaction costs beside the host's own read, and what it saves: first token, memory, decoding; batch 1.

All ways take turns in one process, after a turn that warms up and tells peaks of memory; figures are medians over the
turns. Compaction is the difference, turn by turn, between reads that choose pairs and reads that keep as many of the
first at no cost. The result is written after each part.
"""

from __future__ import annotations

import argparse
import copy
import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from eval.cost.prefill import seconds
from eval.results import host_key, host_note, write_result
from hf_crouter import Compact, CompressedHistory, Retrieve
from hf_crouter.cache.kv_cache import CompressedDynamicCache
from hf_crouter.cache.policy import ContextPolicy
from hf_crouter.cache.reads import block_tokens, pairs_by_reading
from hf_crouter.compressors.compact import PairSelector, first_pairs
from hf_crouter.hosts.loading import load_host
from hf_crouter.types import LayerRead, Pairs, Row
from hf_crouter.utils.progress import Progress

PIECE, CHUNK, WINDOW, PREFIX, SLOTS = 2048, 512, 512, 4, 64
GIB = 2**30
FULL = "full_"
WAYS: dict[str, tuple[Any, ...]] = {  # by what their keys begin with
    "": (Retrieve(2),),
    "compact_": (Compact(SLOTS),),
    "mix_": (Compact(), Retrieve(2)),
}
NOTES = (
    "Batch 1, bfloat16, random ids, medians over turns that the ways take one after the other. <host>.<length>.b1: "
    "keys without a way are of Retrieve(2), compact_ of Compact(64), mix_ of the defaults Compact(32) and "
    "Retrieve(2), full_ of the host's own read in pieces of 2,048 tokens, full_once_ in one piece. ttft_seconds: to"
    " the first token, ttft_speedup: full_ over it; peak_gib: most that the allocator held over the weights; "
    "kv_ratio: tokens over slots at the end of the prompt; compact_bound_gib: pairs, two blocks and the raw part by"
    " their shapes, beside which stand a forward's own activations (activations_gib: of 2,048 tokens without a "
    "cache); decode_ms: a token, decode_longest_ms: the slowest one, in which a chunk leaves. compact.ms: what "
    "choosing pairs adds to a 512-token chunk of a prompt, compact.read_ms: the rest of its read, "
    "compact.cost_ratio: the one over the other; compact.plain_ms: the plain host reads the same tokens over the "
    "full past, compact.plain_cost_ratio: beside it. compact.decode_*: the same of one chunk that leaves while "
    "decoding and the window behind it, over the pairs of what came before. Lengths beyond the trained positions "
    "are timed at true positions all the same."
)


class FirstPairs(PairSelector):
    """Keeps the first pairs of each chunk: as many as a selector would, at no cost."""

    def compress(self, read: LayerRead, observed: Any) -> tuple[Pairs | None, None]:
        """The first pairs of each chunk."""
        return first_pairs(read, self.most_by_layer[read.layer]) if read.chunks else None, None


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("--host", default="qwen2.5-coder-1.5b", help="known name, folder or hub name")
    parser.add_argument("--lengths", nargs="+", type=int, default=[8192, 32768, 131072], help="tokens of a prompt")
    parser.add_argument("--read", type=int, default=8192, help="tokens that leave while a prompt is read")
    parser.add_argument("--history", type=int, default=16384, help="tokens behind a chunk that leaves while decoding")
    parser.add_argument("--decode", type=int, default=32768, help="tokens of the prompt before decoding")
    parser.add_argument("--steps", type=int, default=64, help="tokens that are decoded")
    parser.add_argument("--turns", type=int, default=5, help="of which the median is taken; of long prompts fewer, 2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--result", help="generation-gpu, or generation-cpu without a GPU, by default")


def in_turns(
    works: Mapping[str, Callable[[], Callable[[], object]]], turns: int, progress: Progress
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of every turn and peaks in GiB, by what was timed.

    Args:
        works: each makes ready, untimed, what is then timed.
        turns: after one that warms up and whose peak is taken.
        progress: is told of each run.
    """
    times: dict[str, list[float]] = {name: [] for name in works}
    peaks = {}
    for turn in range(turns + 1):
        for name, ready in works.items():
            work = ready()
            if turn:
                times[name].append(seconds(work))
            else:
                peaks[name] = peak_gib(work)
            progress.advance()
    return times, peaks


def peak_gib(work: Callable[[], object]) -> float:
    """GiB that the allocator held at most over what stood there before; not a number without a GPU."""
    if not torch.cuda.is_available():
        work()
        return math.nan
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / GIB


def reading(host: Any, policy: ContextPolicy, ids: torch.Tensor, known: int = 0) -> Callable[[], Callable[[], Any]]:
    """Makes ready to read the chunks of a row `[T]` that its first `known` tokens do not call for yet.

    What is timed gives the row with their entries.
    """
    cache = CompressedDynamicCache(config=host.config.get_text_config(decoder=True))
    cache.start([Row(0, prompt=len(ids))], ids[None], policy.key)
    if known:
        row = policy.extend(cache.rows[0], ids[:known])
        cache.rows = tuple(pairs_by_reading(host, policy, cache, [row], [ids[:known]]))
    wanted = policy.extend(cache.rows[0], ids)

    def ready() -> Callable[[], Row]:
        fresh = copy.deepcopy(cache)
        return lambda: pairs_by_reading(host, policy, fresh, [wanted], [ids])[0]

    return ready


@torch.no_grad()
def read_plain(host: Any, ids: torch.Tensor, piece: int = PIECE) -> DynamicCache:
    """The host's own prefill of a row `[T]` in pieces; gives its cache."""
    cache = DynamicCache(config=host.config.get_text_config(decoder=True))
    for part in ids.split(piece):
        host(part[None], past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def cost(host: Any, policy: ContextPolicy, ids: torch.Tensor, args: Any, progress: Progress) -> dict[str, float]:
    """Milliseconds of compaction a chunk beside its read, in a prompt and while decoding.

    Args:
        host: the plain host.
        policy: of a history that compacts.
        ids: `[T]`.
        args: `read`, `history`, `turns`.
        progress: is told.
    """
    selector: Any = policy.compressor
    ways = {"chosen": policy, "first": replace(policy, compressor=FirstPairs(selector.most_by_layer, selector.size))}
    prompt, known = ids[: PREFIX + args.read + WINDOW], PREFIX + args.history + WINDOW
    works = {name: reading(host, way, prompt) for name, way in ways.items()}
    works["plain"] = lambda: (
        lambda: read_plain(host, prompt[: PREFIX + args.read], block_tokens(host, selector, args.read))
    )
    works |= {f"decode.{name}": reading(host, way, ids[: known + CHUNK], known) for name, way in ways.items()}
    progress.start("compaction", len(works) * (args.turns + 1), "runs")
    times, _ = in_turns(works, args.turns, progress)
    progress.finish()
    found = {"compact.plain_ms": 1000 * statistics.median(times["plain"]) / (args.read // CHUNK)}
    for key, chunks in (("", args.read // CHUNK), ("decode.", 1)):
        own, name = statistics.median(times[f"{key}first"]), key.replace(".", "_")
        more = statistics.median(a - b for a, b in zip(times[f"{key}chosen"], times[f"{key}first"], strict=True))
        found |= {
            f"compact.{name}ms": 1000 * more / chunks,
            f"compact.{name}read_ms": 1000 * own / chunks,
            f"compact.{name}cost_ratio": more / own,
        }
    return found | {"compact.plain_cost_ratio": found["compact.ms"] / found["compact.plain_ms"]}


def generated(host: Any, history: Any, ids: torch.Tensor, new: int, **options: Any) -> None:
    """Greedy generation of so many tokens after a prompt `[T]`."""
    host.generate(ids[None], attention_mask=torch.ones_like(ids[None]), max_new_tokens=new, do_sample=False,
                  pad_token_id=0, logits_processor=[history] if history is not None else [], **options)  # fmt: skip


def bound_gib(host: Any, history: CompressedHistory) -> float:
    """GiB of a row's pairs, two blocks and its raw part after the latest call, by their shapes."""
    config, report = host.config.get_text_config(decoder=True), history.report(measure=False)
    selector = history.policy.compressor
    assert isinstance(selector, PairSelector)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    left = sum(chunk.end - chunk.start for chunk in report.chunks)
    raw = 2 * block_tokens(host, selector, left) + report.rows[0].prefix + report.rows[0].raw
    pairs = sum(selector.most_by_layer) * len(report.chunks) + config.num_hidden_layers * raw
    return 2 * heads * size * host.dtype.itemsize * pairs / GIB


def savings(
    host: Any, histories: Mapping[str, CompressedHistory], ids: torch.Tensor, turns: int, progress: Progress
) -> dict[str, float]:
    """First token, memory and slots after a prompt `[T]`, by what is in the result's keys."""

    def first_token(history: CompressedHistory) -> Callable[[], Callable[[], None]]:
        return lambda: lambda: generated(host, history, ids, 1)

    works: dict[str, Callable[[], Callable[[], object]]] = {
        FULL: lambda: lambda: read_plain(host, ids),
        "full_once_": lambda: lambda: read_plain(host, ids, len(ids)),
        **{way: first_token(history) for way, history in histories.items()},
    }
    progress.start(f"first token of {len(ids):,}", len(works) * (turns + 1), "runs")
    times, peaks = in_turns(works, turns, progress)
    progress.finish()
    found = {f"{way}ttft_seconds": statistics.median(some) for way, some in times.items()}
    found |= {f"{way}peak_gib": peak for way, peak in peaks.items()}
    for way, history in histories.items():
        found[f"{way}ttft_speedup"] = found[f"{FULL}ttft_seconds"] / found[f"{way}ttft_seconds"]
        found[f"{way}kv_ratio"] = len(ids) / history.report(measure=False).rows[0].slots
    found["compact_bound_gib"] = bound_gib(host, histories["compact_"])
    with torch.no_grad():
        found["activations_gib"] = peak_gib(lambda: host.base_model(ids[None, :PIECE], use_cache=False))
    return found


class Stamps(BaseStreamer):
    """Notes when each token comes; the first is of the prompt."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Notes the time."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing."""


def decoding(
    host: Any, histories: Mapping[str, CompressedHistory], ids: torch.Tensor, steps: int, progress: Progress
) -> dict[str, float]:
    """Milliseconds a token after a prompt `[T]`, the median and the most of so many steps; each way warms up once."""
    found, ways = {}, {FULL: None, **histories}
    progress.start(f"decoding after {len(ids):,}", 2 * len(ways), "runs")
    for way, history in ways.items():
        stamps = Stamps()
        for _ in range(2):
            stamps = Stamps()
            past = {"past_key_values": read_plain(host, ids[:-1])} if history is None else {}
            generated(host, history, ids, steps + 1, streamer=stamps, **past)
            progress.advance()
        spent = [1000 * (after - before) for before, after in zip(stamps.times[1:], stamps.times[2:], strict=False)]
        found |= {f"{way}decode_ms": statistics.median(spent), f"{way}decode_longest_ms": max(spent)}
    progress.finish()
    return found | {f"{way}decode_speedup": found[f"{FULL}decode_ms"] / found[f"{way}decode_ms"] for way in histories}


def run(args: argparse.Namespace) -> None:
    """Measures part by part; each is printed and the result written as soon as it is known."""
    cuda = torch.cuda.is_available()
    host, _ = load_host(args.host, "cuda" if cuda else "cpu", torch.bfloat16)
    host.generation_config.eos_token_id = None  # pyright: ignore[reportOptionalMemberAccess]
    config: Any = host.config.get_text_config(decoder=True)
    trained, longest = config.max_position_embeddings, max(*args.lengths, args.decode, args.read, args.history)
    config.max_position_embeddings = max(trained, longest + 2 * (CHUNK + WINDOW) + args.steps)
    generator = torch.Generator().manual_seed(args.seed)
    ids = torch.randint(5, min(config.vocab_size, 50_000), (longest + 2 * (CHUNK + WINDOW),), generator=generator)
    ids = ids.to(host.device)
    histories = {way: CompressedHistory(host, modes=modes, window=WINDOW, keep_first=PREFIX)
                 for way, modes in WAYS.items()}  # fmt: skip
    metrics: dict[str, float] = {}
    settings = {name: getattr(args, name) for name in ("lengths", "read", "history", "decode", "steps", "turns")}
    settings |= {"slots": SLOTS, "trained_positions": trained, "attention": host.config._attn_implementation}
    written = args.result or f"generation-{'gpu' if cuda else 'cpu'}"

    def tell(found: dict[str, float], length: int = 0) -> None:
        key = f"{host_key(args.host)}.{f'{length // 1024}k' if length >= 1024 else length}.b1." if length else ""
        for name, value in found.items():
            if not math.isfinite(value):
                continue
            metrics[f"{key}{name}"] = value
            print(f"{key}{name} {value:.4g}", flush=True)
        notes = f"{host_note(args.host)} {NOTES}"
        print(write_result(written, metrics, seed=args.seed, config=settings, notes=notes), flush=True)

    with Progress() as progress:
        tell(cost(host, histories["compact_"].policy, ids, args, progress))
        for length, decodes in sorted([(length, False) for length in args.lengths] + [(args.decode, True)]):
            prompt = ids[:length]
            if decodes:
                tell(decoding(host, histories, prompt, args.steps, progress), length)
            else:
                turns = max(min(2, args.turns), min(args.turns, args.turns * 32768 // length))
                tell(savings(host, histories, prompt, turns, progress), length)
    for history in histories.values():
        history.detach()
