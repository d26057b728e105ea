"""From floats to the operands of ``int8``, and back to the floats those stand for.

Smoothing: a channel that is large in every key would coarsen all others, so the mean of the keys
is taken out before they are quantized. That shifts the scores of query q by q . mean, all alike,
which a softmax ignores; it goes onto lse, or, where soft caps or sinks need it, onto the scores.

Zhang et al., SageAttention, 2024, section 4.2, https://arxiv.org/abs/2410.02367
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jax import Array, lax
from jax import numpy as jnp

from .._passes.operands import Quantization
from .._tiles.heads_first import heads_first
from .._tiles.symbolic import as_int32
from .._tiles.xla import rounded
from .int8 import ZERO_POINT
from .quantized import QuantizedArray, round_to_int8, scales_of, spread

_MOST = 1e30  # a mean that may be subtracted from any float32


class Integers(NamedTuple):
    """Queries, keys and values in 8 bits. A row that is not finite has a NaN among its scales.

    They stand for    q * q_scale / channel,    k * k_scale * channel + mean,    v * v_scale
    """

    q: Array  # (B, T, N, H)
    q_scale: Array  # (B, T, N, 1)
    k: Array  # (B, S, K, H)
    k_scale: Array  # (B or 1, S, K, 1)
    channel: Array | None  # (B or 1, 1, K, H)
    mean: Array | None  # (B, 1, K, H)
    v: Array  # (B, S, K, Hv)
    v_scale: Array  # (B or 1, S, K, 1) or (B or 1, 1, K, Hv or 1)


def to_integers(
    query: Array,
    key: Array | QuantizedArray,
    value: Array | QuantizedArray,
    read: Array | None,
) -> Integers:
    """Quantizes queries and smoothed keys per row, and values per channel.

    Args:
        query: (B, T, N, H) float.
        key: (B, S, K, H) float, or quantized with scales constant along H or along S.
        value: (B, S, K, Hv), alike.
        read: (B or 1, S), whether any query reads the key; None: all. Others touch neither scales
            nor mean.

    Returns:
        Integers and scales. The scale of a key is NaN where the key or its value is not finite:
        whoever reads it gets NaN, and whoever does not is spared.
    """
    if read is not None:
        read = read[..., None, None]
    if isinstance(value, QuantizedArray):
        v, v_scale = value.values, _of_all_heads(value)
        v_finite = jnp.isfinite(v_scale)
        v_scale = jnp.where(v_finite, v_scale, 0)
        v_finite = jnp.all(v_finite, axis=-1, keepdims=True)
    else:
        v, v_scale, v_finite = _by_channel(value.astype(np.float32), read)
    channel = mean = None
    if isinstance(key, QuantizedArray):
        k, k_scale = key.values, _of_all_heads(key)
        if k_scale.shape[3] != 1:
            channel, k_scale = k_scale, jnp.ones((1, 1, 1, 1), np.float32)
        k_scale = jnp.broadcast_to(k_scale, (k_scale.shape[0], *k.shape[1:3], 1))
    else:
        smooth, mean = _smoothed(key.astype(np.float32), read)
        k, k_scale = _by_row(smooth)
    k_scale = jnp.where(v_finite, k_scale, jnp.nan)
    query = query.astype(np.float32)
    if channel is not None:
        query = query * _of_queries(channel, query)
    q, q_scale = _by_row(query)
    return Integers(q, q_scale, k, k_scale, channel, mean, v, v_scale)


def to_floats(integers: Integers) -> tuple[Array, Array, Array]:
    """What the integers stand for, float32."""
    q, q_scale, k, k_scale, channel, mean, v, v_scale = integers
    q, k, v = (
        x.astype(np.float32) * scale for x, scale in ((q, q_scale), (k, k_scale), (v, v_scale))
    )
    if channel is not None:
        of_queries = _of_queries(channel, q)
        q = jnp.where(of_queries == 0, 0, q / jnp.where(of_queries == 0, 1, of_queries))
        k = k * channel
    return q, k if mean is None else k + mean, v


def to_operands(integers: Integers, scale: Array) -> tuple[Array, Array, Array, Quantization]:
    """Queries (B, T, N, H) uint8, keys (B, K, S, H), values (B, K, S, Hv), and what they carry.

    Args:
        scale: (B or 1,) factor on the products.
    """
    q, q_scale, k, k_scale, _, _, v, v_scale = integers
    q_scale = q_scale[..., 0] * scale[:, None, None]
    k_zero = zero_products(k)
    q_scale, k_scale, k_zero, v_scale = (
        jnp.swapaxes(x, 1, 2) for x in (q_scale, k_scale[..., 0], k_zero, v_scale)
    )
    quantization = Quantization(q_scale, None, k_scale, k_zero, v_scale)
    return unsigned(q), heads_first(k), heads_first(v), quantization


def quantized_queries(query: Array) -> tuple[Array, Array]:
    """Queries (B, T, N, H) as uint8, and a scale (B, N, T) for each."""
    q, scale = _by_row(query.astype(np.float32))
    return unsigned(q), jnp.swapaxes(scale[..., 0], 1, 2)


def unsigned(q: Array) -> Array:
    """int8 queries as uint8, with ``ZERO_POINT`` for 0."""
    return (q.astype(np.int32) + ZERO_POINT).astype(np.uint8)


def zero_products(k: Array) -> Array:
    """What each row of keys (..., H) makes with the zero point of the queries: int32 (...)."""
    # In float32, which XLA sums several times as fast, and exactly up to 2^24.
    return ZERO_POINT * jnp.sum(k.astype(np.float32), axis=-1).astype(np.int32)


def shift(query: Array, integers: Integers, scale: Array) -> Array | None:
    """scale * q . mean (B, N, T), which smoothing took from the scores; None: nothing."""
    if integers.mean is None:
        return None
    query = query.astype(np.float32) * scale[:, None, None, None]
    # Rounded first, since XLA's sum of products is slow.
    products = rounded(query * _of_queries(integers.mean, query))
    return jnp.swapaxes(jnp.sum(products, axis=-1), 1, 2)


def _smoothed(key: Array, read: Array | None) -> tuple[Array, Array]:
    """Keys (B, S, K, H) without their mean (B, 1, K, H), 0 where no one reads them."""

    def mean_of(counted: Array | None) -> Array:
        if counted is None:
            count = jnp.maximum(as_int32(key.shape[1]), 1).astype(np.float32)
            return jnp.sum(key, axis=1, keepdims=True) / count
        count = jnp.maximum(jnp.sum(counted, axis=1, keepdims=True, dtype=np.int32), 1)
        return jnp.sum(jnp.where(counted, key, 0), axis=1, keepdims=True) / count.astype(np.float32)

    def mean_of_finite() -> Array:
        finite = jnp.all(jnp.isfinite(key), axis=-1, keepdims=True)
        mean = mean_of(finite if read is None else read & finite)
        return jnp.where(jnp.abs(mean) < _MOST, mean, 0)  # any constant will do

    mean = mean_of(read)
    mean = lax.cond(jnp.all(jnp.abs(mean) < _MOST), lambda: mean, mean_of_finite)
    smooth = key - mean
    return (smooth if read is None else jnp.where(read, smooth, 0)), mean


def _by_row(x: Array) -> tuple[Array, Array]:
    """x as int8, with a scale per row of the last axis."""
    # As infinity, since XLA's maximum may lose a NaN.
    amax = jnp.max(jnp.where(jnp.isnan(x), jnp.inf, jnp.abs(x)), axis=-1, keepdims=True)
    scale = jnp.where(jnp.isfinite(amax), scales_of(amax), jnp.nan)
    return round_to_int8(x, scale), scale


def _by_channel(x: Array, read: Array | None) -> tuple[Array, Array, Array]:
    """x (B, S, K, Hv) as int8, scales (B, 1, K, Hv), and (B, S, K, 1), whether a row is finite."""
    finite = jnp.all(jnp.isfinite(x), axis=-1, keepdims=True)
    counts = finite if read is None else read & finite
    amax = jnp.max(jnp.where(counts, jnp.abs(x), 0), axis=1, keepdims=True, initial=0)
    scale = scales_of(amax)
    return round_to_int8(x, scale), scale, finite


def _of_all_heads(x: QuantizedArray) -> Array:
    """Scales (B or 1, S or 1, K, H or 1)."""
    scales = spread(x.scales, x.shape, x.blocks)
    return jnp.broadcast_to(scales, (*scales.shape[:2], x.shape[2], scales.shape[3]))


def _of_queries(x: Array, query: Array) -> Array:
    """x (B, 1, K, H) for the query heads: (B, 1, N, H)."""
    return jnp.repeat(x, query.shape[2] // max(x.shape[2], 1), axis=2)
