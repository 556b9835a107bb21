"""A crouter of your own: a tokenizer, data, and 300 steps of training on a CPU, some 20 seconds of two idle cores.

    python examples/04_your_own_crouter.py [OUTPUT]

What comes out: the share of tokens that the decoder rebuilds exactly at their position (TRA) while it rises during
training, the same on files that were held out, and the first of them rebuilt. The model is tiny and its task easy,
8 tokens to 2 latents; the shipped crouter does 512 to 8 after eight minutes on a GPU. Its folder loads with
`AutoModel.from_pretrained`, and `hf-crouter compress --crouter` takes it.
"""

import argparse
import json
import sysconfig
import tempfile
from pathlib import Path

import torch
from transformers import AutoModel

from hf_crouter.crouter.loading import load_crouter
from hf_crouter.data.prepare import prepare
from hf_crouter.data.tokens import TokenArray
from hf_crouter.training.evaluate import reconstruction_score
from hf_crouter.training.reconstruct import ReconstructArguments, train_reconstruction

PACKAGES = ("asyncio", "email", "http", "importlib", "logging", "unittest", "xml")
CONFIG = [
    "chunk_length=8", "num_latents=2", "latent_size=128", "embedding_size=64", "hidden_size=128",
    "intermediate_size=128", "num_attention_heads=4", "num_encoder_layers=1", "num_decoder_layers=1",
]  # fmt: skip


def main() -> None:
    """Prepares source of the standard library, trains, and measures what was held out."""
    parser = argparse.ArgumentParser()
    parser.add_argument("output", nargs="?", help="folder to keep; a temporary one by default")
    output = parser.parse_args().output or tempfile.mkdtemp(prefix="your-own-crouter-")
    data, words = Path(output, "data"), Path(output, "tokenizer")
    library = Path(sysconfig.get_path("stdlib"))
    texts = [path.read_text(encoding="utf-8") for path in sorted(library.glob("[a-z]*.py"))]
    tokenizer = load_crouter()[1].train_new_from_iterator(texts, 512, show_progress=False)
    tokenizer.save_pretrained(words)
    corpus = "text-files:" + ",".join(str(library / name) for name in PACKAGES)
    prepare([corpus], tokenizer, data, progress=False)

    arguments = ReconstructArguments(
        output=output, data=str(data), tokenizer=str(words), config=CONFIG, steps=300, batch_size=128,
        learning_rate=1e-2, warmup_steps=20, log_every=10,
    )  # fmt: skip
    train_reconstruction(arguments)

    log = [json.loads(line) for line in Path(output, "log.jsonl").read_text().splitlines()]
    rows = log[:: max(1, len(log) // 8)]
    print("\nTRA in training: " + ", ".join(f"{row['seconds']:.0f} s {row['tra']:.1%}" for row in rows))
    crouter = AutoModel.from_pretrained(Path(output, "crouter"), dtype=torch.float32)
    chunks = TokenArray.load(data / "files.safetensors").chunks(8)
    ids, mask = (torch.from_numpy(array[:1000]) for array in chunks)
    score = reconstruction_score(crouter, ids, mask)
    accuracy, nll = score.accuracy, score.reconstruction_nll
    print(f"TRA on {score.chunks} chunks of held-out files: {accuracy:.1%}, {nll:.3f} nats/token")
    rebuilt = crouter.reconstruct(crouter.encode(ids[:6], mask[:6])).input_ids
    print(f"the first of them:    {tokenizer.decode(ids[:6][mask[:6]])!r}")
    print(f"rebuilt from latents: {tokenizer.decode(rebuilt[mask[:6]])!r}")
    print("the crouter:", Path(output, "crouter"))


if __name__ == "__main__":
    main()
