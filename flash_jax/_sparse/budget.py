"""The best tiles up to a number of them, without a sort.

Floats >= 0 are ordered as their bits are, read as an integer. So the rank of the last tile that is
kept is found bit by bit, each by one count: 31 passes over the table, where XLA:CPU (0.12) takes
several times as long for a sort.
"""

from __future__ import annotations

import numpy as np
from jax import Array, lax
from jax import numpy as jnp


def keep_best(rank: Array, budget: Array) -> Array:
    """The tiles of the largest ranks, bool as rank.

    Args:
        rank: float32 (..., T / block, S / block), >= 0; 0: never kept.
        budget: int32 (...), how many to keep. Fewer are where fewer ranks are > 0. Of equal ranks
            the last rows come first, and in a row the last columns.
    """
    bits = lax.bitcast_convert_type(rank, np.int32)
    budget = jnp.asarray(budget, np.int32)[..., None, None]

    def at_least(x: Array) -> Array:
        return jnp.sum(bits >= x, axis=(-1, -2), keepdims=True, dtype=np.int32)

    def one_bit(i: Array, limit: Array) -> Array:
        higher = limit | (np.int32(1) << (np.int32(30) - i))
        return jnp.where(at_least(higher) >= budget, higher, limit)

    none = jnp.zeros_like(bits[..., :1, :1]) + 0 * budget
    limit = lax.fori_loop(np.int32(0), np.int32(31), one_bit, none)
    above, equal = bits > limit, (bits == limit) & (bits > 0)
    left = budget - jnp.sum(above, axis=(-1, -2), keepdims=True, dtype=np.int32)
    return above | (equal & (_from_the_end(equal) <= left))


def _from_the_end(x: Array) -> Array:
    """How many entries of x (..., rows, columns) are True from the last one to each."""
    rows = jnp.sum(x, axis=-1, keepdims=True, dtype=np.int32)
    below = lax.cumsum(rows, axis=rows.ndim - 2, reverse=True) - rows
    return below + lax.cumsum(x.astype(np.int32), axis=x.ndim - 1, reverse=True)
