"""A corpus from the standard library, prepared with a tokenizer that was trained on it."""

import functools
import sysconfig
import tempfile
from pathlib import Path

from hf_crouter.data.prepare import prepare
from hf_crouter.data.split import SplitRules

from ..trained_crouter import make_tokenizer

SOURCES = ("argparse", "ast", "bisect", "calendar", "cmd", "codecs", "configparser", "copy", "csv", "difflib", "dis",
           "fileinput", "fractions", "ftplib", "gettext", "glob", "gzip", "heapq", "inspect", "keyword", "mailbox",
           "netrc", "numbers", "opcode", "pdb", "pprint", "queue", "random", "sched", "shelve", "socket", "tarfile",
           "textwrap", "trace", "uuid", "zipapp")  # fmt: skip
LENGTH = 16
CONFIG = [
    f"chunk_length={LENGTH}", "num_latents=2", "latent_size=24", "embedding_size=16", "hidden_size=32",
    "intermediate_size=48", "num_attention_heads=2", "num_encoder_layers=1", "num_decoder_layers=1",
]  # fmt: skip


@functools.cache
def prepared() -> tuple[Path, Path]:
    """Folders of the corpus' tokens and of its tokenizer."""
    root = Path(tempfile.mkdtemp(prefix="prepared-"))
    library, corpus = Path(sysconfig.get_path("stdlib")), root / "corpus"
    texts = {n: (library / f"{n}.py").read_text(encoding="utf-8") for n in SOURCES if (library / f"{n}.py").exists()}
    corpus.mkdir()
    for name, text in texts.items():
        (corpus / f"{name}.py").write_text(text[:12_000], encoding="utf-8")
    tokenizer = make_tokenizer(text="".join(texts.values())[:200_000])
    tokenizer.save_pretrained(root / "tokenizer")
    rules = SplitRules(files_share=0.15, calibration_share=0.15)
    prepare([f"text-files:{corpus}"], tokenizer, root / "data", rules=rules, workers=1, progress=False)
    return root / "data", root / "tokenizer"
