"""Ways to read a compressed past, side by side: loss of the last tokens of a long file, and KV slots.

    python examples/06_ways_to_read.py [FILE]

What comes out: a line for each way, and what was retrieved when. `score` says what `generate` would have given to each
token, so any text of yours can be measured in this way before you rely on it.
"""

import argparse
import ftplib
from pathlib import Path

import torch

from hf_crouter import CompressedHistory, Copy, Retrieve, SoftPrompts, load_crouter, load_host

LAST = 256  # tokens whose loss is measured
WAYS = {
    "raw window only": [],
    "soft prompts": [SoftPrompts()],
    "copying, no slot at all": [Copy()],
    "copying from rebuilt latents": [Copy(source="rebuilt")],
    "soft prompts + copying": [SoftPrompts(), Copy()],
    "the same + 2 retrieved chunks": [SoftPrompts(), Copy(), Retrieve(chunks=2)],
}


def main() -> None:
    """Measures every way on the same file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("file", nargs="?", default=ftplib.__file__, help="UTF-8 text of 2,000 tokens or more")
    path = Path(parser.parse_args().file)
    host, tokenizer = load_host("smollm2-135m", dtype=torch.float32)
    crouter, _ = load_crouter()
    ids = tokenizer(path.read_text(encoding="utf-8"), return_tensors="pt", verbose=False).input_ids[:, :6000]

    print(f"{path.name}: loss of the last {LAST} of {ids.shape[1]:,} tokens, nats/token")
    for name, modes in WAYS.items():
        history = CompressedHistory(host, crouter, modes=modes, window=512)
        loss = -history.score(ids, last=LAST).mean().item()
        report = history.report(measure=False)
        history.detach()
        print(f"{name:34s}  loss {loss:.4f}  {report.peak_slots:5,} slots  archive {report.archive_bytes:,} bytes")
    print("\nwhat was retrieved:")
    for line in report.retrievals:
        print(f"  at {line.length:,} tokens: chunk {line.chunk} ({line.reason})")


if __name__ == "__main__":
    main()
