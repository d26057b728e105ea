"""Tiles of arrays in memory: how they are read and written.

Arrays have four axes: batch, heads, positions and head size; the layout says where the positions
lie. Query head n reads key/value head n // G, so the G heads of a group lie side by side.
"""

from __future__ import annotations

import enum
from typing import Any

import jax
import numpy as np
from jax import Array, lax
from jax import numpy as jnp

_ZERO = np.int32(0)  # a Python 0 is int64 under x64, and the starts of a slice must agree


_MOST_STACKED = 8  # the time to compile a stack grows with its length


class Layout(enum.Enum):
    """The axis of the positions; the other axes keep their order."""

    HEADS_FIRST = 2  # (B, N, T, H), as the kernels take them
    HEADS_LAST = 1  # (B, T, N, H), as models hold them

    def axes(self, batch: Any, heads: Any, positions: Any, size: Any) -> list[Any]:
        """One entry per axis, in this layout's order."""
        axes = [batch, heads, size]
        axes.insert(self.value, positions)
        return axes

    def sizes(self, x: Array) -> tuple[int, int, int, int]:
        """B, heads, positions and head size of x."""
        B, N, T, H = self.axes(0, 1, 2, 3)
        return x.shape[B], x.shape[N], x.shape[T], x.shape[H]


@jax.custom_jvp
def heads_first(x: Array) -> Array:
    """(B, K, S, H) of x (B, S, K, H), in one copy.

    Head by head: XLA:CPU 0.12 transposes an array of which a loop reads few rows into another order
    than the loop reads, and copies it once more.
    """
    heads = x.shape[2]
    if heads not in range(2, _MOST_STACKED + 1):
        return jnp.swapaxes(x, 1, 2)
    return jnp.stack([lax.index_in_dim(x, n, 2, keepdims=False) for n in range(heads)], axis=1)


@heads_first.defjvp
def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    # Transposed, the copy of heads would become a sum of them.
    return heads_first(*primals), jnp.swapaxes(*tangents, 1, 2)


def slice_tile(
    layout: Layout, x: Array, row: Array, head: Array, heads: int, start: Array, size: int
) -> Array:
    """``take_tile``, with the axes as the layout has them."""
    sizes = layout.axes(1, heads, size, x.shape[-1])
    return lax.dynamic_slice(x, layout.axes(row, head, start, _ZERO), sizes)[0]


def take_tile(
    layout: Layout, x: Array, row: Array, head: Array, heads: int, start: Array, size: int
) -> Array:
    """(heads, size, H): positions start..start+size-1 of some heads of one batch element."""
    tile = slice_tile(layout, x, row, head, heads, start, size)
    if layout is Layout.HEADS_LAST and jnp.issubdtype(x.dtype, jnp.floating):
        tile = jnp.where(jnp.isnan(tile), jnp.nan, tile)  # XLA transposes a select twice as fast
    return jnp.moveaxis(tile, layout.value - 1, 1)


def put_tile(layout: Layout, x: Array, tile: Array, row: Array, head: Array, start: Array) -> Array:
    """x with tile (rows, heads, size, H) written to rows, heads and positions from these on."""
    tile = jnp.moveaxis(tile, 2, layout.value)
    return lax.dynamic_update_slice(x, tile, layout.axes(row, head, start, _ZERO))
