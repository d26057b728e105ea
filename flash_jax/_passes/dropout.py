"""Dropout of probabilities, drawn where they are: by element, not by tile.

Whether a probability is dropped is a hash of the PRNG key and of the indices (batch element, head,
query, key) alone: tiles of any size draw the same, and no (T, S) array is kept. What there are few
of is hashed well, and what there are T x S of is hashed in a few operations:

    (k0, k1) of a batch element   threefry of the PRNG key and the element
    (r0, r1) of a row of scores   threefry of (k0, k1) and (head, query)
    the word of a pair            mix of (r0, r1) and the key's index

Salmon et al., Parallel random numbers: as easy as 1, 2, 3, 2011 (Threefry-2x32, which with 13
rounds passes Crush), https://doi.org/10.1145/2063384.2063405
Wellons, Prospecting for hash functions, 2018 (lowbias32), https://nullprogram.com/blog/2018/07/31/
"""

from __future__ import annotations

import jax
import numpy as np
from jax import Array, lax
from jax import numpy as jnp

from .._tiles.tile import QueryTile

_ROUNDS = 13
_ROTATIONS = (13, 15, 26, 6, 17, 29, 16, 24)
_PARITY = np.uint32(0x1BD11BDA)


def bind_key(rng: Array, elements: int) -> Array:
    """(elements, 2) uint32: a key per batch element, from one PRNG key of any kind."""
    words = jax.random.key_data(rng).astype(np.uint32).reshape(-1)
    words = [words[i] for i in range(words.size)]
    words += [np.uint32(0)] * (len(words) % 2)
    key = words[0], words[1]
    for pair in zip(words[2::2], words[3::2], strict=True):  # kinds of more than 64 bits
        key = threefry(key, pair)
    return jnp.stack(threefry(key, (lax.iota(np.uint32, elements), np.uint32(0))), axis=-1)


def drop(
    key: Array, rate: float, every_head: bool, tile: QueryTile, j: Array, dtype: jnp.dtype
) -> Array:
    """(heads, rows, block_kv): 0 where key tile j's probability is dropped, else 1 / (1 - rate).

    Args:
        key: (B or 1, 2) uint32, of ``bind_key``; of one element where all drop the same.
        rate: in [0, 1).
        every_head: whether all heads drop the same.
    """
    k0, k1 = tile.of_instance(key)
    n = np.uint32(0) if every_head else tile.n.astype(np.uint32)
    row = threefry((k0, k1), (n, tile.t.astype(np.uint32)))
    kept = mix(row, tile.s(j).astype(np.uint32)) >= np.uint32(rate * 2**32)
    return tile.as_rows(jnp.where(kept, jnp.array(1 / (1 - rate), dtype), jnp.array(0, dtype)))


def threefry(key: tuple, counter: tuple) -> tuple[Array, Array]:
    """Two random words of each pair of counters: Threefry-2x32 of 13 rounds.

    Written out: JAX's own, of 20 rounds, takes XLA:CPU ten times as long to compile and to run
    (0.12), and the words of ``jax.random.bits`` depend on its configuration.
    """
    keys = *key, key[0] ^ key[1] ^ _PARITY
    x, y = counter[0] + keys[0], counter[1] + keys[1]
    for i in range(_ROUNDS):
        x = x + y
        y = _rotated(y, _ROTATIONS[i % 8]) ^ x
        if i % 4 == 3:
            count = i // 4 + 1
            x, y = x + keys[count % 3], y + keys[(count + 1) % 3] + np.uint32(count)
    return x, y


def mix(row: tuple[Array, Array], s: Array) -> Array:
    """A random word per row and index s: lowbias32, with a word of the row before each product.

    Indices are spread over all bits first, by a product with the golden ratio: of neighbours that
    differ in low bits alone, lowbias32 with these words leaves a correlation of 1e-4.
    """
    x = s * np.uint32(0x9E3779B9) ^ row[0]
    x = (x ^ x >> np.uint32(16)) * np.uint32(0x7FEB352D)
    x = x ^ x >> np.uint32(15) ^ row[1]
    x = x * np.uint32(0x846CA68B)
    return x ^ x >> np.uint32(16)


def _rotated(x: Array, bits: int) -> Array:
    return x << np.uint32(bits) | x >> np.uint32(32 - bits)
