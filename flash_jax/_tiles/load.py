"""Tiles of arrays: how they are read from memory and written to it."""

from __future__ import annotations

import numpy as np
from jax import Array, lax
from jax import numpy as jnp

from .layout import Layout
from .xla import apart

_ZERO = np.int32(0)  # a Python 0 is int64 under x64, and the starts of a slice must agree


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


def take_tiles_at(
    layout: Layout, x: Array, entry: Array, heads: Array, starts: Array, size: int
) -> Array:
    """(..., size, H): positions of x[entry] from ``starts`` on, of one head each, (...) int32.

    Where they begin is computed apart, and not for every number that is read.
    """
    entries = jnp.broadcast_to(entry, starts.shape)
    at = jnp.stack(layout.axes(entries, heads, starts, jnp.zeros_like(starts))[:3], axis=-1)
    at = lax.optimization_barrier(at)
    lead = starts.ndim
    numbers = lax.GatherDimensionNumbers(
        offset_dims=(lead, lead + 1),
        collapsed_slice_dims=(0, 3 - layout.value),
        start_index_map=(0, 1, 2),
    )
    sizes = tuple(layout.axes(1, 1, size, x.shape[-1]))
    return lax.gather(x, at, numbers, sizes, mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS)


def put_tile(
    layout: Layout, x: Array, tile: Array, entry: Array, head: Array, start: Array
) -> Array:
    """x with tile (entries, heads, size, H) written from entry, head and start on."""
    tile = jnp.moveaxis(tile, 2, layout.value)
    if tile.shape == x.shape:
        return apart(tile) if layout is Layout.HEADS_LAST else tile
    return lax.dynamic_update_slice(x, tile, layout.axes(entry, head, start, _ZERO))
