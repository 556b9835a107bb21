"""Figures of the routing measurement from its arrays, by subject."""
