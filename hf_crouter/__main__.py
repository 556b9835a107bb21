"""`python -m hf_crouter` is `hf-crouter`."""

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())
