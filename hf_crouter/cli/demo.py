"""`hf-crouter demo`: a real host reads a long file of the standard library through compressed history."""

from __future__ import annotations

import argparse
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from ..crouter.loading import load_crouter
from ..errors import InputError
from ..generation.report import HistoryReport
from ..history import CompressedHistory
from ..hosts.loading import load_host
from ..hosts.positions import max_positions
from ..hosts.shapes import kv_bytes
from ..hosts.unwrap import display_name
from ..modes import Compact, Copy, Experts, Retrieve, SoftPrompts
from ..types import Mode, Setting
from .chunks import calibration_of, chunk_records, print_chunks
from .console import Column, note, print_json, print_table, size
from .generate import pad_id
from .inputs import add_crouter, add_json, device, host_dtype, positive, read_text

NAME = "demo"
HELP = "let a real language model read a long Python file through compressed history (first run: fetches 93 MB)"
EXAMPLE = "hf-crouter demo --file long.py"
HOST = "smollm2-135m"
FILES = ("smtplib.py", "ftplib.py", "platform.py", "os.py")  # 9-12 thousand tokens each, in every Python
LAST = 512  # tokens whose loss is measured
CONTINUATION = 48
NAMES = {"compact": "compaction", "soft": "soft prompts", "copy": "copying", "all": "soft prompts and copying",
         "more_raw": "as many more raw tokens"}  # fmt: skip


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("--file", help="UTF-8 text to read; a file of the standard library by default")
    parser.add_argument("--host", help=f"known name, folder or hub name of the language model ({HOST})")
    add_crouter(parser)
    parser.add_argument("--window", type=positive, default=512, metavar="N",
                        help="fewest raw tokens kept at the end (default: 512)")  # fmt: skip
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    say = note if args.json else print
    path = args.file or standard_file()
    text = read_text(str(path))
    crouter, crouter_tokenizer = load_crouter(args.crouter)
    dtype = host_dtype(device("cpu"))
    host, tokenizer = load_host(args.host or HOST, dtype=dtype)
    ids, rest = cut(tokenizer, text, host, least=args.window + crouter.config.chunk_length + LAST)
    say(f"{Path(path).name}: {ids.shape[1]:,} tokens, read by {display_name(host)} "
        f"({str(dtype).removeprefix('torch.')}, {torch.get_num_threads()} threads)")  # fmt: skip

    def history(*modes: Mode, window: int = args.window) -> CompressedHistory:
        return CompressedHistory(host, crouter, modes=modes, window=window, tokenizer=tokenizer,
                                 crouter_tokenizer=crouter_tokenizer)  # fmt: skip

    setting = Setting(host, crouter, tokenizer, crouter_tokenizer)
    soft, compact = SoftPrompts.ready(setting), Compact.ready(setting)
    kept = (compact,) if compact is not None else ()
    # without a projector of this host: what works on any, the defaults
    modes: tuple[Mode, ...] = (soft, Copy()) if soft is not None else (*kept, Retrieve())
    everything = scored(lambda: history(*modes), ids, measure=True)
    report = everything.pop("report")
    extra = report.rows[0].entries + report.rows[0].retrieved
    most = args.window + crouter.config.chunk_length - 1
    arms = {
        "window": {"history": f"raw window only ({args.window} to {most} tokens)",
                   **scored(history, ids)},
        **({"soft": {"history": f"+ {report.rows[0].entries} soft prompts", **scored(lambda: history(soft), ids)}}
           if soft is not None else {}),
        "copy": {"history": "+ copying from the archive", **scored(lambda: history(Copy()), ids)},
        **({"compact": {"history": f"+ {compact.slots} key-value pairs of each chunk",
                        **scored(lambda: history(compact), ids)}} if compact is not None else {}),
        "all": {"history": ways_of(report, modes), **everything},
        "more_raw": {"history": f"raw window + {extra} more raw tokens",
                     **scored(lambda: history(window=args.window + extra), ids)},
        "full": {"history": "full history", **scored_full(host, ids)},
    }  # fmt: skip
    routes: list[dict[str, Any]] = []
    if args.host in (None, HOST) and args.crouter is None:  # the shipped experts are theirs
        served = scored(lambda: history(*modes, Experts()), ids)
        arms["experts"] = {"history": f"{ways_of(report, modes)}, under experts", **served}
        arms |= {key: arms.pop(key) for key in ("more_raw", "full")}  # in the order of the table
        routed = arms["experts"]["report"].chunks
        routes = [
            {"expert": chunk.expert, "route_status": chunk.route_status, "margin": chunk.margin} for chunk in routed
        ]
    for arm in arms.values():
        arm.pop("report", None)
    shares = worth({key: arm["loss"] for key, arm in arms.items()})
    said = sentence(shares)
    chunks = chunk_records(report, calibration_of(crouter, args.crouter))
    if not args.json:
        print(f"next-token loss on the last {LAST} tokens:")
        columns = [Column("what the host sees", right=False), Column("loss nats/token"), Column("KV slots"),
                   Column("KV"), Column("seconds")]  # fmt: skip
        print_table(columns, [
            (a["history"], f"{a['loss']:.4f}", f"{a['kv_slots']:,}", size(a["kv_bytes"]), f"{a['seconds']:.1f}")
            for a in arms.values()
        ])  # fmt: skip
        print(said)
        print("\nthe compressed chunks:")
        print_chunks(chunks)
        if routes:
            print(f"\nserved by: {served_by(routes)}")
        print("\ncontinuation, greedy, with compressed history:")
    last = history(*modes)
    continuation = continue_text(host, tokenizer, last, ids, stream=not args.json)
    copied = last.report(measure=False).copied
    truth = tokenizer.decode(rest)
    if args.json:
        print_json({"file": Path(path).name, "tokens": ids.shape[1], "host": display_name(host),
                    "crouter": display_name(crouter), "dtype": str(dtype).removeprefix("torch."),
                    "threads": torch.get_num_threads(), "last": LAST, "window": args.window,
                    "arms": [{"key": key, **arm} for key, arm in arms.items()],
                    "worth": shares, "summary": said, "chunks": chunks, "routes": routes,
                    "continuation": continuation, "copied": copied, "truth": truth})  # fmt: skip
        return 0
    print(f"\n{copied} of {CONTINUATION} tokens were copied from the archive.")
    if len(rest):
        print(f"\nwhat the file says there:\n{truth}")
    return 0


def served_by(routes: list[dict[str, Any]]) -> str:
    """How many chunks each expert serves, in one line."""
    counts = Counter(route["expert"] or "the plain host" for route in routes)
    return ", ".join(f"{name} {count}" for name, count in counts.most_common()) + f" of {len(routes)} chunks"


def ways_of(report: HistoryReport, modes: Sequence[Mode]) -> str:
    """What a report shows of the ways to read."""
    row = report.rows[0]
    what = "key-value pairs a head" if any(isinstance(mode, Compact) for mode in modes) else "soft prompts"
    found = [f"{row.entries} {what}"] if row.entries else []
    found += ["copying"] if report.archive_tokens else []
    found += [f"{row.retrieved} retrieved tokens"] if row.retrieved else []
    return "+ " + " + ".join(found or ["nothing"])


def standard_file() -> Path:
    """A long file of the standard library, the same for one version of Python.

    Raises:
        InputError: this Python comes without its source.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    for name in FILES:
        if (folder / name).is_file():
            return folder / name
    raise InputError(f"{folder}: no source of the standard library there; name a text with --file")


def cut(
    tokenizer: PreTrainedTokenizerBase, text: str, host: PreTrainedModel, least: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens to read, `[1, T]`, no more than the host has positions, and up to 48 that follow.

    Raises:
        InputError: the text is shorter than `least` tokens.
    """
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    positions = max_positions(host) or len(ids)
    read = min(positions, len(ids) - CONTINUATION)
    if read < least:
        raise InputError(f"demo: expected a text of at least {least + CONTINUATION} tokens, got {len(ids)}")
    return ids[None, :read], ids[read : read + CONTINUATION]


def scored(make: Callable[[], CompressedHistory], ids: torch.Tensor, measure: bool = False) -> dict[str, Any]:
    """Loss (nats/token), slots, bytes and seconds of a history, and its report; `measure`: rebuild its chunks."""
    began = time.perf_counter()
    history = make()
    try:
        loss = -history.score(ids, last=LAST).mean().item()
    finally:
        history.detach()
    seconds, report = (
        time.perf_counter() - began,
        history.report(measure=measure or history.policy.compressor is not None),
    )
    return {"loss": loss, "kv_slots": report.peak_slots, "kv_bytes": report.kv_bytes, "seconds": seconds,
            "report": report}  # fmt: skip


@torch.inference_mode()
def scored_full(host: PreTrainedModel, ids: torch.Tensor) -> dict[str, Any]:
    """The same for the plain host, which keeps everything."""
    began = time.perf_counter()
    logits = host(ids, logits_to_keep=LAST + 1, use_cache=False).logits[0, :-1].float()
    loss = torch.nn.functional.cross_entropy(logits, ids[0, -LAST:]).item()
    slots = ids.shape[1]
    return {"loss": loss, "kv_slots": slots, "kv_bytes": slots * kv_bytes(host.config, host.dtype),
            "seconds": time.perf_counter() - began}  # fmt: skip


def worth(losses: dict[str, float]) -> dict[str, float | None]:
    """What full history is worth over the window, nats/token, and the share of it that each way recovers.

    The shares are None where full history is worth nothing.
    """
    gain = losses["window"] - losses["full"]
    shares = {key: (losses["window"] - loss) / gain if gain > 0 else None for key, loss in losses.items()}
    return {"full_history": gain, **{key: shares[key] for key in NAMES if key in shares}}


def sentence(found: dict[str, float | None]) -> str:
    """The table's result in one line, from its figures."""
    if found["all"] is None:
        return f"On this file full history gains nothing over the window ({found['full_history']:+.4f} nats/token)."
    names = NAMES if "soft" in found else {**NAMES, "all": "the defaults"}
    shares = [f"{name} {100 * (found[key] or 0):.0f}%" for key, name in names.items() if key in found]
    return (
        f"Full history is worth {found['full_history']:.4f} nats/token here. Recovered of it: "
        f"{', '.join(shares[:-1])}; {shares[-1]}. One file, no interval."
    )


def continue_text(
    host: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    history: CompressedHistory,
    ids: torch.Tensor,
    stream: bool,
) -> str:
    """The greedy continuation, printed as it comes if `stream`."""
    streamer = TextStreamer(tokenizer, skip_prompt=True) if stream else None  # pyright: ignore[reportArgumentType]
    try:
        output = host.generate(  # pyright: ignore[reportCallIssue]
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=CONTINUATION, do_sample=False, temperature=None,
            top_p=None, top_k=None, logits_processor=[history], streamer=streamer, pad_token_id=pad_id(tokenizer),
        )  # fmt: skip
    finally:
        history.detach()
    return str(tokenizer.decode(output[0, ids.shape[1] :]))
