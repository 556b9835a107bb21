"""`hf-crouter generate`: a host continues a prompt and reads its past compressed."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..crouter.loading import load_crouter
from ..errors import InputError
from ..generation.streaming import SourceStreamer
from ..history import CompressedHistory
from ..hosts.loading import load_host
from .chunks import calibration_of, chunk_records, print_chunks
from .console import note, print_json, size
from .inputs import add_crouter, add_device, add_json, device, host_dtype, positive, read_text, share
from .modes import add_modes, modes_of

NAME = "generate"
HELP = "let a host continue a prompt, its past beyond a raw window compressed; only the continuation goes to stdout"
EXAMPLE = "hf-crouter generate --host smollm2-135m --prompt-file long.py --max-new-tokens 64"


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("--host", required=True, help="known name, folder or hub name of the language model")
    add_crouter(parser)
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="the prompt itself")
    prompt.add_argument("--prompt-file", metavar="FILE", help="UTF-8 file that holds the prompt")
    prompt.add_argument("stdin", nargs="?", choices=["-"], help="read the prompt from stdin")
    parser.add_argument("--max-new-tokens", type=positive, default=128, metavar="N", help="default: 128")
    parser.add_argument("--window", type=positive, metavar="N",
                        help="fewest raw tokens kept at the end (default: 512)")  # fmt: skip
    parser.add_argument("--budget", metavar="SIZE", help="memory to take beyond the host's weights, such as 2GiB: the "
                        "window, and how many pairs Compact keeps, are chosen so that it suffices")  # fmt: skip
    parser.add_argument("--chat", action="store_true", help="wrap the prompt in the host's chat template")
    add_modes(parser)
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default)")
    parser.add_argument("--top-p", type=share, default=1.0, metavar="P", help="default: 1.0")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="0 is off (default)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default: 0)")
    add_device(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    if not 0 <= args.temperature < float("inf") or args.top_p == 0 or args.top_k < 0:
        raise InputError("expected --temperature and --top-k of at least 0 and --top-p above 0")
    modes = modes_of(args)
    text = args.prompt if args.prompt is not None else read_text(args.stdin or args.prompt_file)
    where = device(args.device)
    host, tokenizer = load_host(args.host, device=where, dtype=host_dtype(where))
    inputs = encode(tokenizer, text, chat=args.chat)
    crouter, crouter_tokenizer = load_crouter(args.crouter, device=where)
    history = CompressedHistory(
        host, crouter, modes=modes, window=args.window, budget=args.budget,
        longest=inputs.shape[1] + args.max_new_tokens if args.budget else None, tokenizer=tokenizer,
        crouter_tokenizer=crouter_tokenizer,
    )  # fmt: skip
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if args.temperature:
        sampling = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k}
        torch.manual_seed(args.seed)
    streamer = None if args.json else SourceStreamer(tokenizer, history)
    began = time.perf_counter()
    try:
        output = host.generate(  # pyright: ignore[reportCallIssue]
            inputs.to(where), attention_mask=torch.ones_like(inputs).to(where), max_new_tokens=args.max_new_tokens,
            logits_processor=[history], streamer=streamer, pad_token_id=pad_id(tokenizer), **sampling,
        )  # fmt: skip
    finally:
        history.detach()
    seconds = time.perf_counter() - began
    new, report = output[0, inputs.shape[1] :], history.report()
    chunks = chunk_records(report, calibration_of(crouter, args.crouter))
    if args.json:
        print_json({
            "text": tokenizer.decode(new, skip_special_tokens=True), "prompt_tokens": inputs.shape[1],
            "new_tokens": len(new), "seconds": seconds, "slots": report.slots, "peak_slots": report.peak_slots,
            "kv_bytes": report.kv_bytes, "kv_bytes_full": report.kv_bytes_full, "copied": report.copied,
            "copies": [asdict(copy) for copy in report.copies],
            "archive_bytes": report.archive_bytes, "modes": report.modes, "chunks": chunks,
            "retrievals": [asdict(record) for record in report.retrievals],
            "routes": [asdict(route) for route in report.routes],
        })  # fmt: skip
        return 0
    sys.stdout.flush()
    note("")
    if chunks:
        print_chunks(chunks, sys.stderr)
        note(f"KV: {size(report.kv_bytes)} in {report.peak_slots:,} slots at the peak; full history would take "
             f"{size(report.kv_bytes_full)}")  # fmt: skip
        if report.archive_tokens:
            note(f"copied: {report.copied} of {len(new)} tokens, from an archive of {report.archive_tokens:,} tokens "
                 f"({size(report.archive_bytes)} of main memory)")  # fmt: skip
            for copy in report.copies:
                note(f"  tokens {copy}")
    else:
        note(f"nothing was compressed: the text is shorter than the window and one chunk together, "
             f"{history.policy.window} + {crouter.config.chunk_length} tokens")  # fmt: skip
    for record in report.retrievals:
        note(f"retrieved at {record.length:,} tokens: chunk {record.chunk} ({record.reason})")
    for route in report.routes:
        note(f"window from token {route.length:,} on: {route.expert or 'the plain host'} ({route.route_status})")
    if report.modes:
        note(f"read by: {', '.join(report.modes)}")
    if args.budget:
        note(f"chosen for {args.budget}: window {history.policy.window:,}, "
             f"{', '.join(map(str, history.modes)) or 'nothing beside it'}")  # fmt: skip
    note(f"{len(new)} new tokens after {inputs.shape[1]:,}, {seconds:.1f} s")
    return 0


def encode(tokenizer: PreTrainedTokenizerBase, text: str, chat: bool = False) -> torch.Tensor:
    """The prompt's token ids `[1, T]`.

    Raises:
        InputError: an empty prompt, or a host without a chat template.
    """
    if chat:
        if not tokenizer.chat_template:
            raise InputError("--chat: this host has no chat template")
        messages = [{"role": "user", "content": text}]
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    if any("\ud800" <= c <= "\udfff" for c in text):  # bytes of a command line that are not UTF-8
        raise InputError("prompt: not UTF-8 text")
    ids = tokenizer(text, add_special_tokens=not chat, verbose=False)["input_ids"]
    if not ids:
        raise InputError("prompt: empty, expected at least one token")
    return torch.tensor([ids])


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id that `generate` pads with; any will do for one row."""
    found = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return found if isinstance(found, int) else 0
