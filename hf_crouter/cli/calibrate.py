"""`hf-crouter calibrate`: which reconstruction NLL is usual for a crouter, from held-out documents."""

from __future__ import annotations

import argparse
from pathlib import Path

from torch import nn

from ..crouter.loading import load_crouter
from ..data.corpora import load_corpus
from ..data.dedup import deduplicate
from ..data.tokens import encode_documents
from ..errors import InputError
from ..training.reconstruct import calibrate
from ..utils.progress import Progress
from .console import Column, print_json, print_table
from .inputs import device, positive

NAME = "calibrate"
HELP = "measure which reconstruction NLL is usual on new documents, and write the crouter's calibration.json"
EXAMPLE = "hf-crouter calibrate --crouter runs/code/crouter --corpus wheels:flask,tornado"


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("--crouter", required=True, help="folder of the crouter; gets the new calibration.json")
    parser.add_argument("--corpus", action="append", required=True,
                        help="documents kept out of training and of every test; may be repeated")  # fmt: skip
    parser.add_argument("--chunks", type=positive, default=1000, metavar="N",
                        help="chunks measured, evenly spread over the documents (default: 1000)")  # fmt: skip
    parser.add_argument("--device", default="cpu", help="where to compute (default: cpu)")
    parser.add_argument("--json", action="store_true", help="print the calibration as JSON")


def run(args: argparse.Namespace) -> int:
    """Measures, writes `calibration.json` and prints the quantiles."""
    if not Path(args.crouter).is_dir():
        raise InputError(f"--crouter: expected a local folder, got {args.crouter}")
    crouter, tokenizer = load_crouter(args.crouter)
    with Progress(enabled=not args.json) as progress:
        found = [document for spec in args.corpus for document in load_corpus(spec, progress=progress)]
        documents = deduplicate(found).documents
        if not documents:
            raise InputError(f"--corpus: expected documents, got none in {', '.join(args.corpus)}")
        tokens = encode_documents(documents, tokenizer, separator_id=0)  # counted in no chunk
    nn.Module.to(crouter, device(args.device))
    calibration = calibrate(crouter, tokens, limit=args.chunks)
    path = calibration.save(args.crouter)
    if args.json:
        print_json({"path": str(path), "chunks": calibration.chunks, "documents": calibration.documents,
                    "quantiles": calibration.quantiles})  # fmt: skip
    else:
        print(f"{path}: {calibration.chunks} chunks of {calibration.documents} documents")
        rows = [(f"{quantile:g}", f"{value:.3f}") for quantile, value in calibration.quantiles.items()]
        print_table([Column("quantile"), Column("reconstruction NLL nats/token")], rows)
    return 0
