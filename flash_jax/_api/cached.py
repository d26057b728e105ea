"""A cache as the keys and values of a call: which options and which plan they make.

Where slots are positions, the options of other calls say it all. Few queries read a ring where it
lies, with a mask that knows the position of every slot; for many queries it is copied into order.
Pages are found tile by tile through the table of their row.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array, lax
from jax import numpy as jnp

from .._formats.int8 import summable
from .._formats.smoothing import quantized_queries, zero_products
from .._formats.straight_through import straight_through
from .._masks.arrays import ArrayMask
from .._masks.base import Mask
from .._masks.slots import HeldMask, RingMask, TokenMask, position_of
from .._passes.operands import Operands, Quantization
from .._passes.primitives import attention
from .any_cache import as_floats
from .cache import KVCache
from .options import Arrays, Bound, Options, bind_options
from .paged import PagedKVCache, gathered
from .plan import plan_cached, reads_in_place


class Queries(NamedTuple):
    """Positions: of query 0, and which ones are those of tokens, first..end-1; (B,) each."""

    offset: Array
    first: Array
    end: Array

    def later(self, by: Array) -> Queries:
        return Queries(*(x + by for x in self))


def to_cache(
    query: Array,
    cache: KVCache | PagedKVCache,
    queries: Queries,
    arrays: Arrays,
    options: Options,
) -> tuple[Array, Array | None]:
    """Attention to the tokens of a cache: output, of query's dtype, and lse if it is asked for."""
    args = query, cache, queries, arrays
    if cache.keys.dtype == np.int8:
        return straight_through((options,), _in_integers, _in_copies, *args)
    if isinstance(cache, PagedKVCache):
        return straight_through((options,), _in_floats, _in_copies, *args)
    return _in_floats(options, *args)


def reach(cache: KVCache, options: Options) -> tuple[int, int | None]:
    """How many keys before and after its own a query reads of a ring."""
    assert cache.window is not None
    left, right = options.window or (None, None)
    left = min(cache.window - 1, cache.window if left is None else left)
    return left, 0 if options.is_causal else right


class Stored(NamedTuple):
    """Keys, values and scales as the operands of a call: all rows share the one entry of a pool."""

    keys: Array
    values: Array
    key_scales: Array | None
    value_scales: Array | None
    table: Array | None

    @classmethod
    def of(cls, cache: KVCache | PagedKVCache) -> Stored:
        arrays = cache.keys, cache.values, cache.key_scales, cache.value_scales
        if isinstance(cache, KVCache):
            return cls(*arrays, None)
        return cls(*(None if x is None else x[None] for x in arrays), cache.table)  # pyright: ignore


def _in_floats(
    options: Options,
    query: Array,
    cache: KVCache | PagedKVCache,
    queries: Queries,
    arrays: Arrays,
) -> tuple[Array, Array | None]:
    dtype, query = query.dtype, query.astype(cache.keys.dtype)
    cache, bound, few = _bound(query, cache, queries, arrays, options)
    keys, values, _, _, table = Stored.of(cache)
    operands = Operands(query, keys, values, bound.scores, bound.sinks, pages=table)
    plan = plan_cached(query, *_sizes(cache), bound, options.machine, options.lse, few)
    out, lse = attention(operands, plan)
    return out.astype(dtype), lse


def _in_integers(
    options: Options,
    query: Array,
    cache: KVCache | PagedKVCache,
    queries: Queries,
    arrays: Arrays,
) -> tuple[Array, Array | None]:
    cache, bound, few = _bound(query, cache, queries, arrays, options)
    keys, values, k_scale, v_scale, table = Stored.of(cache)
    assert k_scale is not None
    assert v_scale is not None
    scale = jnp.broadcast_to(bound.scores.scale[:, None, None], jnp.swapaxes(query, 1, 2).shape[:3])
    q, zero = query, jnp.zeros((1,) * k_scale.ndim, np.int32)
    if not few:
        q, q_scale = quantized_queries(query)
        scale, zero = scale * q_scale, zero_products(keys)
        bound = bound._replace(blocks=summable("query", query.shape[-1], bound.blocks))
    quantization = Quantization(scale, None, k_scale, zero, v_scale[..., None])
    operands = Operands(q, keys, values, bound.scores, bound.sinks, None, quantization, pages=table)
    plan = plan_cached(query, *_sizes(cache), bound, options.machine, options.lse, few)
    return attention(operands, plan)


def _in_copies(
    options: Options,
    query: Array,
    cache: KVCache | PagedKVCache,
    queries: Queries,
    arrays: Arrays,
) -> tuple[Array, Array | None]:
    """Attention to a copy of pages in order, and to the floats that integers stand for.

    Derivatives are those of this.
    """
    dtype = query.dtype
    if isinstance(cache, PagedKVCache):
        lengths, first = jnp.minimum(cache.lengths, cache.held), jnp.zeros_like(cache.lengths)
        cache = KVCache(*gathered(cache), lengths, cache.begin, cache.offset, first)
    if cache.keys.dtype == np.int8:
        query = query.astype(np.float32)
        keys, values = as_floats(cache)
        cache = dataclasses.replace(
            cache, keys=keys, values=values, key_scales=None, value_scales=None
        )
    out, lse = _in_floats(options, query, cache, queries, arrays)
    return out.astype(dtype), lse


def _sizes(cache: KVCache | PagedKVCache) -> tuple[Any, int | None]:
    """What keys (1, K, S, H) a row has, and the size of their pages, if any."""
    K, H = cache.keys.shape[1], cache.keys.shape[3]
    keys = jax.ShapeDtypeStruct((1, K, cache.slots, H), cache.keys.dtype)
    return keys, cache.page_size if isinstance(cache, PagedKVCache) else None


def _bound(
    query: Array,
    cache: KVCache | PagedKVCache,
    queries: Queries,
    arrays: Arrays,
    options: Options,
) -> tuple[KVCache | PagedKVCache, Bound, bool]:
    """The cache as it is read, the options bound to it, and whether the queries are few."""
    few = reads_in_place(query, cache.keys.dtype, cache.slots)
    if isinstance(cache, PagedKVCache):
        arrays = arrays._replace(key_value_seq_lengths=jnp.minimum(cache.lengths, cache.held))
    elif cache.window is None:
        arrays = arrays._replace(key_value_seq_lengths=jnp.minimum(cache.lengths, cache.slots))
    elif few:
        return cache, _bound_to_ring(query, cache, queries, arrays, options), few
    else:
        first = cache.lengths - cache.slots
        arrays = arrays._replace(mask=HeldMask(jnp.maximum(cache.first, 0) - first))
        options = options._replace(window=reach(cache, options))
        cache, queries = _in_order(cache), queries.later(-first)
    return cache, _bind(query, cache.keys.shape[1], cache.slots, queries, arrays, options), few


def _bind(
    query: Array, K: int, S: int, queries: Queries, arrays: Arrays, options: Options
) -> Bound:
    key: Any = jax.ShapeDtypeStruct((query.shape[0], S, K, query.shape[-1]), query.dtype)
    offset, first, end = queries
    mask: Mask = TokenMask(first - offset, end - offset)
    if arrays.mask is not None:
        given = arrays.mask if isinstance(arrays.mask, Mask) else ArrayMask(arrays.mask)
        mask = mask & given
    return bind_options(arrays._replace(query_offset=offset, mask=mask), options, query, key)


def _bound_to_ring(
    query: Array, cache: KVCache, queries: Queries, arrays: Arrays, options: Options
) -> Bound:
    left, right = reach(cache, options)
    mask = RingMask(cache.lengths, cache.first, queries.offset, left, right)
    options = options._replace(is_causal=False, window=None)
    arrays = arrays._replace(mask=mask)
    bound = _bind(query, cache.keys.shape[1], cache.slots, queries, arrays, options)
    slopes = bound.scores.alibi_slopes
    if slopes is None:
        return bound
    t = queries.offset[:, None] + lax.iota(np.int32, query.shape[1])[None]
    slot = lax.iota(np.int32, cache.slots)[None]
    s = position_of(slot, cache.lengths[:, None], cache.slots)
    distance = jnp.abs(t[:, :, None] - s[:, None]).astype(slopes.dtype)
    bias = -slopes[..., None, None] * distance[:, None]
    return bound._replace(scores=bound.scores._replace(alibi_slopes=None, bias=bias))


def _in_order(cache: KVCache) -> KVCache:
    """A copy of a ring, in order: slot i has position length - S + i."""
    first = jnp.mod(cache.lengths, np.int32(cache.slots))
    slot = jnp.mod(first[:, None] + lax.iota(np.int32, cache.slots)[None], np.int32(cache.slots))
    ordered = jax.vmap(lambda x, slot: jnp.take(x, slot, axis=1, unique_indices=True))
    names = "keys", "values", "key_scales", "value_scales"
    held = {name: getattr(cache, name) for name in names}
    held = {name: ordered(x, slot) for name, x in held.items() if x is not None}
    return dataclasses.replace(cache, **held)
