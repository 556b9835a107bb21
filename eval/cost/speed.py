"""How fast a compressed past is read and written on, beside the host's own: first token, decoding, batches, a million.

Each part measures its ways side by side: they take turns in one process after a turn that warms up, and figures are
medians over the turns. Rows are source code of the standard library, each its own part of it. The result is written
after each figure, so that a part that fails leaves the others.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import gc
import math
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from eval.cost.timing import GIB, Stamps, generated, in_turns, long_text, read_plain
from eval.results import host_key, host_note, size_name, write_result
from hf_crouter import Compact, CompressedHistory, Copy, Retrieve
from hf_crouter.errors import InputError
from hf_crouter.hosts.loading import load_host
from hf_crouter.utils.progress import Progress

WINDOW, PREFIX = 512, 4
FULL = "full_"
WAYS: dict[str, tuple[Any, ...]] = {  # by what their keys begin with
    "window_": (),
    "window_copy_": (Copy(),),
    "fast_": (Retrieve(2),),
    "fast_copy_": (Retrieve(2), Copy()),
    "compact_": (Compact(8),),
    "compact_copy_": (Compact(8), Copy()),
    "auto_": (Compact(), Retrieve(2)),
    "auto_copy_": (Compact(), Retrieve(2), Copy()),
}
PARTS = ("first", "decode", "profile", "batch", "static", "million")
NOTES = (
    "Rows of the standard library's source, window 512, 4 tokens before it; medians over turns that the ways take one "
    "after the other. full_: the host's own read in pieces of 2,048 tokens; window_: what leaves it is dropped, "
    "fast_ Retrieve(2), compact_ Compact(8), auto_ Compact(32) and Retrieve(2); copy_ behind them: with Copy. "
    "<host>.<length>.b<batch>.: ttft_seconds to the first token, ttft_speedup: full_ over it; peak_gib: most that the "
    "allocator held over the weights; kv_ratio: tokens over slots at the end of the prompt; decode_ms: a step, the "
    "median, decode_mean_ms the mean, in which chunks that leave and are retrieved count; copy_share: what copying "
    "adds, over the step with it, the median over the turns of ratios of medians. profile: parts of a step, each "
    "ended by waiting for the device (_ms), and the time to issue it (_issue_ms). largest: rows that fit the limit "
    "(equal ones, by doubling and halving), tokens_per_second with them over a whole cycle of 512 tokens. static: "
    "tokens a second at batch 1 with a static cache and compiled steps, over those of a dynamic one; graphs: compiled "
    "in a run that compresses another chunk. million: cost_us a token of the prompt, peak_gib of all that the process "
    "holds (of a GPU's memory, or resident), under limit_gib."
)


@dataclass
class Bench:
    """One run of the benchmark.

    Attributes:
        host: on its device.
        text: ids `[T]` to take rows from.
        args: of the command.
        progress: is told of each run.
        metrics: what was found.
    """

    host: Any
    text: torch.Tensor
    args: argparse.Namespace
    progress: Progress
    metrics: dict[str, float] = field(default_factory=dict)

    def rows(self, batch: int, length: int) -> torch.Tensor:
        """`[batch, length]` ids."""
        return self.text[: batch * length].view(batch, length).to(self.host.device)

    def tell(self, found: dict[str, float], length: int = 0, batch: int = 1) -> None:
        """Prints figures and writes the result with them."""
        key = f"{host_key(self.args.host)}."
        key += f"{size_name(length)}.b{batch}." if length else ""
        for name, value in found.items():
            if math.isfinite(value):
                self.metrics[key + name] = float(value)
                print(f"{key}{name} {value:.4g}", flush=True)
        cuda = self.host.device.type == "cuda"
        settings = {name: getattr(self.args, name) for name in ("steps", "turns", "ways", "limit_gib")}
        settings |= {"attention": self.host.config._attn_implementation, "dtype": str(self.host.dtype)}
        name = self.args.result or f"speed-{'gpu' if cuda else 'cpu'}"
        notes = f"{host_note(self.args.host)} {NOTES}"
        print(write_result(name, self.metrics, seed=0, config=settings, notes=notes), flush=True)

    @contextlib.contextmanager
    def histories(self, ways: list[str] | None = None) -> Iterator[dict[str, CompressedHistory]]:
        """The ways that were asked for, by name."""
        chosen = self.args.ways if ways is None else [way for way in ways if way in self.args.ways]
        made = {way: CompressedHistory(self.host, modes=WAYS[way], window=WINDOW, keep_first=PREFIX) for way in chosen}
        try:
            yield made
        finally:
            for history in made.values():
                history.detach()


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("--host", default="qwen2.5-coder-1.5b", help="known name, folder or hub name")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--first", nargs="+", type=_shape, default=[(8192, 1), (32768, 1), (131072, 1), (131072, 4)],
                        metavar="TOKENSxROWS", help="prompts of the first token")  # fmt: skip
    parser.add_argument("--decode", nargs="+", type=_shape, default=[(32768, 1), (32768, 8), (32768, 32)],
                        metavar="TOKENSxROWS", help="prompts behind which steps are timed")  # fmt: skip
    parser.add_argument("--static", type=int, default=32768, help="tokens of the prompt of the part static")
    parser.add_argument("--million", nargs="+", type=int, default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--million-way", choices=list(WAYS), default="compact_copy_")
    parser.add_argument("--limit-gib", type=float, default=16.0, help="of memory, for the part million")
    parser.add_argument("--batch-gib", type=float, default=80e9 / GIB, help="of memory, for the part batch")
    parser.add_argument("--batch-ways", nargs="+", choices=list(WAYS), default=["fast_copy_", "compact_copy_"])
    parser.add_argument("--batch-length", type=int, default=32768)
    parser.add_argument("--most-rows", type=int, default=2048, help="tried in the part batch")
    parser.add_argument("--steps", type=int, default=64, help="that are timed at once")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--result", help="speed-gpu, or speed-cpu without a GPU, by default")


def _shape(text: str) -> tuple[int, int]:
    length, _, batch = text.partition("x")
    return int(length), int(batch or 1)


def first_token(bench: Bench, length: int, batch: int) -> None:
    """First token, peak and slots of each way after prompts of one length."""
    ids = bench.rows(batch, length)
    turns = max(min(2, bench.args.turns), min(bench.args.turns, bench.args.turns * 65536 // (length * batch)))
    with bench.histories() as histories:
        works: dict[str, Callable[[], Callable[[], object]]] = {
            FULL: lambda: lambda: read_plain(bench.host, ids),
            **{way: _first(bench.host, history, ids) for way, history in histories.items()},
        }
        bench.progress.start(f"first token of {batch} x {length:,}", len(works) * (turns + 1), "runs")
        times, peaks = in_turns(works, turns, bench.progress)
        bench.progress.finish()
        found = {f"{way}ttft_seconds": statistics.median(some) for way, some in times.items()}
        found |= {f"{way}peak_gib": peak for way, peak in peaks.items()}
        for way, history in histories.items():
            found[f"{way}ttft_speedup"] = found[f"{FULL}ttft_seconds"] / found[f"{way}ttft_seconds"]
            found[f"{way}kv_ratio"] = length / history.report(measure=False).rows[0].slots
    bench.tell(found, length, batch)


def _first(host: Any, history: CompressedHistory, ids: torch.Tensor) -> Callable[[], Callable[[], object]]:
    return lambda: lambda: generated(host, history, ids, 1)


class Conversation:
    """A past that is written on, call after call; its prompt is read once.

    Args:
        host: the plain host.
        history: that reads; None: the host's own way.
        ids: `[B, T]`, the prompt.
        options: of every `generate`.
    """

    def __init__(self, host: Any, history: CompressedHistory | None, ids: torch.Tensor, **options: Any):
        self.host, self.history, self.options = host, history, options
        if history is None and not options:
            self.ids, self.cache = ids, read_plain(host, ids[:, :-1])
        else:
            self.ids, self.cache = ids, None
            self.write(1)

    def write(self, steps: int) -> list[float]:
        """Seconds of steps: so many more tokens, the first of which is not counted."""
        stamps = Stamps()
        past = {"past_key_values": self.cache} if self.cache is not None else {}
        out = generated(self.host, self.history, self.ids, steps + 1, streamer=stamps, return_dict_in_generate=True,
                        **past, **self.options)  # fmt: skip
        self.ids = out.sequences
        if not self.options:  # a static cache has no room for more
            self.cache = out.past_key_values
        return [after - before for before, after in zip(stamps.times[1:], stamps.times[2:], strict=False)]

    def repeated(self, rows: int) -> Conversation:
        """The same with so many equal rows."""
        made, cache = copy.copy(self), copy.deepcopy(self.cache)
        assert cache is not None
        cache.batch_repeat_interleave(rows)
        made.cache, made.ids = cache, self.ids.repeat_interleave(rows, 0)
        return made


def decoding(bench: Bench, length: int, batch: int) -> None:
    """Milliseconds of a step of each way after prompts of one length."""
    ids, args = bench.rows(batch, length), bench.args
    with bench.histories() as histories:
        ways: dict[str, CompressedHistory | None] = {FULL: None, **histories}
        bench.progress.start(f"decoding {batch} x {length:,}", len(ways) * (args.turns + 1), "runs")
        talks, spent = {}, {way: [] for way in ways}
        for way, history in ways.items():
            try:
                talks[way] = Conversation(bench.host, history, ids)
                talks[way].write(args.steps)
            except torch.OutOfMemoryError:
                print(f"{way}: does not fit", flush=True)
                talks.pop(way, None)
                gc.collect()
                torch.cuda.empty_cache()
            bench.progress.advance()
        for _ in range(args.turns):
            for way, talk in talks.items():
                spent[way].append(talk.write(args.steps))
                bench.progress.advance()
        bench.progress.finish()
    medians = {way: [1000 * statistics.median(turn) for turn in turns] for way, turns in spent.items() if turns}
    found = {f"{way}decode_ms": statistics.median(turns) for way, turns in medians.items()}
    for way, turns in spent.items():
        if turns:
            found[f"{way}decode_mean_ms"] = 1000 * statistics.mean(time for turn in turns for time in turn)
    for way, turns in medians.items():
        if FULL in medians and way != FULL:
            found[f"{way}decode_speedup"] = statistics.median(a / b for a, b in zip(medians[FULL], turns, strict=True))
        if way.endswith("copy_") and (without := medians.get(way.removesuffix("copy_"))):
            shares = [1 - b / a for a, b in zip(turns, without, strict=True)]
            found[f"{way}copy_share"] = statistics.median(shares)
    bench.tell(found, length, batch)


def profile(bench: Bench, length: int, batch: int) -> None:
    """Where the time of a step goes, by way: preparing inputs, the host's forward, the history's scores, the rest."""
    ids = bench.rows(batch, length)
    with bench.histories() as histories:
        for way, history in histories.items():
            talk = Conversation(bench.host, history, ids)
            talk.write(8)
            found: dict[str, float] = {}
            for kind, waits in (("ms", True), ("issue_ms", False)):
                with _watched(bench.host, history, waits) as times:
                    steps = talk.write(bench.args.steps)
                means = {name: 1000 * statistics.median(some[2:]) for name, some in times.items() if len(some) > 2}
                found |= {f"{way}profile.{name}_{kind}": value for name, value in means.items()}
                found[f"{way}profile.step_{kind}"] = 1000 * statistics.median(steps)
            bench.tell(found, length, batch)


@contextlib.contextmanager
def _watched(host: Any, history: CompressedHistory, waits: bool) -> Iterator[dict[str, list[float]]]:
    """A block in which the parts of each step are timed.

    Args:
        host: the plain host.
        history: that reads.
        waits: before and after each part for the device.
    """
    times: dict[str, list[float]] = {}

    def timed(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(work)  # `generate` asks for its arguments
        def call(*args: Any, **kwargs: Any) -> Any:
            if waits and torch.cuda.is_available():
                torch.cuda.synchronize()
            start = time.perf_counter()
            result = work(*args, **kwargs)
            if waits and torch.cuda.is_available():
                torch.cuda.synchronize()
            times.setdefault(name, []).append(time.perf_counter() - start)
            return result

        return call

    cls = type(history)
    plain = cls.__call__
    cls.__call__ = timed("scores", plain)  # type: ignore[method-assign]
    host.forward = timed("forward", host.forward)
    host.prepare_inputs_for_generation = timed("prepare", host.prepare_inputs_for_generation)
    try:
        yield times
    finally:
        cls.__call__ = plain  # type: ignore[method-assign]
        del host.forward, host.prepare_inputs_for_generation


def largest_batch(bench: Bench) -> None:
    """Most rows of each way within a limit of memory, and tokens a second with them."""
    args, ids = bench.args, bench.rows(1, bench.args.batch_length)
    with bench.histories(args.batch_ways) as histories, _limited(args.batch_gib):
        rates = {}
        for way, history in {FULL: None, **histories}.items():
            base = Conversation(bench.host, history, ids)
            base.write(2)

            def fits(rows: int, base: Conversation = base) -> bool:
                try:
                    base.repeated(rows).write(3)
                    return True
                except torch.OutOfMemoryError:
                    return False
                finally:
                    gc.collect()
                    if torch.cuda.is_available():
                        torch.cuda.empty_cache()

            rows = most_rows(fits, args.most_rows)
            talk, steps = base.repeated(rows), args.steps if history is None else 512
            spent = talk.write(steps)
            rates[way] = rows * len(spent) / sum(spent)
            found = {f"{way}largest": rows, f"{way}tokens_per_second": rates[way]}
            if history is not None:
                found[f"{way}throughput_ratio"] = rates[way] / rates[FULL]
            bench.tell(found, args.batch_length, 0)
            del base, talk
            gc.collect()


def most_rows(fits: Callable[[int], bool], most: int) -> int:
    """The most rows that fit, to a sixteenth: doubled while they do, then halved between."""
    good, bad = 0, most + 1
    rows = min(8, most)
    while rows < bad:
        if not fits(rows):
            bad = rows
            break
        good = rows
        if rows == most:
            break
        rows = min(2 * rows, most)
    while bad - good > max(1, good // 16):
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    if not good:
        raise InputError("expected at least one row to fit, got none")
    return good


@contextlib.contextmanager
def _limited(gib: float) -> Iterator[None]:
    """A block in which this process may hold no more of the GPU's memory."""
    if not torch.cuda.is_available():
        yield
        return
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, gib * GIB / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def static_cache(bench: Bench) -> None:
    """Tokens a second at batch 1 with a static cache and compiled steps, beside those of a dynamic cache."""
    length = bench.args.static
    ids = bench.rows(1, length)
    with bench.histories() as histories:
        for way, history in histories.items():
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            kinds, steps = ("dynamic", "static"), bench.args.steps
            talks = [Conversation(bench.host, history, ids, cache_implementation=kind) for kind in kinds]
            for talk in talks:
                talk.write(steps)  # compiles
            turns = [[statistics.median(talk.write(steps)) for talk in talks] for _ in range(bench.args.turns)]
            talks[1].write(600)  # another chunk is compressed
            made = torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs
            dynamic, static = (statistics.median(column) for column in zip(*turns, strict=True))
            found = {f"{way}dynamic_tokens_per_second": 1 / dynamic, f"{way}static_tokens_per_second": 1 / static,
                     f"{way}static_speedup": statistics.median(a / b for a, b in turns),
                     f"{way}static_graphs": made}  # fmt: skip
            bench.tell(found, length)


def million(bench: Bench) -> None:
    """Cost a token of long prompts and the peak of memory, under a limit.

    Raises:
        InputError: the peak is over the limit.
    """
    args, cuda = bench.args, torch.cuda.is_available()
    with bench.histories([args.million_way]) as histories, _limited(args.limit_gib):
        if not histories:
            raise InputError(f"--ways: expected {args.million_way} of --million-way among them, got {args.ways}")
        way, history = next(iter(histories.items()))
        generated(bench.host, history, bench.rows(1, min(args.million)), 1)  # warms up
        for length in args.million:
            ids = bench.rows(1, length)
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            generated(bench.host, history, ids, 2)
            spent = time.perf_counter() - start
            peak = torch.cuda.max_memory_allocated() / GIB if cuda else resident_gib()
            found = {f"{way}seconds": spent, f"{way}cost_us": 1e6 * spent / length, f"{way}peak_gib": peak,
                     f"{way}kv_ratio": length / history.report(measure=False).rows[0].slots}  # fmt: skip
            bench.tell({f"million.{length}.{name}": value for name, value in found.items()})
            if peak > args.limit_gib:
                raise InputError(f"expected a peak of at most {args.limit_gib} GiB, got {peak:.2f} at {length:,}")


def resident_gib() -> float:
    """Most memory that this process ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def run(args: argparse.Namespace) -> None:
    """Measures part by part; each figure is printed and written as soon as it is known."""
    cuda = torch.cuda.is_available()
    host, tokenizer = load_host(args.host, "cuda" if cuda else "cpu", torch.bfloat16 if cuda else torch.float32)
    host.generation_config.eos_token_id = None  # pyright: ignore[reportOptionalMemberAccess]
    shapes = {"first": args.first, "decode": args.decode, "profile": args.decode, "static": [(args.static, 1)],
              "batch": [(args.batch_length, 1)], "million": [(length, 1) for length in args.million]}  # fmt: skip
    longest = max(length * batch for part in args.parts for length, batch in shapes[part])
    with Progress() as progress:
        bench = Bench(host, long_text(tokenizer, longest), args, progress)
        works: dict[str, Callable[..., None]] = {"first": first_token, "decode": decoding, "profile": profile}
        for part in args.parts:
            if part in works:
                for length, batch in shapes[part]:
                    works[part](bench, length, batch)
            elif part == "batch":
                largest_batch(bench)
            elif part == "static":
                static_cache(bench)
            else:
                million(bench)
