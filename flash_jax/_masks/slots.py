"""Masks of caches: queries that are tokens, keys that are held, and keys in a ring.

In a ring slots are no positions: position p lies in slot p modulo S until position p + S comes.
"""

from __future__ import annotations

from typing import ClassVar

from jax import Array
from jax import numpy as jnp
from jax.typing import ArrayLike

from .._tiles.tile import QueryTile
from .base import Mask, mask_type


@mask_type
class TokenMask(Mask):
    """Queries first..end-1 are those of tokens, the others are padding.

    Args:
        first: int32, a scalar or (B,).
        end: int32, alike.
    """

    arrays: ClassVar = {"first": "", "end": ""}
    first: ArrayLike
    end: ArrayLike

    def keep(self, tile: QueryTile, j: Array) -> Array:
        first, end = tile.of_instance(self.first), tile.of_instance(self.end)
        return (tile.t >= first) & (tile.t < end)

    def tiles(self, tile: QueryTile) -> tuple[Array, Array]:
        first, end = tile.of_instance(self.first), tile.of_instance(self.end)
        t = tile.queries
        some, every = (t.last >= first) & (t.first < end), (t.first >= first) & (t.last < end)
        return tuple(jnp.broadcast_to(x, tile.keys.first.shape) for x in (some, every))  # pyright: ignore


@mask_type
class HeldMask(Mask):
    """Every query reads keys from ``first`` on.

    Args:
        first: int32, a scalar or (B,).
    """

    arrays: ClassVar = {"first": ""}
    first: ArrayLike

    def keep(self, tile: QueryTile, j: Array) -> Array:
        return tile.s(j) >= tile.of_instance(self.first)

    def tiles(self, tile: QueryTile) -> tuple[Array, Array]:
        first = tile.of_instance(self.first)
        return tile.keys.last >= first, tile.keys.first >= first


@mask_type
class RingMask(Mask):
    """Keys in a ring of S slots. Query t reads positions t + offset - left .. t + offset +
    right of those that are held: from ``first`` on, below ``length``, and not overwritten.

    Args:
        length: int32 (B,), positions so far.
        first: int32 (B,).
        offset: int32 (B,).
        left: how many keys before position t + offset.
        right: how many keys after it; None: all.
    """

    arrays: ClassVar = {"length": "", "first": "", "offset": ""}
    length: ArrayLike
    first: ArrayLike
    offset: ArrayLike
    left: int
    right: int | None

    def keep(self, tile: QueryTile, j: Array) -> Array:
        length, first, offset = map(tile.of_instance, (self.length, self.first, self.offset))
        s = position_of(tile.s(j), length, tile.key_count)
        t = tile.t + offset
        kept = (s >= jnp.maximum(first, 0)) & (s >= t - self.left)
        return kept if self.right is None else kept & (s <= t + self.right)

    def tiles(self, tile: QueryTile) -> tuple[Array, Array]:
        unknown = jnp.full_like(tile.keys.first, True, dtype=bool)
        return unknown, ~unknown


def position_of(slot: Array, length: Array, slots: ArrayLike) -> Array:
    """The last position below ``length`` that lies in a slot of a ring; < 0: none yet."""
    last = length - 1
    return last - jnp.mod(last - slot, slots)
