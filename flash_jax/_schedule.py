"""The block schedule: which tiles of the score matrix are full, partial or skipped.

Queries and keys are cut into tiles of (block_q, block_kv) pairs. The mask makes a tile
    full     every pair is kept: no mask work
    partial  the mask is applied inside the tile
    skipped  no pair is kept: neither loaded nor multiplied
One row of the schedule is worked out when its query tile is reached, so memory stays O(T + S).

Lengths need not divide: the last tile starts where it still fits, and so repeats some positions of
the tile before it. Repeated queries are computed twice; repeated keys are masked.
"""

from __future__ import annotations

import numbers
from typing import NamedTuple

import jax
import numpy as np
from jax import Array, lax
from jax import numpy as jnp

from ._masks import Mask, Range

SKIPPED, PARTIAL, FULL = 0, 1, 2


class BlockSizes(NamedTuple):
    """Positions per tile: queries and keys. They change speed and rounding only."""

    q: int
    kv: int


class Axis(NamedTuple):
    """Positions 0..length-1 in tiles of ``block``."""

    length: int
    block: int

    @property
    def count(self) -> int:
        return -(-self.length // self.block)

    @property
    def ragged(self) -> bool:
        return self.length % self.block != 0

    def start(self, i: Array) -> Array:
        """First position of tile i as it is loaded."""
        return jnp.minimum(i * self.block, self.length - self.block)

    def own(self, i: Array) -> Range:
        """Positions of tile i that no tile before it has."""
        return Range(i * self.block, jnp.minimum((i + 1) * self.block, self.length) - 1)

    def loaded(self, i: Array) -> Range:
        """Positions of tile i as it is loaded."""
        return Range(self.start(i), self.start(i) + self.block - 1)


class Tiling(NamedTuple):
    """How T queries and S keys are cut into tiles. A block is never longer than its axis."""

    q: Axis
    kv: Axis

    @classmethod
    def of(cls, q_len: int, kv_len: int, blocks: BlockSizes) -> Tiling:
        return cls(Axis(q_len, min(q_len, blocks.q)), Axis(kv_len, min(kv_len, blocks.kv)))


def never_partial(mask: Mask | None, tiling: Tiling) -> bool:
    """Whether it is known before any value is that every tile is full."""
    return mask is None and not tiling.kv.ragged


def status(mask: Mask | None, tiling: Tiling, b: Array, n: Array, i: Array) -> Array:
    """Row i of the schedule: SKIPPED, PARTIAL or FULL of each of the key tiles, int32.

    Args:
        b: batch element.
        n: (heads, groups, 1, 1) query heads that share the schedule.
        i: query tile.
    """
    j = lax.iota(np.int32, tiling.kv.count)
    keys = tiling.kv.own(j)
    complete = keys.first == tiling.kv.start(j)
    if mask is None:
        return jnp.where(complete, np.int32(FULL), np.int32(PARTIAL))
    keys = Range(*(x.reshape(1, 1, 1, -1) for x in keys))
    shape = (*n.shape[:2], 1, tiling.kv.count)
    some, every = mask.tiles(b, n, tiling.q.loaded(i), keys)
    some = jnp.any(jnp.broadcast_to(some, shape), axis=(0, 1, 2))
    every = jnp.all(jnp.broadcast_to(every, shape), axis=(0, 1, 2)) & complete
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


def keep_tile(mask: Mask | None, tiling: Tiling, b: Array, n: Array, i: Array, j: Array) -> Array:
    """The mask inside tile (i, j), bool, broadcastable to (heads, groups, block_q, block_kv)."""
    t = (tiling.q.start(i) + lax.iota(np.int32, tiling.q.block)).reshape(1, 1, -1, 1)
    s = (tiling.kv.start(j) + lax.iota(np.int32, tiling.kv.block)).reshape(1, 1, 1, -1)
    own = s >= j * tiling.kv.block
    return own if mask is None else own & mask.keep(b, n, t, s)


class BlockSchedule:
    """A schedule to look at: which tiles a mask makes full, partial or skipped.

    Attributes:
        tiles: (query tiles, key tiles) int32 of ``BlockSchedule.FULL``, ``PARTIAL`` or ``SKIPPED``.
        block_sizes: positions per tile.
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
    mask: Mask | None, q_len: int, kv_len: int, block_sizes: tuple[int, int]
) -> BlockSchedule:
    """The schedule that attention with this mask follows.

    Args:
        mask: which pairs are kept; None keeps all.
        q_len: T.
        kv_len: S.
        block_sizes: positions per tile, queries and keys.

    Returns:
        The schedule of T / block_q rows and S / block_kv columns, rounded up.

    Raises:
        ValueError: a length or block size is not positive; the message names it.
        TypeError: one is no integer, or mask is no Mask.

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
    lengths = positive_integer("q_len", q_len), positive_integer("kv_len", kv_len)
    blocks = as_block_sizes(block_sizes)
    tiling = Tiling.of(*lengths, blocks)
    b, n = jnp.int32(0), jnp.zeros((1, 1, 1, 1), np.int32)
    rows = jax.vmap(lambda i: status(mask, tiling, b, n, i))
    tiles = rows(lax.iota(np.int32, tiling.q.count))
    return BlockSchedule(np.asarray(tiles), BlockSizes(tiling.q.block, tiling.kv.block))


def as_block_sizes(block_sizes: tuple[int, int]) -> BlockSizes:
    """A pair of positive integers, or an error that names it."""
    if not isinstance(block_sizes, tuple | list) or len(block_sizes) != 2:
        raise TypeError(f"block_sizes must be a pair of integers; it is {block_sizes!r}")
    q, kv = (
        positive_integer(f"block_sizes.{name}", x)
        for name, x in zip(BlockSizes._fields, block_sizes, strict=True)
    )
    return BlockSizes(q, kv)


def positive_integer(name: str, value: object) -> int:
    """value as an int, or an error that names it."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer; it is {value!r}")
    if value <= 0:
        raise ValueError(f"{name} must be > 0; it is {value!r}")
    return int(value)
