"""The block schedule: which tiles of the score matrix are full, partial or skipped.

The mask makes a tile of (block_q, block_kv) pairs
    full     every pair is kept: no mask work
    partial  the mask is applied inside the tile
    skipped  no pair is kept: neither loaded nor multiplied
A row of the schedule is worked out when its tile of queries is reached: memory stays O(T + S).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np
from jax import Array, lax
from jax import numpy as jnp

from .._checks.shapes import as_block_sizes, positive_integer
from .._tiles.tile import Axis, BlockSizes, QueryTile
from .positions import Mask, first_tile

SKIPPED, PARTIAL, FULL = 0, 1, 2


def never_partial(mask: Mask | None, kv: Axis) -> bool:
    """Whether it is known before any value is that every tile is full."""
    return mask is None and not kv.ragged


def status(mask: Mask | None, tile: QueryTile) -> Array:
    """A row of the schedule: SKIPPED, PARTIAL or FULL of each key tile, int32 (key tiles,)."""
    count = tile.kv.count
    complete = tile.keys.first == tile.kv.start(lax.iota(np.int32, count)).reshape(1, 1, 1, -1)
    some, every = (True, True) if mask is None else mask.tiles(tile)
    shape = (tile.heads, tile.groups, 1, count)
    some = jnp.any(jnp.broadcast_to(some, shape), axis=(0, 1, 2))
    every = jnp.all(jnp.broadcast_to(every & complete, shape), axis=(0, 1, 2))
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


def keep_tile(mask: Mask | None, tile: QueryTile, j: Array) -> Array:
    """The mask inside key tile j, broadcastable to ``tile.shape()``: repeated keys count once."""
    own = tile.s(j) >= j * tile.kv.block
    return own if mask is None else own & mask.keep(tile, j)


class BlockSchedule:
    """A schedule to look at: which tiles a mask makes full, partial or skipped.

    Attributes:
        tiles: (query tiles, key tiles) int32 of ``BlockSchedule.FULL``, ``PARTIAL`` or ``SKIPPED``.
            Where block_q does not divide T, the last tile of queries is moved up to end at T.
        block_sizes: positions per tile.

    Example:
        >>> from flash_jax import CausalMask
        >>> block_schedule(CausalMask(), 6, 6, (2, 2)).counts
        {'full': 3, 'partial': 3, 'skipped': 3}
    """

    FULL, PARTIAL, SKIPPED = FULL, PARTIAL, SKIPPED

    def __init__(self, tiles: np.ndarray, block_sizes: BlockSizes) -> None:
        self.tiles = tiles
        self.block_sizes = block_sizes

    @property
    def counts(self) -> dict[str, int]:
        """How many tiles are full, partial and skipped."""
        names = {"full": FULL, "partial": PARTIAL, "skipped": SKIPPED}
        return {name: int(np.sum(self.tiles == kind)) for name, kind in names.items()}

    def __repr__(self) -> str:
        letters = np.array([".", "/", "#"])[self.tiles]
        counts = ", ".join(f"{count} {name}" for name, count in self.counts.items())
        table = "\n".join(" ".join(row) for row in letters)
        blocks = f"{self.block_sizes.q} x {self.block_sizes.kv}"
        return f"{blocks} tiles: {counts} (# full, / partial, . skipped)\n{table}"


def block_schedule(
    mask: Mask | None,
    T: int,
    S: int,
    block_sizes: tuple[int, int],
    *,
    batch: int = 0,
    head: int = 0,
) -> BlockSchedule:
    """The schedule that attention with this mask follows.

    Args:
        mask: which pairs are kept; None keeps all.
        T: number of queries.
        S: number of keys.
        block_sizes: positions per tile, queries and keys.
        batch: which batch element, where the mask's arrays differ between them.
        head: which query head.

    Returns:
        The schedule of T / block_q rows and S / block_kv columns, rounded up.

    Raises:
        ValueError: a size is not positive, or the mask's arrays do not fit; the message names it.
        TypeError: a size or an index is no integer, or mask is no Mask.

    Example:
        >>> from flash_jax import CausalMask
        >>> block_schedule(CausalMask(), 6, 6, (2, 2))
        2 x 2 tiles: 3 full, 3 partial, 3 skipped (# full, / partial, . skipped)
        / . .
        # / .
        # # /
    """
    if not (mask is None or isinstance(mask, Mask)):
        raise TypeError(f"mask must be a Mask or None; it is {type(mask).__name__}")
    T, S = positive_integer("T", T), positive_integer("S", S)
    bound, tile = first_tile(mask, T, S, as_block_sizes(block_sizes), batch, head)
    rows = jax.jit(jax.vmap(lambda i: status(bound, tile._replace(i=i))))
    tiles = rows(lax.iota(np.int32, tile.q.count))
    return BlockSchedule(np.asarray(tiles), BlockSizes(tile.q.block, tile.kv.block))
