"""The three ways to read a compressed past, side by side: loss of the last tokens of a long file, and KV slots.

    python examples/06_three_ways.py [FILE]

What comes out: a line for each way, and what was recalled when. `score` says what `generate` would have given to each
token, so any text of yours can be measured in this way before you rely on it.
"""

import argparse
import ftplib
from pathlib import Path

import torch

from hf_crouter import CompressedHistory
from hf_crouter.crouter.loading import load_crouter
from hf_crouter.hosts.loading import load_host

LAST = 256  # tokens whose loss is measured
WAYS = {
    "raw window only": {"soft": False, "copy": False},
    "soft prompts": {"copy": False},
    "copying, no slot at all": {"soft": False},
    "copying from rebuilt latents": {"soft": False, "copy": "rebuilt"},
    "soft prompts + copying (default)": {},
    "the same + 2 recalled chunks": {"recall": 2},
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
    for name, options in WAYS.items():
        history = CompressedHistory(host, crouter, window=512, **options)
        loss = -history.score(ids, last=LAST).mean().item()
        report = history.report(reconstruction_nlls=False)
        history.detach()
        print(f"{name:34s}  loss {loss:.4f}  {report.peak_slots:5,} slots  archive {report.archive_bytes:,} bytes")
    print("\nwhat was recalled:")
    for line in report.retrievals:
        print(f"  at {line.length:,} tokens: chunk {line.chunk} ({line.reason})")


if __name__ == "__main__":
    main()
