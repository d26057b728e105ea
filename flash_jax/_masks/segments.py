"""Masks by segment: packed documents, each of which reads itself only."""

from __future__ import annotations

from typing import ClassVar

import jax
from jax import Array
from jax import numpy as jnp
from jax.typing import ArrayLike

from .._checks.bind import Sizes, bind_integers
from .._tiles.symbolic import as_int32, largest
from .._tiles.tile import QueryTile
from .base import Mask, mask_type


@mask_type
class SegmentMask(Mask):
    """A query reads the keys of its own segment: packed documents.

    Tiles are judged by the smallest and the largest id in them. Most tiles are skipped where the
    ids are sorted, or at least come in runs.

    Args:
        q_ids: integers (T,) or (B, T).
        kv_ids: integers (S,) or (B, S).

    Example:
        >>> ids = jnp.array([7, 7, 9])
        >>> print(SegmentMask(ids, ids).to_array(3, 3).astype(int))
        [[1 1 0]
         [1 1 0]
         [0 0 1]]
    """

    arrays: ClassVar = {"q_ids": "T", "kv_ids": "S"}
    q_ids: ArrayLike
    kv_ids: ArrayLike

    def bind(self, sizes: Sizes) -> Mask:
        q_ids = bind_integers("SegmentMask.q_ids", self.q_ids, "T", sizes)
        kv_ids = bind_integers("SegmentMask.kv_ids", self.kv_ids, "S", sizes)
        return segments(q_ids, kv_ids)

    def keep(self, tile: QueryTile, j: Array) -> Array:
        return tile.of_queries(self.q_ids) == tile.of_keys(self.kv_ids, j)

    def tiles(self, tile: QueryTile) -> tuple[Array, Array]:
        q = tile.of_queries(self.q_ids)
        kv = tile.in_key_tiles(tile.of_instance(self.kv_ids).reshape(1, 1, 1, -1))
        q_low, q_high = jnp.min(q), jnp.max(q)
        low, high = tile.of_listed(jnp.min(kv, -1)), tile.of_listed(jnp.max(kv, -1))
        some = (low <= q_high) & (q_low <= high)
        return some, some & (low == high) & (q_low == q_high)

    def read_keys(self, T: int, S: int) -> Array:
        q_ids, kv_ids = jnp.sort(jnp.asarray(self.q_ids), axis=1), jnp.asarray(self.kv_ids)
        instances = largest((q_ids.shape[0], kv_ids.shape[0]))
        q_ids, kv_ids = (jnp.broadcast_to(x, (instances, x.shape[1])) for x in (q_ids, kv_ids))
        first = jax.vmap(jnp.searchsorted)(q_ids, kv_ids)  # of the query ids that are not less
        last = as_int32(T - 1 if T != 0 else 0)
        nearest = jnp.take_along_axis(q_ids, jnp.minimum(first, last), axis=1, mode="clip")
        return nearest == kv_ids


def segments(q_ids: Array, kv_ids: Array) -> SegmentMask:
    """The bound mask of bound ids, whose integer dtypes may differ."""
    dtype = jnp.promote_types(q_ids.dtype, kv_ids.dtype)
    return SegmentMask(q_ids.astype(dtype), kv_ids.astype(dtype))
