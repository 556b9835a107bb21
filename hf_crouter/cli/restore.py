"""`hf-crouter restore`: a context file back to text, from the latents alone."""

from __future__ import annotations

import argparse
import hashlib
import sys

from ..context import CompressedContext, restore_text
from ..crouter.loading import load_crouter
from ..utils.io import replaced_file
from .console import note, print_json
from .inputs import add_crouter, add_device, add_json, check_output, device, share

NAME = "restore"
HELP = "rebuild the text of a context file from its latents alone, and say how much of it is certain"
EXAMPLE = "hf-crouter restore long.safetensors -o long.rebuilt.py"


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("context", metavar="CONTEXT.safetensors", help="file that `hf-crouter compress` wrote")
    parser.add_argument("-o", "--output", metavar="FILE", help="write the text here; stdout by default")
    parser.add_argument("--threshold", type=share, default=0.9, metavar="P",
                        help="confidence from which a token counts as certain (default: 0.9)")  # fmt: skip
    add_crouter(parser)
    add_device(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    if args.output:
        check_output(args.output, args.context)
    context = CompressedContext.load(args.context)
    crouter, tokenizer = load_crouter(args.crouter, device=device(args.device))
    restored = restore_text(context, crouter, tokenizer, args.threshold)
    data = restored.text.encode(errors="replace")
    exact = hashlib.sha256(data).hexdigest() == context.sha256
    if args.output:
        with replaced_file(args.output) as part:
            part.write_bytes(data)
    if args.json:
        result = {"tokens": context.num_tokens, "certain_share": restored.certain_share, "exact": exact}
        print_json(result | ({"path": args.output} if args.output else {"text": restored.text}))
        return 0
    if not args.output:
        sys.stdout.buffer.write(data)
    accuracy = float((context.accuracy * context.tokens).sum() / context.num_tokens)
    note(
        f"{100 * restored.certain_share:.1f}% of {context.num_tokens:,} tokens are certain (confidence at least "
        f"{args.threshold:g}); {100 * accuracy:.1f}% were right when it was compressed; "
        + ("the text is the original to the last byte" if exact else "the text differs from the original")
    )
    return 0
