"""What compaction costs beside the host's own read, and what it saves: first token, memory, decoding; batch 1.

All ways take turns in one process, warm; figures are medians over the turns. Compaction is timed as the difference
between a read that chooses pairs and one that keeps as many of the first at no cost.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache

from eval.cost.prefill import seconds
from eval.results import host_key, host_note, write_result
from hf_crouter import Compact, CompressedHistory, Retrieve
from hf_crouter.cache.kv_cache import CompressedDynamicCache
from hf_crouter.cache.policy import ContextPolicy
from hf_crouter.cache.reads import pairs_by_reading
from hf_crouter.chunking import SameTokenizerChunker
from hf_crouter.compressors.compact import PairSelector
from hf_crouter.hosts.loading import load_host
from hf_crouter.types import LayerRead, Pairs, Row, Setting

PIECE, CHUNK, WINDOW, PREFIX, SLOTS = 2048, 512, 512, 4, 64
GIB = 2**30
WAYS: dict[str, list[Any]] = {
    "retrieve2": [Retrieve(2)],
    "compact": [Compact(SLOTS)],
    "compact_retrieve2": [Compact(SLOTS), Retrieve(2)],
}
NOTES = (
    "Batch 1, random ids, medians over turns. <host>.<length>.b1: full is prefilled in pieces of 2,048 tokens; "
    "ttft_speedup: its seconds to the first token over those of Retrieve(2), compact_ttft_speedup of Compact(64), "
    "mix_ttft_speedup of both together; peak_gib: most that the allocator held over the weights with Retrieve(2), "
    "compact_peak_gib, mix_peak_gib and full_peak_gib likewise; compact_bound_gib: pairs, two blocks and the raw part "
    "by their shapes, beside which a forward's own activations stand (activations_gib: of 2,048 tokens without a "
    "cache); kv_ratio: full history's slots over those of Compact(64). decode_ms.<way>: a token, after so many. "
    "compact.cost_ratio: what choosing pairs adds to a prompt's reads over the host's own read of the same tokens in "
    "pieces; decode_cost_ratio: the same for one chunk that leaves while decoding, over the host's own read of it."
)


class FirstPairs(PairSelector):
    """Keeps the first pairs of each chunk: as many as a selector would, at no cost."""

    def observe(self, read: LayerRead) -> None:
        """Nothing."""

    def compress(self, read: LayerRead, observed: None) -> list[Pairs]:
        """The first pairs of each chunk."""
        count, places = self.most_by_layer[read.layer], []
        rows, heads = read.keys.shape[:2]
        for first, end in read.chunks:
            kept = torch.arange(min(count, end - first), device=read.keys.device).expand(rows, heads, -1)
            last = first + kept.shape[-1]
            places.append((read.keys[:, :, first:last].clone(), read.values[:, :, first:last].clone(), kept))
        return places


def policy_of(host: Any, slots: int, block: int, stand_in: bool) -> ContextPolicy:
    """A rule that compacts, or one that keeps as many pairs at no cost."""
    selector: Any = Compact(slots, block=block).bind(Setting(host)).compressor
    if stand_in:
        selector = FirstPairs(selector.most_by_layer, block)
    return ContextPolicy(
        window=WINDOW, chunker=SameTokenizerChunker(CHUNK), prefix=lambda ids: PREFIX, compressor=selector
    )


def read_pairs(host: Any, policy: ContextPolicy, ids: torch.Tensor, known: int = 0) -> Callable[[], int]:
    """Reading the chunks of a row `[T]`, the first `known` tokens of which are compacted; gives how many it read."""
    cache: Any = CompressedDynamicCache(config=host.config.get_text_config(decoder=True))
    row = Row(0, prompt=len(ids))
    cache.start([row], ids[None], policy.key)
    if known:
        (row,) = pairs_by_reading(host, policy, cache, [policy.extend(row, ids[:known])], [ids[:known]])
    held = [(layer.keys, layer.values) for layer in cache.layers] if known else []
    places = cache.places
    wanted = policy.extend(row, ids)
    new = sum(chunk.entries is None for chunk in wanted.chunks)

    def work() -> int:
        cache.places = places
        cache.layers = DynamicCache(config=host.config.get_text_config(decoder=True)).layers
        for number, (keys, values) in enumerate(held):
            cache.layers[number].update(keys, values)
        pairs_by_reading(host, policy, cache, [wanted], [ids])
        return new

    return work


@torch.inference_mode()
def read_whole(host: Any, ids: torch.Tensor, piece: int = PIECE, cache: Any = None) -> Any:
    """The host's own prefill of a row `[T]` in pieces; gives its cache."""
    cache = cache if cache is not None else DynamicCache(config=host.config.get_text_config(decoder=True))
    for part in ids.split(piece):
        host(part[None], past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def in_turns(works: dict[str, Callable[[], Any]], turns: int) -> dict[str, float]:
    """Median seconds of each, after one turn that warms up."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(turns + 1):
        for name, work in works.items():
            spent = seconds(work)
            if turn:
                times[name].append(spent)
    return {name: statistics.median(some) for name, some in times.items()}


@torch.inference_mode()
def compaction_cost(host: Any, ids: torch.Tensor, slots: int, block: int, turns: int) -> dict[str, float]:
    """Milliseconds a chunk and ratios, in a prompt and while decoding; `ids` `[T]` are the prompt."""
    whole = read_pairs(host, policy_of(host, slots, block, False), ids)
    chunks = whole()
    known = len(ids) - CHUNK
    past = read_whole(host, ids[: len(ids) // 8])  # as many slots as the pairs of 64 a chunk are

    def one_chunk() -> None:
        read_whole(host, ids[-CHUNK:], CHUNK, past)
        past.crop(-CHUNK)

    times = in_turns(
        {
            "chosen": whole,
            "first": read_pairs(host, policy_of(host, slots, block, True), ids),
            "own": lambda: read_whole(host, ids[: PREFIX + chunks * CHUNK], block),
            "one.chosen": read_pairs(host, policy_of(host, slots, block, False), ids, known),
            "one.first": read_pairs(host, policy_of(host, slots, block, True), ids, known),
            "one.own": one_chunk,
        },
        turns,
    )
    ms = {name: 1000 * value / (1 if name.startswith("one") else chunks) for name, value in times.items()}
    return {
        "compact.ms": ms["chosen"] - ms["first"],
        "compact.read_ms": ms["first"],
        "compact.own_read_ms": ms["own"],
        "compact.cost_ratio": (ms["chosen"] - ms["first"]) / ms["own"],
        "compact.whole_ratio": ms["chosen"] / ms["own"],
        "compact.decode_ms": ms["one.chosen"] - ms["one.first"],
        "compact.decode_own_read_ms": ms["one.own"],
        "compact.decode_cost_ratio": (ms["one.chosen"] - ms["one.first"]) / ms["one.own"],
    }


def first_token(host: Any, ids: torch.Tensor, modes: list[Any]) -> CompressedHistory:
    """`generate` of one token after a prompt `[T]`; gives the history, detached."""
    history = CompressedHistory(host, modes=modes, window=WINDOW, keep_first=PREFIX)
    try:
        host.generate(ids[None], attention_mask=torch.ones_like(ids[None]), max_new_tokens=1, do_sample=False,
                      logits_processor=[history], pad_token_id=0)  # fmt: skip
    finally:
        history.detach()
    return history


def peak_of(host: Any, work: Callable[[], Any]) -> float:
    """GiB that the allocator held at most over what stood there before; 0 without a GPU."""
    if host.device.type != "cuda":
        work()
        return 0.0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / GIB


@torch.inference_mode()
def savings(host: Any, ids: torch.Tensor, turns: int) -> dict[str, float]:
    """First token, memory and slots after a prompt `[T]`, by what is in the result's keys."""
    works: dict[str, Callable[[], Any]] = {"full": lambda: read_whole(host, ids)}
    works |= {name: lambda modes=modes: first_token(host, ids, modes) for name, modes in WAYS.items()}
    times = in_turns(works, turns)
    peaks = {name: peak_of(host, work) for name, work in works.items()}
    row = first_token(host, ids, WAYS["compact"]).report(measure=False).rows[0]
    config = host.config.get_text_config(decoder=True)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    slot = 2 * config.num_hidden_layers * config.num_key_value_heads * size * host.dtype.itemsize
    found = {f"{name}.seconds": value for name, value in times.items()}
    return found | {
        "ttft_speedup": times["full"] / times["retrieve2"],
        "compact_ttft_speedup": times["full"] / times["compact"],
        "mix_ttft_speedup": times["full"] / times["compact_retrieve2"],
        "kv_ratio": len(ids) / row.slots,
        "peak_gib": peaks["retrieve2"],
        "compact_peak_gib": peaks["compact"],
        "mix_peak_gib": peaks["compact_retrieve2"],
        "full_peak_gib": peaks["full"],
        "compact_bound_gib": slot * (row.entries + 2 * PIECE + row.prefix + row.raw) / GIB,
        "activations_gib": peak_of(host, lambda: host.base_model(ids[None, :PIECE], use_cache=False)),
    }


def decoding(host: Any, ids: torch.Tensor, steps: int) -> dict[str, float]:
    """Milliseconds a token after a prompt `[T]`, by way: all but the first of `steps` tokens."""
    found = {}
    for name, modes in {"full": None, **WAYS}.items():
        history = CompressedHistory(host, modes=modes, window=WINDOW, keep_first=PREFIX) if modes else None
        times = []
        for new in (1, steps + 1):
            options: dict[str, Any] = {"logits_processor": [history]} if history is not None else {}
            if history is None:
                options["past_key_values"] = read_whole(host, ids[:-1])
            work = lambda new=new, options=options: host.generate(  # noqa: E731
                ids[None], attention_mask=torch.ones_like(ids[None]), max_new_tokens=new, min_new_tokens=new,
                do_sample=False, pad_token_id=0, **options,
            )  # fmt: skip
            times.append(seconds(work))
        found[f"decode_ms.{name}"] = 1000 * (times[1] - times[0]) / steps
        if history is not None:
            history.detach()
    return found


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("--host", default="qwen2.5-coder-1.5b", help="known name, folder or hub name")
    parser.add_argument("--lengths", nargs="+", type=int, default=[8192, 32768, 131072], help="tokens of a prompt")
    parser.add_argument("--read", type=int, default=16384, help="tokens of the prompt on which compaction is timed")
    parser.add_argument("--steps", type=int, default=64, help="tokens that are decoded")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--result", help="generation-gpu, or generation-cpu without a GPU, by default")


def run(args: argparse.Namespace) -> None:
    """Measures part by part; the result is written after each."""
    cuda = torch.cuda.is_available()
    host, _ = load_host(args.host, "cuda" if cuda else "cpu", torch.bfloat16)
    config: Any = host.config.get_text_config(decoder=True)
    trained = config.max_position_embeddings
    # lengths beyond the trained positions are timed all the same
    config.max_position_embeddings = max(trained, *args.lengths, args.read) + args.steps + 2
    generator = torch.Generator().manual_seed(args.seed)
    ids = torch.randint(5, min(config.vocab_size, 50_000), (max(*args.lengths, args.read),), generator=generator)
    ids, key = ids.to(host.device), host_key(args.host)
    metrics: dict[str, float] = {}

    def tell(found: dict[str, float], prefix: str = "") -> None:
        metrics.update({f"{prefix}{name}": value for name, value in found.items()})
        print(prefix, {name: round(value, 4) for name, value in found.items()}, flush=True)
        settings = {"lengths": args.lengths, "read": args.read, "turns": args.turns, "steps": args.steps,
                    "slots": SLOTS, "trained_positions": trained}  # fmt: skip
        name = args.result or f"generation-{'gpu' if cuda else 'cpu'}"
        write_result(name, metrics, seed=args.seed, config=settings, notes=f"{host_note(args.host)} {NOTES}")

    tell(compaction_cost(host, ids[: args.read], SLOTS, PIECE, args.turns))
    for length in args.lengths:
        tell(savings(host, ids[:length], args.turns if length < 100_000 else 2), f"{key}.{length // 1024}k.b1.")
    middle = sorted(args.lengths)[len(args.lengths) // 2]
    tell(decoding(host, ids[:middle], args.steps), f"{key}.{middle // 1024}k.b1.")
