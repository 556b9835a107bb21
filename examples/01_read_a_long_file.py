"""A language model continues a long file whose past it reads compressed.

    python examples/01_read_a_long_file.py [FILE]

What comes out: the continuation, what the file itself says there, and the report: every compressed chunk with its
reconstruction NLL and how many tokens were copied from it, and the bytes of keys and values beside those of the full
history. Soft prompts carry the gist, copying brings exact names from where the far past said them before, and the two
chunks that share most words with the end stand raw again.
"""

import argparse
import smtplib
from pathlib import Path

import torch

from hf_crouter import CompressedHistory, Copy, Retrieve, SoftPrompts, load_crouter, load_host

NEW = 40  # tokens


def main() -> None:
    """Reads all but the last tokens of a file, and writes on."""
    parser = argparse.ArgumentParser()
    parser.add_argument("file", nargs="?", default=smtplib.__file__, help="UTF-8 text of 2,000 tokens or more")
    path = Path(parser.parse_args().file)

    host, tokenizer = load_host("smollm2-135m", dtype=torch.float32)  # any folder or hub name of a Llama-like model
    crouter, _ = load_crouter()  # the small one that comes with the package
    modes = [SoftPrompts(), Copy(), Retrieve(chunks=2)]
    history = CompressedHistory(host, crouter, modes=modes, window=512)

    ids = tokenizer(path.read_text(encoding="utf-8"), return_tensors="pt", verbose=False).input_ids
    prompt, truth = ids[:, :-NEW], ids[0, -NEW:]
    output = host.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=NEW,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
        logits_processor=[history],  # this call alone reads its past compressed
    )

    print(f"--- the end of the prompt ({prompt.shape[1]:,} tokens of {path.name})")
    print(tokenizer.decode(prompt[0, -NEW:]))
    print("--- continued by the host")
    print(tokenizer.decode(output[0, prompt.shape[1] :]))
    print("--- what the file says")
    print(tokenizer.decode(truth))
    print("--- report")
    print(history.report())


if __name__ == "__main__":
    main()
