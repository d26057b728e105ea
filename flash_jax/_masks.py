"""Masks as O(T + S) descriptions of which query may read which key.

A mask answers two questions, and no (T, S) array is built to answer either:
    keep   of single pairs: may query t read key s?            -> the mask inside a tile
    tiles  of ranges: does some pair, does every pair remain?  -> skip, mask or run a whole tile

Indices are int32 and broadcast together: b is the batch element, n the query head, t the query and
s the key. Index arrays have four axes, (heads, groups, T, S), or none.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
from jax import Array


class Range(NamedTuple):
    """Positions first..last, both included."""

    first: Any
    last: Any


class Mask:
    """Which pairs of query and key are kept. Hashable or a pytree; never the size of the scores."""

    def keep(self, b: Array, n: Array, t: Array, s: Array) -> Array:
        """bool, broadcast over the indices: query t of head n in batch element b may read key s."""
        raise NotImplementedError

    def tiles(self, b: Array, n: Array, t: Range, s: Range) -> tuple[Array, Array]:
        """(some, every), bool, broadcast over the ranges.

        ``some`` is False only where no pair is kept, ``every`` is True only where all are.
        """
        raise NotImplementedError


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class CausalMask(Mask):
    """Query t reads keys 0..t + offset.

    For T = 2, S = 4 and offset 1 the kept pairs are  1 1 0 0
                                                      1 1 1 0
    """

    offset: int = 0

    def keep(self, b, n, t, s):
        return s <= t + self.offset

    def tiles(self, b, n, t, s):
        return s.first <= t.last + self.offset, s.last <= t.first + self.offset
