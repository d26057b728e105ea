"""A mask that is the caller's own array."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from jax import Array
from jax import numpy as jnp

from .._checks.bind import Sizes, bind_scores
from .._tiles.tile import QueryTile
from .base import Mask, mask_type


@mask_type
class ArrayMask(Mask):
    """The caller's own array: bool, broadcastable to (B, N, T, S), read tile by tile."""

    arrays: ClassVar = {"kept": "NTS"}
    kept: Array  # (B or 1, N or 1, T or 1, S or 1)

    def bind(self, sizes: Sizes) -> Mask:
        return ArrayMask(bind_scores("mask", self.kept, "bool", np.bool_, sizes))

    def keep(self, tile: QueryTile, j: Array) -> Array:
        return tile.of_scores(self.kept, j)

    def tiles(self, tile: QueryTile) -> tuple[Array, Array]:
        rows = tile.of_scores(self.kept)
        some, every = jnp.any(rows, axis=2, keepdims=True), jnp.all(rows, axis=2, keepdims=True)
        if rows.shape[3] == 1:
            return some, every
        some, every = jnp.any(tile.in_key_tiles(some), -1), jnp.all(tile.in_key_tiles(every), -1)
        return tile.of_listed(some), tile.of_listed(every)

    def read_keys(self, T: int, S: int) -> Array:
        read = jnp.any(self.kept, axis=(1, 2))
        return jnp.broadcast_to(read, (read.shape[0], S))
