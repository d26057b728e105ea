"""The block schedule: which tiles of the score matrix are full, partial or skipped.

The mask makes a tile of (block_q, block_kv) pairs
    full     every pair is kept: no mask work
    partial  the mask is applied inside the tile
    skipped  no pair is kept: neither loaded nor multiplied
A row of the schedule is computed when its tile of queries is reached, so memory stays O(T + S). A
mask may list the tiles that it may keep (``Mask.listed``): the row is then computed of these alone.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jax import Array, lax
from jax import numpy as jnp

from .._tiles.axis import Axis
from .._tiles.symbolic import known
from .._tiles.tile import QueryTile
from .base import Mask

SKIPPED, PARTIAL, FULL = 0, 1, 2


def never_partial(mask: Mask | None, kv: Axis) -> bool:
    """Whether it is known before any value is that every tile is full."""
    return mask is None and not kv.ragged


def status(mask: Mask | None, tile: QueryTile) -> Array:
    """A row of the schedule: SKIPPED, PARTIAL or FULL of each key tile, int32 (key tiles,)."""
    count = tile.kv.count
    some, every = (True, True) if mask is None else mask.tiles(tile)
    shape = (tile.heads, tile.groups, 1, count)
    some = jnp.any(jnp.broadcast_to(some, shape), axis=(0, 1, 2))
    every = jnp.all(jnp.broadcast_to(every & tile.complete, shape), axis=(0, 1, 2))
    return _kind(some, every)


def _kind(some: Array, every: Array) -> Array:
    """What tiles are of which some and all pairs are kept."""
    return jnp.where(some, jnp.where(every, np.int32(FULL), np.int32(PARTIAL)), np.int32(SKIPPED))


class Visits(NamedTuple):
    """The key tiles that one query tile visits: order[:full] are full, order[full:end] partial."""

    order: Array  # (key tiles,) int32
    full: Array
    end: Array


def visits(row: Array) -> Visits:
    """The tiles of one row of the schedule in the order of their visit."""
    order = jnp.argsort(-row, stable=True).astype(np.int32)
    full = jnp.sum(row == FULL, dtype=np.int32)
    return Visits(order, full, full + jnp.sum(row == PARTIAL, dtype=np.int32))


class HeadVisits(NamedTuple):
    """The key tiles that each head visits: order[n, :full[n]] are full, up to end[n] partial."""

    order: Array  # (heads, n) int32, -1 behind end; whole visits of tile.wide
    full: Array  # (heads,)
    end: Array  # (heads,)


def visits_of_heads(mask: Mask, tile: QueryTile) -> HeadVisits:
    """The row of the schedule of each key/value head, of the tiles that the mask lists."""
    assert tile.wide is not None
    j = mask.listed(tile)
    j = lax.iota(np.int32, tile.kv.count)[None] if j is None else _once(j)
    j = jnp.broadcast_to(j, (tile.heads, j.shape[1]))
    listed = tile._replace(listed=j[:, None, None])
    some, every = mask.tiles(listed)
    shape = (tile.heads, tile.groups, 1, j.shape[1])
    some = jnp.any(jnp.broadcast_to(some, shape), axis=(1, 2)) & (j >= 0)
    every = jnp.all(jnp.broadcast_to(every & listed.complete, shape), axis=(1, 2))
    kind, order = lax.sort((-_kind(some, every), jnp.where(some, j, -1)), dimension=1, num_keys=1)
    missing = -j.shape[1] % tile.wide if known(j.shape[1]) else tile.wide
    order = jnp.pad(order, [(0, 0), (0, missing)], constant_values=-1)
    full = jnp.sum(kind == -FULL, axis=1, dtype=np.int32)
    return HeadVisits(order, full, full + jnp.sum(kind == -PARTIAL, axis=1, dtype=np.int32))


def _once(j: Array) -> Array:
    """Key tiles (heads, n) in order, with -1 for those that have been there before."""
    j = jnp.sort(j, axis=1)
    again = jnp.pad(j[:, 1:] == j[:, :-1], [(0, 0), (1, 0)])
    return jnp.where(again, np.int32(-1), j)


def keep_tile(mask: Mask | None, tile: QueryTile, j: Array) -> Array:
    """The mask inside key tile j, broadcastable to ``tile.shape()``.

    The last key tile may repeat keys of the one before. They count there, and are masked here.
    """
    own = tile.own_keys(j)
    return own if mask is None else own & mask.keep(tile, j)
