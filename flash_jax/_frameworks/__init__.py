"""Attention as layers of frameworks call it."""
