"""Tiles of arrays in memory: how they are read and written, and how vmap meets them.

Arrays have four axes: batch, heads, positions and head size; the layout says where the positions
lie. A batch axis of size 1 serves every batch element, since dynamic slices are clamped into the
array. Query head n reads key/value head n // G, so the G heads of a group lie side by side.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import Array, lax
from jax import numpy as jnp

_ZERO = np.int32(0)  # a Python 0 is int64 under x64, and the starts of a slice must agree


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


def take_tile(
    layout: Layout, x: Array, b: Array, head: Array, heads: int, start: Array, size: int
) -> Array:
    """(heads, size, H): positions start..start+size-1 of some heads of one element."""
    sizes = layout.axes(1, heads, size, x.shape[-1])
    tile = lax.dynamic_slice(x, layout.axes(b, head, start, _ZERO), sizes)[0]
    return jnp.moveaxis(tile, layout.value - 1, 1)


def put_tile(layout: Layout, x: Array, tile: Array, b: Array, head: Array, start: Array) -> Array:
    """x with tile (heads, size, H) written where ``take_tile`` would read it."""
    tile = jnp.moveaxis(tile, 1, layout.value - 1)[None]
    return lax.dynamic_update_slice(x, tile, layout.axes(b, head, start, _ZERO))


def fold_batch(function: Callable[[Any], Any], operands: Any) -> Any:
    """function(operands), where a vmap folds its axis into the batch, the arrays' first axis.

    The loops of ``function`` keep their trip counts so: under a plain vmap, a loop with a batched
    bound runs as long as the longest for all, and every tile grows by the vmapped axis.
    """
    call = jax.custom_batching.custom_vmap(function)

    @call.def_vmap
    def _(axis_size: int, batched: list[Any], operands: Any) -> tuple[Any, Any]:
        sizes = jax.tree.map(lambda x, has_axis: x.shape[1 if has_axis else 0], operands, *batched)
        B = max(jax.tree.leaves(sizes))

        def fold(x: Array, has_axis: bool) -> Array:
            if not has_axis and x.shape[0] == 1:
                return x  # still serves every element
            if not has_axis:
                x = x[None]
            x = jnp.broadcast_to(x, (axis_size, B, *x.shape[2:]))
            return x.reshape(axis_size * B, *x.shape[2:])

        results = fold_batch(function, jax.tree.map(fold, operands, *batched))
        results = jax.tree.map(lambda x: x.reshape(axis_size, B, *x.shape[1:]), results)
        return results, jax.tree.map(lambda _: True, results)

    return call(operands)
