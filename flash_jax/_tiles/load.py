"""Tiles of arrays: how they are read from memory and written to it."""

from __future__ import annotations

import jax
import numpy as np
from jax import Array, lax
from jax import numpy as jnp

from .layout import Layout
from .xla import apart

_ZERO = np.int32(0)  # a Python 0 is int64 under x64, and the starts of a slice must agree
_MOST_STACKED = 8  # heads copied one by one: the time to compile a stack grows with its length


@jax.custom_jvp
def heads_first(x: Array) -> Array:
    """x (B, S, K, H) as (B, K, S, H), in one copy.

    Few heads are copied one by one. XLA:CPU 0.12 transposes an array of which a loop reads few rows
    into another order than the loop reads, and copies it once more.
    """
    heads = x.shape[2]
    if heads not in range(2, _MOST_STACKED + 1):
        return apart(jnp.swapaxes(x, 1, 2))
    each = [lax.index_in_dim(x, n, 2, keepdims=False) for n in range(heads)]
    return apart(jnp.stack(each, axis=1))


@heads_first.defjvp
def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    # The transpose of the copies head by head would be a sum over heads.
    return heads_first(*primals), jnp.swapaxes(*tangents, 1, 2)


def slice_tile(
    layout: Layout, x: Array, entry: Array, head: Array, heads: int, start: Array, size: int
) -> Array:
    """As ``take_tile``, with the axes in the layout's order."""
    sizes = layout.axes(1, heads, size, x.shape[-1])
    return lax.dynamic_slice(x, layout.axes(entry, head, start, _ZERO), sizes)[0]


def take_tile(
    layout: Layout, x: Array, entry: Array, head: Array, heads: int, start: Array, size: int
) -> Array:
    """(heads, size, H): positions start..start+size-1 of some heads of x[entry]."""
    tile = slice_tile(layout, x, entry, head, heads, start, size)
    if layout is Layout.HEADS_LAST and jnp.issubdtype(x.dtype, jnp.floating):
        tile = apart(tile)
    return jnp.moveaxis(tile, layout.value - 1, 1)


def take_tiles(
    layout: Layout, x: Array, entry: Array, head: Array, start: Array, shape: tuple[int, ...]
) -> Array:
    """Tiles (entries, heads, size, H) of that shape, from entry, head and start on."""
    entries, heads, size, width = shape
    sizes = layout.axes(entries, heads, size, width)
    tiles = lax.dynamic_slice(x, layout.axes(entry, head, start, _ZERO), sizes)
    return jnp.moveaxis(tiles, layout.value, 2)


def put_tile(
    layout: Layout, x: Array, tile: Array, entry: Array, head: Array, start: Array
) -> Array:
    """x with tile (entries, heads, size, H) written from entry, head and start on."""
    tile = jnp.moveaxis(tile, 2, layout.value)
    if tile.shape == x.shape:
        return apart(tile) if layout is Layout.HEADS_LAST else tile
    return lax.dynamic_update_slice(x, tile, layout.axes(entry, head, start, _ZERO))
