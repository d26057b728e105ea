"""Pages for new tokens: a free list that is a function of the tables.

A page is free where no row's table names it. A row takes a page for each one that its new tokens
begin, and one more for its last page where others read that, too: it goes on in a copy.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np
from jax import Array, lax
from jax import numpy as jnp

from .slots import Appended


class Copies(NamedTuple):
    """Pages to copy before tokens are written: the first ``count`` of them."""

    source: Array  # (B,)
    target: Array  # (B,)
    count: Array


def users(table: Array, pages: int) -> Array:
    """How many rows have each page, int32 (pages,); table (B, M), -1 where there is none."""
    page = jnp.where(table < 0, pages, table)
    return jnp.zeros((pages,), np.int32).at[page].add(1, mode="drop")


def with_pages(
    table: Array, pages: int, size: int, lengths: Array, new: Appended
) -> tuple[Array, Copies]:
    """The table with pages for new tokens, as far as there are free ones, and what to copy first.

    Args:
        table: (B, M).
        pages: how many there are.
        size: tokens of a page.
        lengths: (B,), tokens so far.
        new: the new ones.
    """
    B, M = table.shape
    count, index = users(table, pages), lax.iota(np.int32, M)[None]
    begin, last = index * np.int32(size), lengths // np.int32(size)
    # Never one whose first tokens found no page: it would look as if it held them.
    missing = (begin >= lengths[:, None]) & (begin < new.end[:, None])
    goes_on = (lengths % np.int32(size) > 0) & (new.end > lengths)
    shared = (index == last[:, None]) & goes_on[:, None] & (table >= 0)
    shared = shared & (count[jnp.maximum(table, 0)] > 1)
    wanted = missing | shared
    rank = jnp.cumsum(wanted.ravel()).reshape(B, M) - 1
    free = jnp.nonzero(count == 0, size=pages, fill_value=-1)[0].astype(np.int32)
    taken = jnp.where(rank < pages, free[jnp.clip(rank, 0, pages - 1)], -1)
    after = jnp.where(wanted, taken, table)
    row = lax.iota(np.int32, B)
    source, target = (x[row, jnp.minimum(last, M - 1)] for x in (table, after))
    copied = jnp.any(shared, axis=1) & (target >= 0)
    order = jnp.argsort(~copied, stable=True)
    return after, Copies(source[order], target[order], jnp.sum(copied, dtype=np.int32))


def copied(copies: Copies, pools: dict[str, Array]) -> dict[str, Array]:
    """Pools (pages, ...) after the copies.

    By a loop: where there is nothing to copy it does nothing, and leaves the pools in place.
    """

    def copy(carry: tuple[Array, dict[str, Array]]) -> tuple[Array, dict[str, Array]]:
        i, pools = carry
        source, target = copies.source[i], copies.target[i]

        def of(x: Array) -> Array:
            page = lax.dynamic_index_in_dim(x, source, 0)
            return lax.dynamic_update_index_in_dim(x, page, target, 0)

        return i + 1, jax.tree.map(of, pools)

    return lax.while_loop(lambda x: x[0] < copies.count, copy, (jnp.int32(0), pools))[1]


def written_in_pages(pool: Array, x: Array, table: Array, new: Appended) -> Array:
    """The pool (pages, K, P, ...) with new tokens x (B, T, K, ...) that the table has pages for."""
    (pages, _, P, *_), M = pool.shape, table.shape[1]
    index = new.position // np.int32(P)
    page = jnp.take_along_axis(table, jnp.clip(index, 0, M - 1), axis=1)
    page = jnp.where(new.real & (page >= 0) & (index < M), page, pages)
    slot = jnp.mod(new.position, np.int32(P))
    return pool.at[page, :, slot].set(x.astype(pool.dtype), mode="drop")
