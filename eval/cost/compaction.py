"""What compaction costs beside the host's own read of the same tokens; batch 1.

Ways take turns in one process, after a turn that warms up; figures are medians over the turns. Compaction is the
difference, turn by turn, between reads that choose pairs and reads that keep as many of the first at no cost.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from eval.cost.timing import in_turns, read_plain
from eval.results import host_note, write_result
from hf_crouter import Compact, CompressedHistory
from hf_crouter.cache.kv_cache import CompressedDynamicCache
from hf_crouter.cache.policy import ContextPolicy
from hf_crouter.cache.reads import block_tokens, pairs_by_reading
from hf_crouter.compressors.compact import PairSelector, first_pairs
from hf_crouter.hosts.loading import load_host
from hf_crouter.types import LayerRead, Pairs, Row
from hf_crouter.utils.progress import Progress

CHUNK, WINDOW, PREFIX, SLOTS = 512, 512, 4, 64
NOTES = (
    "Batch 1, bfloat16, random ids, medians over turns that the ways take one after the other. compact.ms: what "
    "choosing pairs adds to a 512-token chunk of a prompt, compact.read_ms: the rest of its read, "
    "compact.cost_ratio: the one over the other; compact.plain_ms: the plain host reads the same tokens over the "
    "full past, compact.plain_cost_ratio: beside it. compact.decode_*: the same of one chunk that leaves while "
    "decoding and the window behind it, over the pairs of what came before."
)


class FirstPairs(PairSelector):
    """Keeps the first pairs of each chunk: as many as a selector would, at no cost."""

    def compress(self, read: LayerRead, observed: Any) -> tuple[Pairs | None, None]:
        """The first pairs of each chunk."""
        return first_pairs(read, self.most_by_layer[read.layer]) if read.chunks else None, None


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("--host", default="qwen2.5-coder-1.5b", help="known name, folder or hub name")
    parser.add_argument("--read", type=int, default=8192, help="tokens that leave while a prompt is read")
    parser.add_argument("--history", type=int, default=16384, help="tokens behind a chunk that leaves while decoding")
    parser.add_argument("--turns", type=int, default=5, help="of which the median is taken")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--result", help="compaction-gpu, or compaction-cpu without a GPU, by default")


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


def run(args: argparse.Namespace) -> None:
    """Measures, prints and writes the result."""
    cuda = torch.cuda.is_available()
    host, _ = load_host(args.host, "cuda" if cuda else "cpu", torch.bfloat16)
    config: Any = host.config.get_text_config(decoder=True)
    trained, longest = config.max_position_embeddings, max(args.read, args.history) + 2 * (CHUNK + WINDOW)
    config.max_position_embeddings = max(trained, longest)
    generator = torch.Generator().manual_seed(args.seed)
    ids = torch.randint(5, min(config.vocab_size, 50_000), (longest,), generator=generator).to(host.device)
    history = CompressedHistory(host, modes=[Compact(SLOTS)], window=WINDOW, keep_first=PREFIX)
    with Progress() as progress:
        metrics = cost(host, history.policy, ids, args, progress)
    history.detach()
    for name, value in metrics.items():
        print(f"{name} {value:.4g}", flush=True)
    settings = {name: getattr(args, name) for name in ("read", "history", "turns")}
    settings |= {"slots": SLOTS, "trained_positions": trained, "attention": host.config._attn_implementation}
    name = args.result or f"compaction-{'gpu' if cuda else 'cpu'}"
    notes = f"{host_note(args.host)} {NOTES}"
    print(write_result(name, metrics, seed=args.seed, config=settings, notes=notes), flush=True)
