"""Corpora by name, without duplicates, split once, as token arrays."""
