"""The README's tables, made from `eval/results/*.json`: `python -m eval.tables [--check] [FILE]`."""
