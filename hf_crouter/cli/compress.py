"""`hf-crouter compress`: a text file to a context file, with the error of every chunk."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..context import compress_text
from ..crouter.loading import load_crouter
from ..hosts.loading import load_host_tokenizer
from ..hosts.shapes import kv_bytes
from ..utils.progress import progress
from .chunks import calibration_of, chunk_record, print_chunks, summary
from .console import print_json, size
from .inputs import add_crouter, add_device, add_json, check_output, device, positive, read_text

NAME = "compress"
HELP = "compress a text file, 512 tokens to 8 vectors, and show how well each chunk can be rebuilt"
EXAMPLE = "hf-crouter compress long.py -o long.safetensors --host smollm2-135m"


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("file", metavar="FILE", help="UTF-8 text; - reads stdin")
    parser.add_argument("-o", "--output", required=True, metavar="OUT.safetensors", help="context file to write")
    add_crouter(parser)
    parser.add_argument("--host", help="also say how many bytes of KV the text takes in this host")
    parser.add_argument("--batch-size", type=positive, default=4, metavar="N",
                        help="chunks a pass, about 200 MB each (default: 4)")  # fmt: skip
    add_device(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    check_output(args.output, args.file)
    text = read_text(args.file)
    host = host_memory(args.host, text) if args.host else None
    crouter, tokenizer = load_crouter(args.crouter, device=device(args.device))
    source = "stdin" if args.file == "-" else Path(args.file).name.encode(errors="replace").decode()
    with progress("compressing", "chunks") as update:
        context = compress_text(text, crouter, tokenizer, args.batch_size, source=source, progress=update)
    calibration = calibration_of(crouter, args.crouter)
    context.save(args.output)

    measures = zip(
        context.tokens.tolist(), context.accuracy.tolist(), context.reconstruction_nll.tolist(), strict=True
    )
    chunks = [chunk_record(i, *measure, calibration) for i, measure in enumerate(measures)]
    latents = len(context) * context.latents.shape[1]
    result: dict[str, Any] = {
        "path": args.output,
        "crouter": context.crouter,
        "tokens": context.num_tokens,
        "latents": latents,
        "text_bytes": context.num_bytes,
        "file_bytes": Path(args.output).stat().st_size,
        "chunks": chunks,
    }
    if host:
        result["host"] = host | {"compressed_kv_bytes": latents * host["bytes_per_slot"]}
    if args.json:
        print_json(result)
        return 0
    print_chunks(chunks)
    print(summary(chunks))
    ratio = result["file_bytes"] / context.num_bytes
    print(
        f"{context.num_tokens:,} tokens -> {latents} latents; {args.output}: {size(result['file_bytes'])}, "
        f"{ratio:.1f} times the {size(context.num_bytes)} of text: what gets smaller is a host's KV, not the file"
    )
    if host:
        print(
            f"KV in {args.host}: {size(host['kv_bytes'])} for {host['tokens']:,} tokens, "
            f"{size(result['host']['compressed_kv_bytes'])} for {latents} soft prompts"
        )
    length = crouter.config.chunk_length
    if context.num_tokens < length:
        print(f"the text is shorter than one chunk of {length} tokens: it takes as many latents as a full one")
    if not calibration:
        print("this crouter has no calibration: reconstruction NLLs are shown without a grade")
    return 0


def host_memory(name: str, text: str) -> dict[str, int]:
    """What a text costs in a host's KV cache: `tokens`, `bytes_per_slot` and `kv_bytes`."""
    config, tokenizer = load_host_tokenizer(name)
    tokens = len(tokenizer(text, verbose=False)["input_ids"])
    slot = kv_bytes(config)
    return {"tokens": tokens, "bytes_per_slot": slot, "kv_bytes": tokens * slot}
