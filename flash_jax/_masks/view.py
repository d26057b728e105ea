"""The block schedule as a user looks at it: counts, and a drawing in characters."""

from __future__ import annotations

import functools

import jax
import numpy as np
from jax import Array, lax

from .._checks.numbers import as_block_sizes, positive_integer
from .._tiles.axis import Axis, BlockSizes
from .base import Mask, first_tile, tile_of
from .schedule import FULL, PARTIAL, SKIPPED, status


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
    rows = _rows(bound, tile.element, tile.head, tile.q, tile.kv, tile.elements)
    return BlockSchedule(np.asarray(rows), BlockSizes(tile.q.block, tile.kv.block))


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _rows(
    bound: Mask | None, element: Array, head: Array, q: Axis, kv: Axis, elements: int
) -> Array:
    """The kinds of all tiles: a program that masks of the same kind and sizes share."""
    tile = tile_of(element, head, q, kv, elements)
    return jax.vmap(lambda i: status(bound, tile._replace(i=i)))(lax.iota(np.int32, q.count))
