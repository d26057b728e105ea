"""Small caches of every kind, each beside the list of tokens that it should hold."""

import dataclasses

import jax
import numpy as np
from cache_oracle import Rows
from jax import numpy as jnp

from flash_jax import KVCache, attend_with_lse

B, K, G, H, Hv = 2, 2, 2, 5, 3
N = K * G
SLOTS = 13
KINDS = {
    "float32": {},
    "window": {"window": 5},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "int8"},
    "int8 window": {"dtype": "int8", "window": 4},
}
# Of the results, relative to the largest: few queries, and many, which are rounded to 8 bits with
# keys of 8 bits. The oracle's tokens are those that are stored.
ROUNDING = {"float32": (3e-6, 3e-6), "bfloat16": (1e-2, 1e-2), "int8": (3e-4, 3e-2)}
append = jax.jit(KVCache.append, static_argnames="left_padded")
with_lse = jax.jit(attend_with_lse)


def empty(kind="float32", slots=SLOTS, garbage=False, rows=B):
    cache = KVCache.empty(rows, slots, K, H, value_dim=Hv, **KINDS[kind])
    if not garbage:
        return cache
    names = ["keys", "values"] if cache.key_scales is None else ["key_scales"]
    full = {name: jnp.full_like(getattr(cache, name), jnp.nan) for name in names}
    return dataclasses.replace(cache, **full)


def tokens(rng, T, rows=B):
    shapes = (rows, T, K, H), (rows, T, K, Hv), (rows, T, N, H)
    return tuple(rng.standard_normal(shape).astype(np.float32) for shape in shapes)


def both(kind, garbage=False, slots=SLOTS):
    cache = empty(kind, slots, garbage)
    return cache, Rows(B, slots, Hv, cache.window)


def stored(x, kind):
    """Tokens as a cache of that kind holds them."""
    dtype = KINDS[kind].get("dtype", "float32")
    if dtype != "int8":
        return x.astype(dtype).astype(np.float32)
    scale = np.max(np.abs(x), axis=-1, keepdims=True) / np.float32(127)
    return np.round(x / scale) * scale


def rounding(cache, T=1):
    return ROUNDING[str(cache.keys.dtype)][T > 16]


def grow(cache, rows, kind, key, value, lengths, left_padded=False):
    cache = append(cache, key, value, np.array(lengths), left_padded=left_padded)
    rows.append(stored(key, kind), stored(value, kind), lengths, left_padded)
    return cache


def assert_agrees(cache, rows, query, **options):
    exact = rows.attend(query, **options)
    assert cache.lengths.tolist() == rows.lengths
    for x, right in zip(with_lse(query, cache, **options), exact, strict=True):
        size = np.nanmax(np.abs(right[~np.isinf(right)]), initial=1)
        tolerance = size * rounding(cache, query.shape[1])
        np.testing.assert_allclose(x, right, atol=tolerance, rtol=0)
