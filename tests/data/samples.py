"""Documents that every machine has, and a tokenizer of bytes."""

import random
import sysconfig
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_crouter.data.documents import Document

LIBRARY = Path(sysconfig.get_path("stdlib"))
SOURCES = (
    "argparse.py",
    "ast.py",
    "csv.py",
    "difflib.py",
    "inspect.py",
    "json/decoder.py",
    "json/encoder.py",
    "heapq.py",
)


def library_documents(group="code"):
    """Files of the standard library under a group that is not held out."""
    return [Document(f"{group}/{name}", group, (LIBRARY / name).read_text(encoding="utf-8")) for name in SOURCES]


def sentences(seed, count=200):
    """A text of random words, nothing like that of another seed."""
    drawn = random.Random(seed)
    words = ["".join(drawn.choices("abcdefghijklmnopqrstuvwxyz", k=drawn.randint(2, 9))) for _ in range(count)]
    return " ".join(words)


def byte_tokenizer():
    """256 bytes behind `<|endoftext|>` as id 0."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({"<|endoftext|>": 0, **{c: i + 1 for i, c in enumerate(alphabet)}}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
