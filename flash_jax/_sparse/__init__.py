"""Sparse attention: which tiles are worth reading, chosen from the data."""
