"""Positions of one axis, queries or keys, cut into tiles.

These need not divide the length: the last tile starts where it still fits, and so repeats some
positions of the one before.
"""

from __future__ import annotations

from typing import NamedTuple

from jax import Array
from jax import numpy as jnp

from .symbolic import as_int32, known


class Range(NamedTuple):
    """Positions first..last, both included."""

    first: Array
    last: Array


class BlockSizes(NamedTuple):
    """Positions per tile: queries and keys. They change speed and rounding only.

    Example:
        >>> BlockSizes(q=512, kv=256).kv
        256
    """

    q: int
    kv: int


class Axis(NamedTuple):
    """Positions 0..length-1 in tiles of ``block``, which is at most ``length``.

    A symbolic length is a multiple of ``block``.
    """

    length: int
    block: int

    @classmethod
    def of(cls, length: int, block: int) -> Axis:
        return cls(length, min(length, block) if known(length) else block)

    @property
    def count(self) -> int:
        """How many tiles there are."""
        return -(-self.length // self.block)

    @property
    def ragged(self) -> bool:
        """Whether the last tile repeats positions."""
        return self.length % self.block != 0

    def start(self, i: Array) -> Array:
        """First position of tile i as it is loaded."""
        return jnp.minimum(i * self.block, as_int32(self.length - self.block))

    def own(self, i: Array) -> Range:
        """Positions of tile i that no tile before it has."""
        end = jnp.minimum((i + 1) * self.block, as_int32(self.length))
        return Range(i * self.block, end - 1)
