"""A mask by blocks: a table says which blocks of scores are kept.

A mask that is chosen from the data, or learned, is a small array: a bool per block of block_q
queries and block_kv keys. Blocks that are not kept are neither loaded nor multiplied, so time
follows the number of those that are. The walk takes the blocks of the table as its tiles, and then
every kept tile is full; with other tiles the result is the same, and some tiles are partial.

Child et al., Sparse Transformers, 2019, https://arxiv.org/abs/1904.10509
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import numpy as np
from jax import Array, lax
from jax import numpy as jnp
from jax.typing import ArrayLike

from .._checks.bind import Sizes
from .._checks.numbers import as_block_sizes, positive_integer
from .._checks.tables import bind_table, check_lists, per_query_head
from .._tiles.axis import BlockSizes
from .._tiles.symbolic import as_int32
from .._tiles.tile import QueryTile
from .base import Mask, mask_type


@mask_type
class BlockSparseMask(Mask):
    """Keeps the blocks of scores that a table names. Time follows the number of kept blocks.

    Blocks of block_q queries and block_kv keys begin at 0; the last ones may be shorter. Combined
    with ``CausalMask``, only blocks on the diagonal are partly kept. In ``attend`` rows of the
    table are of the queries of the call, and columns of the slots of the cache. In
    ``ring_attention`` the table is of the whole sequences.

    Query heads that share a key/value head are computed together, and visit what any of them
    keeps: a table per key/value head is the fastest. So are rows that keep about as many blocks in
    all heads, since several heads share a step.

    Args:
        table: bool (T / block_q, S / block_kv), rounded up; in front may be an axis N or K, and an
            axis B in front of that, or 1 for any of them. Head n of N query heads has table n, or
            table n // (N // K) of K. It may be traced, and its values may change without a new
            compilation.
        block_sizes: (block_q, block_kv), positions per block. Large ones are faster.

    Raises:
        ValueError: a block size is not positive; at the call, where the table does not fit.
        TypeError: block_sizes is no pair of integers; at the call, where the table is not bool.

    Example:
        >>> table = np.array([[True, False], [True, True]])
        >>> print(BlockSparseMask(table, (2, 2)).to_array(4, 4).astype(int))
        [[1 1 0 0]
         [1 1 0 0]
         [1 1 1 1]
         [1 1 1 1]]
    """

    arrays: ClassVar = {"table": "N..", "indices": "K.."}
    table: ArrayLike
    block_sizes: tuple[int, int]
    indices: Any = None  # of kept blocks, -1 behind them; set by from_indices

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "block_sizes", as_block_sizes(self.block_sizes))

    @classmethod
    def from_indices(
        cls,
        indices: ArrayLike,
        counts: ArrayLike,
        block_sizes: tuple[int, int],
        key_blocks: int,
    ) -> BlockSparseMask:
        """The mask of lists of kept blocks; a step of the walk looks at its list alone.

        Args:
            indices: integers (..., T / block_q, M): the blocks of keys that each block of queries
                reads, in any order, where ... is as in ``table``.
            counts: integers (..., T / block_q): how many of the M count.
            block_sizes: as in ``BlockSparseMask``.
            key_blocks: how many blocks of keys there are: S / block_kv, rounded up.

        Raises:
            ValueError: shapes disagree, or an index that counts is not in 0..key_blocks - 1. Where
                indices are traced, such a one is ignored.
            TypeError: an argument is of the wrong kind.

        Example:
            >>> mask = BlockSparseMask.from_indices([[0, 0], [1, 0]], [1, 2], (2, 2), 2)
            >>> mask.table.astype(int).tolist()
            [[1, 0], [1, 1]]
        """
        name = f"{cls.__name__}.from_indices: "
        key_blocks = positive_integer(f"{name}key_blocks", key_blocks)
        lists = check_lists(name, indices, counts, key_blocks)
        return cls(_table(lists, key_blocks), block_sizes, lists)

    def bind(self, sizes: Sizes) -> Mask:
        name = f"{type(self).__name__}.table"
        table = bind_table(name, self.table, self.blocks, sizes)
        indices = self.indices
        if indices is not None:
            indices = _of_key_heads(indices, sizes)
        return BlockSparseMask(per_query_head(table, sizes), self.block_sizes, indices)

    def keep(self, tile: QueryTile, j: Array) -> Array:
        met, (q, kv) = rows_met(self.block_sizes[0], tile), self.block_sizes
        kept = _kept(self, tile, met, tile.s(j) // np.int32(kv))
        if met.count == 1:
            return kept
        return jnp.take(kept, tile.t.reshape(-1) // np.int32(q) - met.first, axis=2, mode="clip")

    def tiles(self, tile: QueryTile) -> tuple[Array, Array]:
        met, size = rows_met(self.block_sizes[0], tile), np.int32(self.block_sizes[1])
        first, last = tile.keys.first // size, tile.keys.last // size
        count = most_met(tile.kv.block, self.block_sizes[1], _origin(tile, "key") is None)
        within = lax.iota(np.int32, count).reshape(1, 1, 1, 1, -1)
        columns = jnp.minimum(first[..., None] + within, last[..., None])
        kept = _kept(self, tile, met, columns.reshape(*first.shape[:3], -1))
        kept = kept.reshape(*kept.shape[:3], -1, count)
        some, every = (f(kept, axis=(2, 4), keepdims=True) for f in (jnp.any, jnp.all))
        return some[..., 0], every[..., 0]

    @property
    def blocks(self) -> BlockSizes:
        return BlockSizes(*self.block_sizes)

    def listed(self, tile: QueryTile) -> Array | None:
        if self.indices is None:
            return None
        blocks, size = _list(self, tile)[..., None], np.int32(self.block_sizes[1])
        origin, w = _origin(tile, "key"), np.int32(tile.kv.block)
        first, last = blocks * size, (blocks + 1) * size - 1
        if origin is not None:
            first, last = first - origin, last - origin
        count = most_met(self.block_sizes[1], tile.kv.block, origin is None)
        j = first // w + lax.iota(np.int32, count).reshape(1, 1, -1)
        met = (blocks >= 0) & (j >= 0) & (j <= last // w) & (j < as_int32(tile.kv.count))
        return jnp.where(met, j, np.int32(-1)).reshape(blocks.shape[0], -1)

    def read_keys(self, T: int, S: int) -> Array:
        read = jnp.any(jnp.asarray(self.table), axis=(1, 2))
        s = lax.iota(np.int32, S) // np.int32(self.block_sizes[1])
        return jnp.take(read, s, axis=1, mode="clip")


def most_met(extent: int, block: int, aligned: bool) -> int:
    """How many blocks ``extent`` consecutive positions meet at the most.

    Args:
        aligned: whether the first position is a multiple of ``extent``.
    """
    if aligned and (extent % block == 0 or block % extent == 0):
        return max(1, extent // block)
    return (extent + block - 2) // block + 1


def _origin(tile: QueryTile, axis: str) -> Array | None:
    """Where a device's part of an axis begins; None: at 0."""
    return None if tile.origin is None else getattr(tile.origin, axis)


def _kept(mask: BlockSparseMask, tile: QueryTile, met: RowsMet, columns: Array) -> Array:
    """The table at the rows that the queries meet, and at columns (heads or 1, 1, 1, n).

    bool (heads or 1, groups or 1, rows, n); the last row is repeated where fewer are met.
    """
    table = jnp.asarray(mask.table)
    n = tile.head_indices if table.shape[1] != 1 else jnp.zeros((1, 1, 1, 1), np.int32)
    rows = met.of(table).reshape(1, 1, -1, 1)
    return table[tile.entry_of(table), n, rows, _within(columns, table.shape[3])]


def _list(mask: BlockSparseMask, tile: QueryTile) -> Array:
    """(heads or 1, n): the blocks of keys that the lists of the tile's rows name, -1 for none."""
    lists, met = jnp.asarray(mask.indices), rows_met(mask.block_sizes[0], tile)
    n = tile.key_heads[:, None, None] if lists.shape[1] != 1 else jnp.zeros((1, 1, 1), np.int32)
    of_list = lax.iota(np.int32, lists.shape[3]).reshape(1, 1, -1)
    found = lists[tile.entry_of(lists), n, met.of(lists).reshape(1, -1, 1), of_list]
    return found.reshape(found.shape[0], -1)


class RowsMet(NamedTuple):
    """Which rows of a table the queries of a tile meet: first..last, and ``count`` at the most."""

    first: Array
    last: Array
    count: int

    def of(self, table: Array) -> Array:
        """(count,): these rows of a table (B, N, rows, ...); the last is repeated."""
        rows = jnp.minimum(self.first + lax.iota(np.int32, self.count), self.last)
        return _within(rows, table.shape[2])


def _within(i: Array, size: Any) -> Array:
    """Indices below size: a symbolic length may have more blocks than a table is given for."""
    return jnp.clip(i, 0, as_int32(size - 1))


def rows_met(block: int, tile: QueryTile) -> RowsMet:
    """The rows of blocks of ``block`` queries that a tile meets."""
    aligned = _origin(tile, "query") is None and not tile.q.ragged
    first, last = (x // np.int32(block) for x in tile.queries)
    return RowsMet(first, last, most_met(tile.q.block, block, aligned))


def _table(lists: Array, key_blocks: int) -> Array:
    """The table (..., rows, key_blocks) of lists (..., rows, M) of key blocks, -1 for none."""
    table = jnp.zeros((*lists.shape[:-1], key_blocks + 1), bool)
    lists = jnp.where(lists < 0, np.int32(key_blocks), lists)
    return jnp.put_along_axis(table, lists, True, axis=-1, inplace=False)[..., :-1]


def _of_key_heads(lists: Array, sizes: Sizes) -> Array | None:
    """lists (..., rows, M) with axes B and K, each of which may be 1; None if they are of N."""
    lists = lists.reshape((1,) * (4 - lists.ndim) + lists.shape)
    heads = lists.shape[1]
    return lists if heads == 1 or sizes.K is None or heads == sizes.K else None
