"""The `hf-crouter` command: one module a command, listed in `main.py`."""
