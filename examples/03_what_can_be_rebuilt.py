"""Reconstruction tells domains apart: the crouter rebuilds what it was trained on, and says where it cannot.

    python examples/03_what_can_be_rebuilt.py

What comes out: reconstruction NLL, exactly rebuilt tokens and grade of chunks of Python code, of English prose (the
language reference that `help()` shows) and of random token ids. The shipped crouter was trained on Python source; the
standard library was held out. A grade compares an NLL with those of held-out code: "rebuildable" up to their 90%
quantile, "uncertain" up to 99%, "foreign" above. It says whether latents hold a chunk, not whether a host reads them.
"""

import heapq
import textwrap
from pathlib import Path
from pydoc_data.topics import topics

import torch

from hf_crouter.crouter.loading import load_crouter
from hf_crouter.routing.calibration import load_calibration, reconstruction_grade
from hf_crouter.training.evaluate import reconstruction_score

CHUNKS = 4  # of each domain


def main() -> None:
    """Measures a few chunks of each domain."""
    crouter, tokenizer = load_crouter()
    calibration = load_calibration()
    length = crouter.config.chunk_length

    def chunks_of(text: str) -> torch.Tensor:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return torch.tensor(ids[: CHUNKS * length]).view(-1, length)

    code = Path(textwrap.__file__).read_text(encoding="utf-8") + Path(heapq.__file__).read_text(encoding="utf-8")
    prose = "\n".join(topics[name] for name in ("objects", "exceptions", "naming", "typesmapping", "types"))
    random_ids = torch.randint(len(tokenizer), (CHUNKS, length), generator=torch.Generator().manual_seed(0))
    domains = {"Python code": chunks_of(code), "English prose": chunks_of(prose), "random ids": random_ids}

    print("domain         chunk  nats/token  rebuilt exactly  grade")
    means = {}
    for name, ids in domains.items():
        score = reconstruction_score(crouter, ids)
        measures = zip(score.chunk_reconstruction_nll.tolist(), score.chunk_accuracy.tolist(), strict=True)
        for chunk, (reconstruction_nll, accuracy) in enumerate(measures):
            found = reconstruction_grade(calibration, reconstruction_nll)
            print(f"{name:<13}  {chunk:>5}  {reconstruction_nll:>10.3f}  {accuracy:>15.1%}  {found}")
        means[name] = score.reconstruction_nll
    print(
        "mean reconstruction NLL: " + ", ".join(f"{name} {nats:.3f}" for name, nats in means.items()) + " nats/token"
    )


if __name__ == "__main__":
    main()
