"""Dropout of probabilities, drawn where they are: by element, not by tile.

Whether a probability is dropped is a hash of the PRNG key and of the indices (batch element, head,
query, key) alone: tiles of any size draw the same, and no (T, S) array is kept.

Salmon et al., Parallel random numbers: as easy as 1, 2, 3, 2011 (Threefry-2x32),
https://doi.org/10.1145/2063384.2063405
"""

from __future__ import annotations

import jax
import numpy as np
from jax import Array
from jax import numpy as jnp
from jax.extend.random import threefry2x32_p

from ._query_tile import QueryTile


def bind_key(rng: Array) -> Array:
    """A PRNG key of any kind as (1, 2) uint32."""
    return jax.random.bits(rng, (1, 2), np.uint32)


def drop(key: Array, rate: float, tile: QueryTile, j: Array, dtype: jnp.dtype) -> Array:
    """(heads, rows, block_kv): 0 where key tile j's probability is dropped, else 1 / (1 - rate).

    Args:
        key: (B or 1, 2) uint32.
        rate: in [0, 1).
    """
    key_0, key_1 = tile.of_element(key)
    key_0, key_1 = _threefry(key_0, key_1, tile.element, tile.n, tile.n.shape)
    bits, _ = _threefry(key_0, key_1, tile.t, tile.s(j), tile.shape())
    kept = bits >= np.uint32(rate * 2**32)
    return tile.as_rows(jnp.where(kept, jnp.array(1 / (1 - rate), dtype), jnp.array(0, dtype)))


def _threefry(k0: Array, k1: Array, x0: Array, x1: Array, shape: tuple[int, ...]) -> list[Array]:
    """Two random words of each pair of counters."""
    words = [jnp.broadcast_to(x.astype(np.uint32), shape) for x in (k0, k1, x0, x1)]
    zero = 0 * sum(words)  # under vmap the primitive takes words that are all mapped, or none
    return threefry2x32_p.bind(*(x + zero for x in words))
