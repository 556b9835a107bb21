"""`hf-crouter demo`: a real host reads a long file of the standard library through compressed history."""

from __future__ import annotations

import argparse
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from ..errors import InputError
from ..history import CompressedHistory
from ..host.projector import display_name
from ..loading import load_crouter, load_host
from .chunks import calibration_of, chunk_records, print_chunks
from .console import Column, note, print_json, print_table, size
from .generate import pad_id
from .inputs import add_crouter, add_json, device, host_dtype, kv_bytes, positive, read_text

NAME = "demo"
HELP = "let a real language model read a long Python file through compressed history (first run: fetches 93 MB)"
EXAMPLE = "hf-crouter demo --file long.py"
HOST = "smollm2-135m"
FILES = ("smtplib.py", "ftplib.py", "platform.py", "os.py")  # 9-12 thousand tokens each, in every Python
LAST = 512  # tokens whose loss is measured
CONTINUATION = 48


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

    def history(window: int, soft: bool) -> CompressedHistory:
        return CompressedHistory(host, crouter, window=window, soft=soft, tokenizer=tokenizer,
                                 crouter_tokenizer=crouter_tokenizer)  # fmt: skip

    compressed = scored(lambda: history(args.window, True), ids)
    report = compressed.pop("report")
    extra = report.rows[0].soft
    window = scored(lambda: history(args.window, False), ids)
    wider = scored(lambda: history(args.window + extra, False), ids)
    most = args.window + crouter.config.chunk_length - 1
    arms = [
        {"history": f"raw window only ({args.window} to {most} tokens)", **window},
        {"history": f"raw window + {extra} soft prompts (compressed)", **compressed},
        {"history": f"raw window + {extra} more raw tokens", **wider},
        {"history": "full history", **scored_full(host, ids)},
    ]
    for arm in arms:
        arm.pop("report", None)
    verdict = sentence(*(arm["loss"] for arm in arms))
    chunks = chunk_records(report, calibration_of(crouter, args.crouter))
    if not args.json:
        print(f"next-token loss on the last {LAST} tokens:")
        columns = [Column("what the host sees", right=False), Column("loss nats/token"), Column("KV slots"),
                   Column("KV"), Column("seconds")]  # fmt: skip
        print_table(columns, [
            (a["history"], f"{a['loss']:.4f}", f"{a['kv_slots']:,}", size(a["kv_bytes"]), f"{a['seconds']:.1f}")
            for a in arms
        ])  # fmt: skip
        print(verdict)
        print("\nthe chunks that stand behind the soft prompts:")
        print_chunks(chunks)
        print("\ncontinuation, greedy, with compressed history:")
    continuation = continue_text(host, tokenizer, history(args.window, True), ids, stream=not args.json)
    truth = tokenizer.decode(rest)
    if args.json:
        print_json({"file": Path(path).name, "tokens": ids.shape[1], "host": display_name(host),
                    "crouter": display_name(crouter), "dtype": str(dtype).removeprefix("torch."),
                    "threads": torch.get_num_threads(), "last": LAST, "window": args.window, "arms": arms,
                    "worth": worth(*(arm["loss"] for arm in arms)), "summary": verdict, "chunks": chunks,
                    "continuation": continuation, "truth": truth})  # fmt: skip
    elif len(rest):
        print(f"\nwhat the file says there:\n{truth}")
    return 0


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
    positions = getattr(host.config.get_text_config(decoder=True), "max_position_embeddings", None) or len(ids)
    read = min(positions, len(ids) - CONTINUATION)
    if read < least:
        raise InputError(f"demo: expected a text of at least {least + CONTINUATION} tokens, got {len(ids)}")
    return ids[None, :read], ids[read : read + CONTINUATION]


def scored(make: Callable[[], CompressedHistory], ids: torch.Tensor) -> dict[str, Any]:
    """Loss (nats/token), slots, bytes and seconds of a history, and its report."""
    began = time.perf_counter()
    history = make()
    try:
        loss = -history.score(ids, last=LAST).mean().item()
    finally:
        history.detach()
    seconds, report = time.perf_counter() - began, history.report(residuals=history.reader.projector is not None)
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


def worth(window: float, compressed: float, wider: float, full: float) -> dict[str, float | None]:
    """What full history is worth, nats/token, and the share of it that two ways recover; None where it is nothing."""
    gain = window - full
    shares = (None, None) if gain <= 0 else ((window - compressed) / gain, (window - wider) / gain)
    return {"full_history": gain, "compressed": shares[0], "more_raw_tokens": shares[1]}


def sentence(window: float, compressed: float, wider: float, full: float) -> str:
    """The table's result in one line, from its figures."""
    found = worth(window, compressed, wider, full)
    if found["compressed"] is None or found["more_raw_tokens"] is None:
        return f"On this file full history gains nothing over the window ({found['full_history']:+.4f} nats/token)."
    better = "more" if found["compressed"] > found["more_raw_tokens"] else "no more"
    return (
        f"Full history is worth {found['full_history']:.4f} nats/token here. Soft prompts recover "
        f"{100 * found['compressed']:.1f}% of it, {better} than as many raw tokens "
        f"({100 * found['more_raw_tokens']:.1f}%): one file, no interval."
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
