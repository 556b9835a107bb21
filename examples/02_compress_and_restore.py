"""A text becomes 8 vectors for every 512 tokens, and a text again, from the vectors alone.

    python examples/02_compress_and_restore.py [FILE]

What comes out: for every chunk its reconstruction NLL (nats/token) and the share of tokens that the latents rebuild
exactly at their position; the sizes; and the first place where the rebuilt text differs from the original.
"""

import argparse
import graphlib
from itertools import zip_longest
from pathlib import Path

from hf_crouter.context import compress_text, restore_text
from hf_crouter.crouter.loading import load_crouter


def first_difference(left: str, right: str) -> int | None:
    """Character at which two texts part, or None where they are equal."""
    pairs = enumerate(zip_longest(left, right))
    return next((place for place, (one, other) in pairs if one != other), None)


def main() -> None:
    """Compresses a file, restores it and compares."""
    parser = argparse.ArgumentParser()
    parser.add_argument("file", nargs="?", default=graphlib.__file__, help="UTF-8 text")
    path = Path(parser.parse_args().file)
    text = path.read_text(encoding="utf-8")

    crouter, tokenizer = load_crouter()
    context = compress_text(text, crouter, tokenizer, source=path.name)
    restored = restore_text(context, crouter, tokenizer)

    print("chunk  tokens  nats/token  rebuilt exactly")
    measures = zip(
        context.tokens.tolist(), context.reconstruction_nll.tolist(), context.accuracy.tolist(), strict=True
    )
    for chunk, (tokens, reconstruction_nll, accuracy) in enumerate(measures):
        print(f"{chunk:>5}  {tokens:>6}  {reconstruction_nll:>10.3f}  {accuracy:>15.1%}")
    latents = len(context) * crouter.config.num_latents
    print(f"{path.name}: {context.num_tokens:,} tokens -> {latents} latents of {crouter.config.latent_size} numbers")
    print(f"the decoder itself is certain (confidence 0.9 or more) of {restored.certain_share:.1%} of the tokens")

    place = first_difference(text, restored.text)
    if place is None:
        print("the rebuilt text is the original, character by character")
        return
    line = text.count("\n", 0, place) + 1
    print(f"the texts first differ at character {place:,} of {len(text):,}, in line {line}:")
    print(f"  original: {text[max(0, place - 40) : place + 30]!r}")
    print(f"  rebuilt:  {restored.text[max(0, place - 40) : place + 30]!r}")


if __name__ == "__main__":
    main()
