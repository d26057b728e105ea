"""What is masked changes nothing, NaN and infinities included.

A masked probability is 0, but 0 * NaN is NaN. So in a partial tile values are multiplied with 0 in
place of NaN and infinities, and where there were any, those that a query reads are added at the
end. A visible NaN must reach the output; a masked one must not.
"""

from __future__ import annotations

from collections.abc import Callable

from jax import Array, lax
from jax import numpy as jnp

from .._masks.schedule import HeadVisits, Visits
from .._tiles.tile import QueryTile
from .._tiles.xla import dot, in_every_element
from .operands import Operands, kv_tile
from .plan import Plan
from .walk import over_key_tiles


def finite(x: Array) -> Array:
    """x with 0 for NaN and infinities."""
    return jnp.where(jnp.isfinite(x), x, 0)


def all_finite(v: Array, dtype: jnp.dtype) -> Array:
    """Whether all of v is finite, by one fast sum in the dtype: 0 * v is NaN where v is not."""
    return jnp.isfinite(jnp.sum(v * 0, dtype=dtype))


def with_kept_nonfinite(
    operands: Operands,
    plan: Plan,
    tile: QueryTile,
    visited: Visits | HeadVisits | None,
    kept: Callable[[Array], Array],
    clean: Array,
    o: Array,
) -> Array:
    """o (heads, rows, Hv) with the NaN and infinities that are kept in partial tiles.

    Args:
        visited: the key tiles, as ``over_key_tiles`` has been given them.
        kept: the mask of a key tile.
        clean: whether there is none, masked or kept.
    """

    def step(masked: bool):
        return add if masked else lambda j, o: o  # a full tile has added its own

    def add(j: Array, o: Array) -> Array:
        v = kv_tile(plan, tile, operands.v, j, o.dtype, operands.pages)
        return with_nonfinite(kept(j), v, o)

    show = lambda o: over_key_tiles(operands, tile, visited, step, o)  # noqa: E731
    return lax.cond(in_every_element(clean), lambda o: o, show, o)


def with_nonfinite(kept: Array, v: Array, o: Array) -> Array:
    """o (heads, rows, Hv) with the NaN and infinities of v (heads, keys, Hv) that are kept."""
    kinds = jnp.concatenate([jnp.isnan(v), jnp.isposinf(v), jnp.isneginf(v)], axis=-1)
    seen = jnp.split(dot(kept.astype(o.dtype), kinds.astype(o.dtype)) > 0, 3, axis=-1)
    for rows, value in zip(seen, (jnp.nan, jnp.inf, -jnp.inf), strict=True):
        o += jnp.where(rows, jnp.array(value, o.dtype), 0)
    return o
