"""What produces every figure of the README: `python -m eval.run NAME`."""
