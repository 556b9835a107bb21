"""Routing among eight experts of a real host: their data and training, what is measured, decided and reported."""
