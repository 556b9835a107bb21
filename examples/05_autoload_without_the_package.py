"""A crouter's folder is all that `AutoModel` needs: hf_crouter itself need not be installed.

    python examples/05_autoload_without_the_package.py [FOLDER]

What comes out: a second Python in which `import hf_crouter` fails loads the model with `trust_remote_code=True` (the
folder carries the model's source beside its weights), compresses a text and rebuilds it.
"""

import argparse
import os
import subprocess
import sys
import tempfile

from hf_crouter.crouter.loading import shipped_crouter

WITHOUT_THE_PACKAGE = """
import sys

sys.modules["hf_crouter"] = None  # from here on `import hf_crouter` fails

import transformers

transformers.utils.logging.set_verbosity_error()
crouter = transformers.AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True, dtype="float32").eval()
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
try:
    import hf_crouter
except ImportError:
    print("hf_crouter cannot be imported here")
print("loaded", type(crouter).__name__, "from", type(crouter).__module__.split(".")[0])

text = "def area(width, height):\\n    return width * height\\n"
ids = tokenizer(text, return_tensors="pt").input_ids
latents = crouter.encode(ids)
rebuilt = crouter.reconstruct(latents).input_ids[0, : ids.shape[1]]
print("latents:", tuple(latents.shape))
print("rebuilt from them:")
print(tokenizer.decode(rebuilt))
"""


def main() -> None:
    """Runs the second Python."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", nargs="?", default=str(shipped_crouter()), help="of a crouter")
    folder = parser.parse_args().folder
    with tempfile.TemporaryDirectory() as cache:  # transformers copies the model's source here
        environment = os.environ | {"HF_MODULES_CACHE": cache, "HF_HUB_OFFLINE": "1"}
        subprocess.run([sys.executable, "-c", WITHOUT_THE_PACKAGE, folder], env=environment, check=True)


if __name__ == "__main__":
    main()
